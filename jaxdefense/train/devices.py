"""The devices that a run trains on: kept in its checkpoints, and said where their number changes.

The bits of a run hang on the number of its devices, not of its processes: each device draws its own
random numbers and sums its own part of the batch, and BatchNorm's statistics in training mode are
those of each device's part.
"""

from collections.abc import Sequence
from typing import Any

import jax


def count() -> dict[str, int]:
    """All devices and processes of this run: {"devices", "processes"}."""
    return {"devices": jax.device_count(), "processes": jax.process_count()}


def history(before: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The counts that a run has had, with those of now, which begin at `step`, where they are new.

    Args:
      before: of the checkpoint that the run goes on from; empty at its start.
      step: that it goes on from.

    Returns:
      [{"step", "devices", "processes"}], in order.
    """
    now = count()
    if before and {name: before[-1].get(name) for name in now} == now:
        return list(before)
    return [*before, {"step": step, **now}]


def describe_change(counts: Sequence[dict[str, Any]]) -> str:
    """One line about the last change.

    Args:
      counts: of `history`, at least two.
    """
    was, now = (
        f"{_number(c['devices'], 'device')} of {_number(c['processes'], 'process')}"
        for c in counts[-2:]
    )
    told = f"trained on {was} until step {counts[-1]['step']}, goes on with {now}"
    if counts[-2]["devices"] == counts[-1]["devices"]:
        return told
    return f"{told}: it will not end with the bits of a run on one number of devices"


def _number(count: int, what: str) -> str:
    plural = {"device": "devices", "process": "processes"}[what]
    return f"{count} {what if count == 1 else plural}"
