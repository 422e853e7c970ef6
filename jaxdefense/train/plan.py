"""The plan of a run: its phases as segments of steps, with the optimiser of each role in each."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from jaxdefense.defenses.base import Phase
from jaxdefense.train import optim

_MOST_STEPS = 2**31  # a step is counted in 32 bits


@dataclasses.dataclass(frozen=True)
class Segment:
    """A phase between two steps of a run.

    Attributes:
      phase: what is applied.
      start: the first step, counted over the whole run.
      end: the step after the last one.
      optimizers: role -> (spec, total steps, steps per epoch) as JSON: equal text, equal optimiser.
      fresh: roles whose optimiser state begins here.
    """

    phase: Phase
    start: int
    end: int
    optimizers: Mapping[str, str]
    fresh: tuple[str, ...]

    def build(self) -> dict[str, optax.GradientTransformation]:
        """The optimisers of the roles that this phase trains."""
        built = {}
        for role, text in self.optimizers.items():
            spec, total, per_epoch = json.loads(text)
            built[role] = optim.make(spec, total=total, per_epoch=per_epoch)
        return built


def _lengths(phases: Sequence[Phase], length: float | str, per_epoch: int) -> list[int]:
    """Steps of each phase; phases without a length share what is left of the run."""
    if str(length).strip().endswith("%"):
        raise ValueError(f"the run's length is epochs ('30e') or steps ('500s'), got {length!r}")
    try:
        total = optim.steps_of(length, total=0, per_epoch=per_epoch)
    except ValueError as error:
        raise ValueError(f"train.length: {error}") from None
    if not 0 < total < _MOST_STEPS:
        raise ValueError(
            f"train.length must be at least one step and fewer than {_MOST_STEPS}, got {length!r}, "
            f"which is {total:.4g} steps"
        )
    fixed = [
        None if p.length is None else optim.steps_of(p.length, total=total, per_epoch=per_epoch)
        for p in phases
    ]
    left, open_phases = total - sum(n or 0 for n in fixed), fixed.count(None)
    if open_phases and left < open_phases:
        raise ValueError(
            f"the phases of fixed length leave {left} of the run's {total} steps for "
            f"{open_phases} more: raise train.length ({length})"
        )
    share = [left * (i + 1) // open_phases - left * i // open_phases for i in range(open_phases)]
    lengths = [share.pop(0) if n is None else n for n in fixed]
    if min(lengths, default=0) < 1:
        raise ValueError(f"every phase needs at least one step, got {lengths}")
    return lengths


def check_interval(name: str, length: Any) -> None:
    """Checks that validations or checkpoints come in a length that is larger than none.

    Args:
      name: "validate_every" or "checkpoint_every", for the message.
      length: see `optim.steps_of`.

    Raises:
      ValueError: otherwise.
    """
    try:
        steps = optim.steps_of(length, total=_MOST_STEPS, per_epoch=_MOST_STEPS)
    except ValueError as error:
        raise ValueError(f"train.{name}: {error}") from None
    if not steps:
        raise ValueError(f"train.{name} must be longer than no step, got {length!r}")


def make(
    phases: Sequence[Phase], default: Mapping[str, Any], *, length: float | str, per_epoch: int
) -> list[Segment]:
    """Plans a run: its segments, in order.

    A role keeps its optimiser, schedule and state from phase to phase as long as its spec stays
    the same and no phase asks for a fresh one: a cosine then spans all those phases, counted in
    the role's own updates (two per batch where a phase makes two).

    Args:
      phases: the defence's.
      default: spec of `optim.make`, the optimiser of roles for which a phase names none.
      length: of the whole run (`optim.steps_of`); phases of fixed length may exceed it.
      per_epoch: batches per epoch.

    Raises:
      ValueError: lengths that do not fit, or an optimiser spec that is wrong.
    """
    lengths = _lengths(phases, length, per_epoch)
    # A span is a stretch over which one role's optimiser lives: [spec, total, per_epoch].
    spans: dict[str, list[Any]] = {}
    drafts: list[tuple[Phase, int, int, dict[str, list[Any]], tuple[str, ...]]] = []
    start = 0
    for phase, length in zip(phases, lengths, strict=True):
        used, fresh = {}, []
        for role in dict.fromkeys(role for update in phase.updates for role in update.roles):
            spec = dict(phase.optimizers.get(role, default))
            times = sum(role in update.roles for update in phase.updates)
            renew = role in phase.fresh_optimizers or role in phase.fresh_params
            if renew or role not in spans or spans[role][0] != spec:
                spans[role] = [spec, 0, per_epoch * times]
                fresh.append(role)
            spans[role][1] += length * times
            used[role] = spans[role]
        drafts.append((phase, start, start + length, used, tuple(fresh)))
        start += length
    segments = []
    for phase, begin, end, spanned, renewed in drafts:
        texts = {role: json.dumps(span, sort_keys=True) for role, span in spanned.items()}
        segments.append(Segment(phase, begin, end, texts, renewed))
    for segment in segments:
        segment.build()  # a wrong spec fails here, before anything is compiled
    return segments
