"""Runs: how a config becomes a `Run`, and how a trained one is restored from its workdir.

* `run`: `build(config)` makes the data, model, defence and attacks; `restore(workdir)` reads them
  back with the weights; `export` writes both to one file, which `restore` reads too.
* `checkpoint`: the only code that writes and reads checkpoints.
* `sources`: the trained runs that a config names (a teacher), and their copies in the workdir.

`jaxdefense.train` trains a `Run`; `jaxdefense.evaluation` judges one.
"""

from jaxdefense import extras

with extras.required("train", __name__):
    from jaxdefense.runs.run import Restored, Run, build, export, load_classifier, restore

__all__ = ["Restored", "Run", "build", "export", "load_classifier", "restore"]
