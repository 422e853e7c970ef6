"""Training: optimisers from plain values, one step, one loop."""

from jaxdefense.train.loop import train

__all__ = ["train"]
