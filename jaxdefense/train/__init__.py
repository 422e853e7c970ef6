"""Training: optimisers from plain values, one step, one loop."""

from jaxdefense import extras

with extras.required("train", __name__):
    from jaxdefense.train.loop import train

__all__ = ["train"]
