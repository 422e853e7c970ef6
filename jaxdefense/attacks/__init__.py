"""Attacks: factories with keyword-only hyper-parameters that return pure functions.

    attack = attacks.pgd(threat.Linf(8 / 255), steps=10)
    x_adv = attack(predict, key, images, labels)         # inside your own jit, or eagerly

    fast = attacks.jitted(attack, apply)                 # apply(variables, images) -> logits
    x_adv = fast(variables, key, images, labels)         # compiled once for all weights

What a factory returns is a `Method`: callable, frozen, and it knows its name, threat and options.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdefense import registry
from jaxdefense.attacks import checks
from jaxdefense.attacks.adaptive import binary, bpda, eot, normalised, transfer
from jaxdefense.attacks.apgd import apgd, apgd_targeted
from jaxdefense.attacks.ensemble import autoattack, worst_case
from jaxdefense.attacks.fab import fab, fab_targeted
from jaxdefense.attacks.gradient import bim, fgsm, maximize, mi_fgsm, pgd
from jaxdefense.attacks.method import Method, run_attack
from jaxdefense.attacks.minimal import cw, ddn, deepfool, fmn
from jaxdefense.attacks.outcome import FewClassesWarning, fooled
from jaxdefense.attacks.square import square
from jaxdefense.types import Attack, Images, Key, Labels, Logits, PyTree, Threat, partition

_FACTORIES: dict[str, Callable[..., Method]] = {
    factory.__name__: factory
    for factory in (
        apgd,
        apgd_targeted,
        autoattack,
        bim,
        cw,
        ddn,
        deepfool,
        fab,
        fab_targeted,
        fgsm,
        fmn,
        mi_fgsm,
        pgd,
        square,
    )
}

__all__ = [
    "FewClassesWarning",
    "Method",
    "apgd",
    "apgd_targeted",
    "autoattack",
    "bim",
    "binary",
    "bpda",
    "cw",
    "ddn",
    "deepfool",
    "eot",
    "fab",
    "fab_targeted",
    "fgsm",
    "fmn",
    "fooled",
    "jitted",
    "make",
    "maximize",
    "mi_fgsm",
    "names",
    "normalised",
    "pgd",
    "square",
    "transfer",
    "worst_case",
]


def names() -> list[str]:
    """The attacks that `make` knows.

    >>> from jaxdefense import attacks
    >>> attacks.names()[:3]
    ['apgd', 'apgd_targeted', 'autoattack']
    """
    return sorted(_FACTORIES)


def make(name: str, threat: Threat, **options: Any) -> Method:
    """The attack of that name with these options, as a config gives them.

    Args:
      name: one of `names()`.
      threat: norm, eps, bounds.
      **options: the factory's keyword arguments.

    Raises:
      ValueError: unknown attack or option.

    >>> from jaxdefense import attacks, threat
    >>> attacks.make("pgd", threat.Linf(0.125), steps=20)
    pgd(Linf(eps=0.125, bounds=(0.0, 1.0)), steps=20)
    """
    if name not in _FACTORIES:
        registry.raise_unknown("attack", name, _FACTORIES)
    factory = _FACTORIES[name]
    known = list(inspect.signature(factory).parameters)[1:]
    registry.check_known(f"option of attack {name}", options, known)
    return factory(threat, **options)


def jitted(
    attack: Attack,
    apply: Callable[[PyTree, Images], Logits],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[PyTree, Key, Images, Labels], Images]:
    """Compiles `attack` once for all weights, which are arguments of the program.

    Args:
      attack: any `Attack`.
      apply: (variables, images) -> logits, eval mode; of an attack with `samples`, (variables, key,
        images) -> logits.
      devices: share each batch whose size their number divides; by default, and for other
        batches, the attack runs where the arrays are. On the CPU each core can be a device
        (`jax_num_cpu_devices`).

    Returns:
      (variables, key, images, labels) -> images; one compilation per shape of images. `variables`
      is any pytree; leaves that are not arrays (an Equinox module's functions) are compiled in.
      Bad images, labels and keys raise a ValueError at each call before compilation; an `apply`
      that returns probabilities or NaN does at the first call.

    Raises:
      ValueError: `apply` is a Flax module, or takes no variables.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.jitted(attacks.fgsm(threat.Linf(0.125)), lambda weights, x: x @ weights)
    >>> x, labels = jnp.array([[0.625, 0.5, 0.25]]), jnp.array([0])
    >>> attack(10 * jnp.eye(3), jax.random.key(0), x, labels)
    Array([[0.5  , 0.625, 0.375]], dtype=float32)
    """
    threat, keyed = getattr(attack, "threat", None), getattr(attack, "samples", None) is not None
    bounds = None if threat is None else threat.bounds
    inputs = ("key", "images") if keyed else ("images",)
    way = f"lambda _, {', '.join(inputs)}: f({', '.join(inputs)})"
    way = f"variables come first; without any give {way}, and () for the variables"
    checks.check_takes("apply", apply, inputs, variables=True, way=way)

    @functools.partial(jax.jit, static_argnums=0)
    def run(rest, variables, key, images, labels):
        predict = functools.partial(apply, rest.join(variables))
        return run_attack(attack, predict, key, images, labels)

    @functools.partial(jax.jit, static_argnums=0)
    def forward(rest, variables, *given):
        return apply(rest.join(variables), *given)

    if devices is not None:
        mesh = Mesh(np.asarray(devices), ("examples",))
        whole = NamedSharding(mesh, PartitionSpec())
        split = NamedSharding(mesh, PartitionSpec("examples"))

    classes: dict[tuple[int, ...], int] = {}  # by shape of images

    def call(variables: PyTree, key: Key, images: Images, labels: Labels) -> Images:
        if checks.is_key(variables) and not checks.is_key(key):
            raise ValueError(
                "the key is where the variables belong: give (variables, key, images, labels)"
            )
        images, labels = jnp.asarray(images), jnp.asarray(labels)
        arrays, rest = partition(variables)
        if not isinstance(images, jax.core.Tracer):
            images = checks.check_images(images, bounds)
            checks.check_label_count(labels, images.shape[0])
            if images.shape not in classes:
                given = (key, images) if keyed else (images,)
                checks.count_classes(functools.partial(apply, variables), images, keyed=keyed)
                logits = forward(rest, arrays, *given)
                checks.check_logits(logits, images.shape[0])
                classes[images.shape] = logits.shape[1]
            checks.check_labels(labels, images.shape[0], classes[images.shape])
            if devices is not None and images.shape[0] % len(devices) == 0:
                images, labels = jax.device_put((images, labels), split)
                arrays, key = jax.device_put((arrays, key), whole)
        return run(rest, arrays, key, images, labels)

    return call
