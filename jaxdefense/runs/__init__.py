"""Runs: a config built into a `Run`, its sources, its checkpoints; restored from a workdir."""

from jaxdefense.runs.run import Restored, Run, build, load_classifier, restore

__all__ = ["Restored", "Run", "build", "load_classifier", "restore"]
