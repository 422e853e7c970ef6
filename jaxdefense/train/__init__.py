"""Training: optimisers from plain values, one step, one loop, checkpoints."""

from jaxdefense.train.loop import train

__all__ = ["train"]
