"""Training: optimisers from plain values, one step, one loop, checkpoints."""

from jaxdefense.train.loop import train
from jaxdefense.train.run import load

__all__ = ["load", "train"]
