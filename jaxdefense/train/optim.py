"""Optimisers and schedules of optax from a config's plain values.

    {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "clip_norm": None,
     "schedule": {"name": "piecewise", "at": ["50%", "75%"], "factor": 0.1}}

Lengths are steps ("500s"), epochs ("30e", "30" or 30) or shares of the run ("50%").
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxdefense import registry, validate


def steps_of(length: float | str, *, total: int, per_epoch: int) -> int:
    """The number of steps of a length that is stated in steps, epochs or as a share of the run.

    Args:
      length: epochs as a number or "30e", steps as "500s", a share of `total` as "50%".
      total: steps of the run.
      per_epoch: steps of an epoch.

    Raises:
      ValueError: anything else, or a negative length.

    >>> from jaxdefense.train.optim import steps_of
    >>> [steps_of(length, total=1000, per_epoch=100) for length in (2, "2e", "30s", "50%")]
    [200, 200, 30, 500]
    """
    units = {"e": float(per_epoch), "s": 1.0, "%": total / 100}
    if isinstance(length, bool) or not isinstance(length, int | float | str):
        raise ValueError(
            f"a length is epochs (30 or '30e'), steps ('500s') or a share ('50%'), got {length!r}"
        )
    text = str(length).strip()
    if text[-1:] not in units:
        text += "e"
    try:
        steps = round(float(text[:-1]) * units[text[-1]])
    except (ValueError, OverflowError):
        raise ValueError(
            f"a length is epochs (30 or '30e'), steps ('500s') or a share ('50%'), got {length!r}"
        ) from None
    if steps < 0:
        raise ValueError(f"a length must not be negative, got {length!r}")
    return steps


def _constant(lr: float, total: int, per_epoch: int) -> optax.Schedule:
    return optax.constant_schedule(lr)


def _piecewise(
    lr: float, total: int, per_epoch: int, *, at: Any = ("50%", "75%"), factor: float = 0.1
) -> optax.Schedule:
    steps = [steps_of(length, total=total, per_epoch=per_epoch) for length in at]
    if sorted(set(steps)) != steps:
        raise ValueError(f"piecewise needs increasing lengths, got {list(at)}: steps {steps}")
    return optax.piecewise_constant_schedule(lr, dict.fromkeys(steps, factor))


def _cosine(
    lr: float, total: int, per_epoch: int, *, warmup: float | str = 0, final: float = 0.0
) -> optax.Schedule:
    start = steps_of(warmup, total=total, per_epoch=per_epoch)
    if not start:
        return optax.cosine_decay_schedule(lr, max(total, 1), alpha=final)
    if start >= total:
        raise ValueError(f"warmup of {start} steps leaves nothing of a run of {total}")
    return optax.warmup_cosine_decay_schedule(0.0, lr, start, total, end_value=final * lr)


def _one_cycle(
    lr: float,
    total: int,
    per_epoch: int,
    *,
    peak: float | str = "30%",
    start: float = 0.04,
    final: float = 1e-4,
    shape: str = "cosine",
) -> optax.Schedule:
    shapes = {"cosine": optax.cosine_onecycle_schedule, "linear": optax.linear_onecycle_schedule}
    if shape not in shapes:
        registry.raise_unknown("one_cycle shape", shape, shapes)
    share = steps_of(peak, total=total, per_epoch=per_epoch) / max(total, 1)
    if not 0 < share < 1:
        raise ValueError(f"one_cycle's peak must lie inside the run, got {peak!r} of {total} steps")
    # optax divides the first rate by the cosine's last factor, and the peak by the line's.
    last = {"final_div_factor": start / final}
    if shape == "linear":
        last = {"final_div_factor": 1 / final, "pct_final": 1.0}
    return shapes[shape](max(total, 1), lr, pct_start=share, div_factor=1 / start, **last)


def _exponential(
    lr: float, total: int, per_epoch: int, *, factor: float = 0.95, every: float | str = 1
) -> optax.Schedule:
    steps = steps_of(every, total=total, per_epoch=per_epoch)
    return optax.exponential_decay(lr, max(steps, 1), factor, staircase=True)


_SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "exponential": _exponential,
    "one_cycle": _one_cycle,
    "piecewise": _piecewise,
}


def _call(kind: str, table: Mapping[str, Callable], spec: Mapping[str, Any], *inputs: Any) -> Any:
    """Calls the entry of `table` that spec["name"] names, with the rest of `spec` as options.

    Args:
      kind: what the table holds, for messages.
      table: functions by name.
      spec: "name" and options.
      *inputs: first arguments of the function.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in table:
        registry.raise_unknown(kind, name, table)
    known = [p.name for p in inspect.signature(table[name]).parameters.values()][len(inputs) :]
    registry.check_known(f"option of {kind} {name}", options, known)
    validate.check_types(f"{kind} {name}", options, validate.declared(table[name]))
    for option in ("momentum", "b1", "b2"):
        if not 0 <= options.get(option, 0) < 1:
            raise ValueError(f"{kind} {name}.{option} must be in [0, 1), got {options[option]!r}")
    positive = ("start", "factor", "eps", *(["final"] if name == "one_cycle" else []))
    rates = {key: value for key, value in options.items() if key in positive}
    validate.check_positive_numbers(f"{kind} {name}", rates)
    return table[name](*inputs, **options)


def schedule(spec: Mapping[str, Any], lr: float, *, total: int, per_epoch: int) -> optax.Schedule:
    """The schedule of a role's learning rate over its steps.

    Args:
      spec: {"name": one of constant, piecewise (at, factor), cosine (warmup, final), one_cycle
        (peak, start, final, shape: start and final as shares of lr), exponential (factor,
        every)}.
      lr: the largest rate.
      total: steps of the role in the whole run.
      per_epoch: steps of the role in an epoch.

    Raises:
      ValueError: unknown name or option, or lengths out of order.
    """
    return _call("schedule", _SCHEDULES, spec, lr, total, per_epoch)


def _sgd(rate: optax.Schedule, *, momentum: float = 0.0, nesterov: bool = False) -> Any:
    return optax.sgd(rate, momentum or None, nesterov)


def _adam(rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Any:
    return optax.adam(rate, b1, b2, eps)


def _adamw(
    rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    decoupled_decay: float = 1e-2,
) -> Any:
    return optax.adamw(rate, b1, b2, eps, weight_decay=decoupled_decay)


# What every optimiser of a config may have besides its own options.
_COMMON = {
    "schedule": Mapping,
    "weight_decay": float,
    "clip_norm": float | None,
    "decay_kernels_only": bool,
}
_OPTIMIZERS: dict[str, Callable] = {"adam": _adam, "adamw": _adamw, "sgd": _sgd}


def make(spec: Mapping[str, Any], *, total: int, per_epoch: int) -> optax.GradientTransformation:
    """The optimiser of one role.

    Args:
      spec: {"name": sgd (momentum, nesterov), adam (b1, b2, eps) or adamw (and
        decoupled_decay), "lr": rate, "schedule": see `schedule`, default constant,
        "weight_decay": L2 term added to the gradient before momentum or Adam's moments, as
        torch's optimisers do, on all parameters or, with "decay_kernels_only": True, on arrays
        of two or more axes, "clip_norm": largest global norm of the gradient}.
      total: steps of the role in the whole run.
      per_epoch: steps of the role in an epoch.

    Raises:
      ValueError: unknown names or options, or a rate that is not positive.
    """
    spec = dict(spec)
    lr = spec.pop("lr", None)
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ValueError(f"an optimizer needs a positive lr, got {lr!r}")
    shape = spec.pop("schedule", {"name": "constant"})
    decay, clip = spec.pop("weight_decay", 0.0), spec.pop("clip_norm", None)
    kernels_only = spec.pop("decay_kernels_only", False)
    given = {"schedule": shape, "weight_decay": decay, "clip_norm": clip}
    validate.check_types("optimizer", {**given, "decay_kernels_only": kernels_only}, _COMMON)
    if decay < 0 or (clip or 0) < 0:
        raise ValueError(
            f"an optimizer's weight_decay and clip_norm must not be negative, got {decay!r} and "
            f"{clip!r}"
        )
    rate = schedule(shape, lr, total=total, per_epoch=per_epoch)
    chain = []
    if clip:
        chain.append(optax.clip_by_global_norm(clip))
    if decay:
        mask = (lambda params: jax.tree.map(lambda w: w.ndim > 1, params)) if kernels_only else None
        chain.append(optax.add_decayed_weights(decay, mask))
    return optax.chain(*chain, _call("optimizer", _OPTIMIZERS, spec, rate))
