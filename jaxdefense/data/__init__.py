"""Data: TFDS sets without TensorFlow, folders and arrays; batches for the step; augmentation."""

from jaxdefense import extras

with extras.required("train", __name__):
    from jaxdefense.data.arrays import Arrays, Encoded, Splits
    from jaxdefense.data.augment import for_contrast as make_contrast_view
    from jaxdefense.data.augment import make as make_augment
    from jaxdefense.data.convert import from_arrays
    from jaxdefense.data.datasets import has_test, load, load_section, names
    from jaxdefense.data.folder import from_folder
    from jaxdefense.data.pipeline import Batches, OnDevice, Streaming, test_batches, to_float

__all__ = [
    "Arrays",
    "Batches",
    "Encoded",
    "OnDevice",
    "Splits",
    "Streaming",
    "from_arrays",
    "from_folder",
    "has_test",
    "load",
    "load_section",
    "make_augment",
    "make_contrast_view",
    "names",
    "test_batches",
    "to_float",
]
