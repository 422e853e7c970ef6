"""Robust accuracy as a function of eps: at a grid of eps, or from each example's distance."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense.attacks.method import Method, run_attack
from jaxdefense.evaluation.checks import check_attack
from jaxdefense.evaluation.evaluator import Evaluator, attack_keys
from jaxdefense.types import Attack, PyTree, Threat


def survival_over_eps(
    evaluator: Evaluator,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    eps: Sequence[float],
    attack: Callable[[Threat], Attack],
    *,
    ids: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Whether each example survives an attack at each eps, in one compiled program.

    Every pair of an example and an eps is a row of a batch, with its own eps.

    Args:
      evaluator: of the classifier.
      variables: its weights.
      images: (N, H, W, C).
      labels: (N,).
      eps: radii; 0 gives the clean accuracy.
      attack: makes the attack of a threat whose eps is one per example, e.g.
        `lambda threat: attacks.pgd(threat, steps=40)`.
      ids: (N,) integers, the examples' names in the random keys; default their positions.
      seed: of the attack; the same noise is drawn at every eps.

    Returns:
      (len(eps), N) bool.

    Raises:
      ValueError: bad images, labels or eps.

    >>> import numpy as np
    >>> from jaxdefense import attacks, threat
    >>> from jaxdefense.evaluation import Evaluator, curves
    >>> evaluator = Evaluator(lambda _, x: x.reshape(len(x), 2), threat.Linf(0.1))
    >>> images, labels = np.full((4, 1, 2, 1), [[0.9], [0.3]]), np.zeros(4, int)
    >>> pgd = lambda ball: attacks.pgd(ball, steps=3)
    >>> eps = [0.0, 0.2, 0.4]
    >>> curves.survival_over_eps(evaluator, (), images, labels, eps, pgd).sum(1).tolist()
    [4, 4, 0]
    """
    images = evaluator.check_images(images)
    check_attack("curve", attack(evaluator.threat), evaluator.threat, len(images))
    n = len(images)
    ids = np.arange(n) if ids is None else np.asarray(ids)
    radii = np.asarray(eps, np.float32)
    for radius in radii:
        dataclasses.replace(evaluator.threat, eps=float(radius))  # its checks
    variables = evaluator.replicate(variables)
    right = evaluator.check_model(variables, images, labels).argmax(-1) == labels
    survives = np.tile(right, (len(radii), 1))
    pairs = np.flatnonzero(survives)  # row eps_index * n + example

    def run(variables, data, x, y, e):
        made = attack(dataclasses.replace(evaluator.threat, eps=e))
        keys = jax.random.wrap_key_data(data)
        predict = functools.partial(evaluator.fast_apply, variables)
        return jnp.argmax(predict(run_attack(made, predict, keys, x, y)), -1) == y

    data = np.asarray(jax.random.key_data(attack_keys(seed, "curve", ids)))
    for pack in evaluator.split_rows(pairs):
        at, row = np.divmod(pack, n)
        arrays = (data[row], images[row], labels[row], radii[at])
        survives[at, row] = evaluator.dispatch(("curve", attack), run, variables, *arrays)
    return survives


def curve_from_distances(distances: np.ndarray, eps: Sequence[float]) -> np.ndarray:
    """Robust accuracy at each eps: the share of examples whose distance exceeds it.

    One run of a minimal-norm attack (`minimal_distances`) gives the whole curve.

    Args:
      distances: (N,) distances to the nearest adversarial image found, 0 where the example is
        misclassified, infinite where none was found.
      eps: radii.

    Returns:
      (len(eps),) in [0, 1].

    >>> import numpy as np
    >>> from jaxdefense.evaluation import curves
    >>> curves.curve_from_distances(np.array([0.0, 0.1, 0.3, np.inf]), [0.0, 0.1, 0.2]).tolist()
    [0.75, 0.5, 0.5]
    """
    return np.asarray([(np.asarray(distances) > radius).mean() for radius in eps])


def minimal_distances(
    evaluator: Evaluator,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    attack: Attack,
    *,
    ids: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The distance of each example's nearest adversarial image, in the threat's norm.

    Args:
      evaluator: of the classifier; its threat's norm measures.
      variables: its weights.
      images: (N, H, W, C).
      labels: (N,).
      attack: a minimal-norm attack, e.g. `attacks.fmn(threat, minimal=True)`.
      ids: (N,) integers, the examples' names in the random keys; default their positions.
      seed: of the attack.

    Returns:
      (N,): 0 where the example is misclassified, infinity where nothing was found.

    Raises:
      ValueError: bad images or labels, or an attack of another threat.

    >>> import numpy as np
    >>> from jaxdefense import attacks, threat
    >>> from jaxdefense.evaluation import Evaluator, curves
    >>> ball = threat.Linf(1.0)
    >>> evaluator = Evaluator(lambda _, x: x.reshape(len(x), 2), ball)
    >>> images, labels = np.full((4, 1, 2, 1), [[0.9], [0.3]]), np.array([0, 0, 0, 1])
    >>> attack = attacks.fab(ball, steps=5, minimal=True)
    >>> curves.minimal_distances(evaluator, (), images, labels, attack).round(1).tolist()
    [0.3, 0.3, 0.3, 0.0]
    """
    images = evaluator.check_images(images)
    check_attack("distance", attack, evaluator.threat, len(images), minimal=True)
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    variables = evaluator.replicate(variables)
    right = evaluator.check_model(variables, images, labels).argmax(-1) == labels
    result = np.zeros(len(images))

    options = attack.per_example() if isinstance(attack, Method) else []

    def run(variables, data, x, y, *values):
        predict = functools.partial(evaluator.fast_apply, variables)
        made = attack.with_per_example(iter(values)) if isinstance(attack, Method) else attack
        x_adv = run_attack(made, predict, jax.random.wrap_key_data(data), x, y)
        wrong = jnp.argmax(predict(x_adv), -1) != y
        return jnp.where(wrong, evaluator.threat.distance(x_adv, x), jnp.inf)

    data = np.asarray(jax.random.key_data(attack_keys(seed, "distance", ids)))
    for pack in evaluator.split_rows(np.flatnonzero(right)):
        values = (np.asarray(array)[pack] for array in options)
        arrays = (data[pack], images[pack], labels[pack], *values)
        result[pack] = evaluator.dispatch(("distance", attack), run, variables, *arrays)
    return result
