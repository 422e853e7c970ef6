"""Runs: a config built into a `Run`, its sources, its checkpoints; restored from a workdir."""

from jaxdefense import extras

with extras.required("train", __name__):
    from jaxdefense.runs.run import Restored, Run, build, load_classifier, restore

__all__ = ["Restored", "Run", "build", "load_classifier", "restore"]
