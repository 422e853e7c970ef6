"""What an evaluation refuses before it compiles anything: wrong ids, targets, grids and attacks."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdefense.attacks import checks
from jaxdefense.attacks.method import Method
from jaxdefense.types import Attack, HostArray, Images, Threat


def check_ids(ids: HostArray | None, examples: int) -> np.ndarray:
    """Checks the examples' names in the random keys, by default their positions.

    Args:
      ids: (N,) integers or None.
      examples: N.

    Returns:
      (N,) integers.

    Raises:
      ValueError: another length, or no integers.
    """
    if ids is None:
        return np.arange(examples)
    ids = np.asarray(ids)
    if ids.shape != (examples,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be ({examples},) integers, got {ids.shape} of {ids.dtype}")
    return ids


def has_unknown_threat(attack: Attack) -> bool:
    """Whether an attack, or a part of a combination, is a bare function that tells no threat.

    Args:
      attack: any.
    """
    if isinstance(attack, functools.partial):
        return has_unknown_threat(attack.func)
    if not isinstance(attack, Method):
        return True
    if "threat" in attack.arguments:
        return False
    return any(has_unknown_threat(part) for part in attack.combined)


def check_attack_output(name: str, x_adv: Any, images: Images) -> None:
    """Checks that an attack returned floating images of the right shape.

    Args:
      name: of the attack.
      x_adv: what it returned.
      images: (B, ...), what it was given.

    Raises:
      ValueError: another type, shape or dtype.
    """
    got = type(x_adv).__name__
    if hasattr(x_adv, "shape") and hasattr(x_adv, "dtype"):
        if x_adv.shape == images.shape and jnp.issubdtype(x_adv.dtype, jnp.floating):
            return
        got = f"{x_adv.shape} of {x_adv.dtype}"
    raise ValueError(f"attack {name} must return floating images {images.shape}, got {got}")


def check_attack(
    name: str,
    attack: Attack,
    threat: Threat,
    examples: int,
    *,
    targets: bool = False,
    minimal: bool = False,
) -> None:
    """Checks that an attack is of the evaluation's threat and fits the labels or targets.

    Args:
      name: under which it will be reported.
      attack: any `Attack`; of a bare function nothing is known.
      threat: of the evaluation.
      examples: how many there are.
      targets: whether it will be given targets instead of labels.
      minimal: whether it may leave the ball, as with `minimal=True`.

    Raises:
      ValueError: another threat (both are named), labels that would be taken for targets or the
        other way round, an option with a value for each of another number of examples, or one that
        leaves the ball.
    """
    if isinstance(attack, functools.partial):
        return check_attack(name, attack.func, threat, examples, targets=targets, minimal=minimal)
    if not isinstance(attack, Method):
        if jnp.ndim(threat.eps):
            raise ValueError(
                f"attack {name} is a bare function, which cannot be given each example's eps: use "
                f"one of jaxdefense.attacks"
            )
        return None
    if attack.targeted and not targets:
        raise ValueError(
            f"attack {name} is targeted and would take the labels for targets: give targets=, one "
            f"class for each image"
        )
    if targets and not attack.targeted:
        raise ValueError(f"attack {name} is not targeted: make it with targeted=True")
    if "threat" not in attack.arguments:
        for part in attack.combined:
            check_attack(name, part, threat, examples, targets=targets, minimal=minimal)
        return None
    if not _same(attack.arguments["threat"], threat):
        raise ValueError(
            f"attack {name} was made for {attack.threat}, and this evaluation is of {threat}"
        )
    if attack.arguments.get("minimal") and not minimal:
        raise ValueError(
            f"attack {name} has minimal=True and returns images outside the ball: leave that out, "
            f"or measure distances by evaluation.curves.minimal_distances"
        )
    for array in attack.per_example():
        if len(array) != examples:
            raise ValueError(
                f"attack {name} has an option of {len(array)} values for {examples} images"
            )
    return None


def _same(first: Threat, second: Threat) -> bool:
    """Equal norms and boxes, and eps equal to the rounding of float32."""
    if (first.norm, tuple(first.bounds)) != (second.norm, tuple(second.bounds)):
        return False
    one, other = np.asarray(first.eps, np.float64), np.asarray(second.eps, np.float64)
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-6, atol=0)


def check_targets(targets: HostArray, labels: HostArray, num_classes: int) -> np.ndarray:
    """Checks the classes to be reached, none of which may be the label.

    Args:
      targets: (N,) integers.
      labels: (N,) integers.
      num_classes: K.

    Returns:
      (N,) integers.

    Raises:
      ValueError: another shape, out of range, or a target that is the label.
    """
    targets = np.asarray(targets)
    try:
        checks.check_labels(targets, len(labels), num_classes)
    except ValueError as error:
        raise ValueError(str(error).replace("labels", "targets")) from error
    equal = np.flatnonzero(targets == labels)
    if len(equal):
        raise ValueError(
            f"targets are the labels at {equal[:5].tolist()} ({len(equal)} of {len(targets)}): "
            f"give other classes"
        )
    return targets


def check_grid(images: np.ndarray, threat: Threat, levels: int) -> None:
    """Checks that each value is low + k / levels of the box's width (255 levels: 8 bits).

    Args:
      images: (N, ...).
      threat: its bounds are the box.
      levels: steps over the box.

    Raises:
      ValueError: a value off the grid.
    """
    checks.check_count("grid", levels)
    low, high = threat.bounds
    steps = (images.astype(np.float64) - low) / (high - low) * levels
    off = np.abs(steps - np.rint(steps)).max(initial=0)
    if off > 0.01:
        raise ValueError(
            f"grid={levels} needs images in steps of 1/{levels} of {threat.bounds}, as images of "
            f"8 bits are with 255; a value lies {off:.2g} of a step beside"
        )
