"""Data: TFDS data sets without TensorFlow, batches for the pmapped step, on-device augmentation."""

from jaxdefense import extras

with extras.required("train", __name__):
    from jaxdefense.data.augment import make as make_augment
    from jaxdefense.data.datasets import Arrays, load, names
    from jaxdefense.data.pipeline import Batches, OnDevice, Streaming, test_batches, to_float

__all__ = [
    "Arrays",
    "Batches",
    "OnDevice",
    "Streaming",
    "load",
    "make_augment",
    "names",
    "test_batches",
    "to_float",
]
