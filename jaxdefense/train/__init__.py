"""Training: `train(config, workdir)` takes a run to its end, or goes on with an interrupted one.

* `loop`: the `Trainer` and its workdir; `plan`: which phase and optimisers at which step; `optim`:
  optimisers and schedules from plain values; `step`: the one train step, mapped over the devices.

How a config becomes a run, and how checkpoints are kept, is in `jaxdefense.runs`.
"""

from jaxdefense import extras

with extras.required("train", __name__):
    from jaxdefense.train.loop import train

__all__ = ["train"]
