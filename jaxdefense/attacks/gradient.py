"""Attacks that follow the gradient: one loop, `maximize`, and the attacks built on it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdefense import losses, registry
from jaxdefense.attacks import checks
from jaxdefense.attacks.method import attack_factory
from jaxdefense.attacks.outcome import attack_loss, zero_non_finite
from jaxdefense.types import (
    Attack,
    Images,
    Key,
    LossFn,
    Objective,
    PerExample,
    Threat,
    example_keys,
    fold_in,
    per_example,
)


def value_and_grad(objective: Objective, x: Images) -> tuple[PerExample, Images]:
    """Each example's objective and its gradient, with 0 for entries that are not finite.

    Args:
      objective: images (B, ...) -> (B,), each example's value of its own image alone.
      x: (B, ...) images.
    """

    def total(z):  # the gradient of the sum holds each example's own
        values = objective(z)
        return jnp.sum(values), values

    grad, values = jax.grad(total, has_aux=True)(x)
    return values, zero_non_finite(grad)


def _better(value: PerExample, than: PerExample, x: Images, y: Images) -> tuple[PerExample, Images]:
    """(value, x) where value > than, else (than, y), example by example."""
    return jnp.maximum(value, than), jnp.where(per_example(value > than, x) > 0, x, y)


def maximize(
    objective: Objective,
    x: Images,
    threat: Threat,
    key: Key,
    *,
    steps: int,
    step_size: float | PerExample,
    random_start: bool = True,
    start: Images | None = None,
    restarts: int = 1,
    best: bool = False,
    decay: float | None = None,
    accumulate: str = "gradient",
) -> Images:
    """Projected steepest ascent of any per-example objective over a threat's set.

    x_0 = x or a random point; x_{t+1} = project(x_t + ascent(g_t)) with g_t the gradient, or its
    running sum (`decay`). Only input gradients are taken.

    Args:
      objective: images (B, ...) -> (B,). TRADES' KL, a contrastive or a margin loss are
        objectives, not new loops.
      x: (B, ...) images inside the threat's bounds, the centres of the balls.
      threat: the set.
      key: one key, or one per example.
      steps: gradient steps, 0 or more.
      step_size: length of a step in the threat's norm, image units, () or (B,).
      random_start: start at a uniform point of the ball instead of x.
      start: (B, ...) start there (projected) instead; such a start is the same for all restarts.
      restarts: independent runs; the one that ends with the largest objective is kept.
      best: keep each run's iterate of the largest objective instead of its last.
      decay: momentum (MI-FGSM's mu); None for none.
      accumulate: what momentum sums: 'gradient' (over its L1 norm) or 'direction' (the unit
        step of the threat's norm).

    Returns:
      (B, ...) images inside ball and box, without gradient to `x`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks, threat
    >>> x = jnp.array([[0.625, 0.5, 0.25]])
    >>> ball, first_pixel = threat.Linf(0.125), lambda z: z[:, 0]
    >>> key, options = jax.random.key(0), dict(steps=3, step_size=0.0625, random_start=False)
    >>> attacks.maximize(first_pixel, x, ball, key, **options)
    Array([[0.75, 0.5 , 0.25]], dtype=float32)
    """
    x = jax.lax.stop_gradient(x)
    keys = example_keys(key, x.shape[0])
    lowest = jnp.full(x.shape[0], -jnp.inf)

    def direction(grad: Images, memory: Images, x_adv: Images) -> Images:
        kept = (decay or 0.0) * memory
        if accumulate == "direction":
            return kept + threat.ascent(grad, x_adv, 1.0)
        size = jnp.sum(jnp.abs(grad), range(1, x.ndim))
        return kept + grad / per_example(jnp.where(size > 0, size, 1), x)

    def run(restart: Any) -> tuple[Images, PerExample]:
        if start is not None:
            first = threat.project(jax.lax.stop_gradient(start), x)
        elif random_start:
            first = threat.project(threat.sample(fold_in(keys, restart), x), x)
        else:
            first = x

        def step(_: Any, carry: Any) -> Any:
            x_adv, memory, best_x, best_value = carry
            value, grad = value_and_grad(objective, x_adv)
            if best:
                best_value, best_x = _better(value, best_value, x_adv, best_x)
            if decay is not None:
                grad = memory = direction(grad, memory, x_adv)
            x_adv = threat.project(x_adv + threat.ascent(grad, x_adv, step_size), x)
            return x_adv, memory, best_x, best_value

        # What is not needed is empty in the carry, so that XLA keeps no copies of it.
        none = jnp.zeros((0,))
        memory = jnp.zeros_like(x) if decay is not None else none
        kept = (first, lowest) if best else (none, none)
        x_adv, _, best_x, best_value = jax.lax.fori_loop(0, steps, step, (first, memory, *kept))
        if not best and restarts == 1:
            return x_adv, lowest
        value = objective(x_adv).astype(lowest.dtype)
        if best:
            value, x_adv = _better(value, best_value, x_adv, best_x)
        return x_adv, value

    def again(restart: Any, carry: Any) -> Any:
        kept_x, kept_value = carry
        x_adv, value = run(restart)
        kept_value, kept_x = _better(value, kept_value, x_adv, kept_x)
        return kept_x, kept_value

    result = run(0)
    if restarts > 1:
        result = jax.lax.fori_loop(1, restarts, again, result)
    return jax.lax.stop_gradient(result[0])


def _ascent_attack(
    threat: Threat,
    steps: int,
    step_size: Any,
    loss: LossFn | str,
    targeted: bool,
    *,
    length: float,
    restarts: int = 1,
    **options: Any,
) -> Attack:
    """`maximize` on a loss of the logits; the default step size is length * eps / steps."""
    checks.check_count("steps", steps)
    checks.check_count("restarts", restarts)
    checks.check_step("step_size", step_size)
    if step_size is None:
        step_size = length * threat.eps / steps
    loss = attack_loss(loss)
    sign = -1.0 if targeted else 1.0

    def attack(predict, key, images, labels):
        def objective(x):
            return sign * loss(predict(x), labels)

        return maximize(
            objective,
            images,
            threat,
            key,
            steps=steps,
            step_size=step_size,
            restarts=restarts,
            **options,
        )

    return attack


@attack_factory()
def pgd(
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | PerExample | None = None,
    loss: LossFn | str = losses.cross_entropy,
    random_start: bool = True,
    restarts: int = 1,
    best: bool = False,
    targeted: bool = False,
) -> Attack:
    """Projected gradient descent (ascent on the loss).

    Args:
      threat: norm, eps, bounds.
      steps: gradient steps.
      step_size: image units; default 2.5 eps / steps (Madry et al.'s rule).
      loss: any (logits, labels) -> (B,), or the name of one of `losses`; the cross-entropy in the
        form that does not saturate, `losses.log_odds`.
      random_start: start at a uniform point of the ball.
      restarts: the run with the largest final loss is kept, per example.
      best: keep the iterate of the largest loss instead of the last.
      targeted: labels are targets, and the loss is lowered.

    Returns:
      An `Attack`.

    Raises:
      ValueError: counts or step sizes out of range; at the call, bad images, labels or keys.

    Reference: Madry et al., Towards deep learning models resistant to adversarial attacks,
      arXiv 1706.06083.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.pgd(threat.Linf(0.125), steps=20)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    options: dict[str, Any] = dict(random_start=random_start, restarts=restarts, best=best)
    return _ascent_attack(threat, steps, step_size, loss, targeted, length=2.5, **options)


@attack_factory()
def bim(
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | PerExample | None = None,
    loss: LossFn | str = losses.cross_entropy,
    targeted: bool = False,
) -> Attack:
    """Basic iterative method: PGD from the image itself; default step eps / steps.

    Args:
      threat: norm, eps, bounds.
      steps: gradient steps.
      step_size: image units; default eps / steps.
      loss: see `pgd`.
      targeted: see `pgd`.

    Reference: Kurakin et al., Adversarial examples in the physical world, arXiv 1607.02533.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.bim(threat.Linf(0.125), steps=2)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    Array([[0.5  , 0.625, 0.375]], dtype=float32)
    """
    return _ascent_attack(threat, steps, step_size, loss, targeted, length=1.0, random_start=False)


@attack_factory()
def fgsm(
    threat: Threat,
    *,
    step_size: float | PerExample | None = None,
    loss: LossFn | str = losses.cross_entropy,
    random_start: bool = False,
    targeted: bool = False,
) -> Attack:
    """Fast gradient sign method: one step of length eps (in L2, L1: the steepest of that length).

    With `random_start=True, step_size=1.25 * eps` it is the attack of fast adversarial training
    (Wong et al., arXiv 2001.03994).

    Args:
      threat: norm, eps, bounds.
      step_size: image units; default eps.
      loss: see `pgd`.
      random_start: see `pgd`.
      targeted: see `pgd`.

    Reference: Goodfellow et al., Explaining and harnessing adversarial examples, arXiv 1412.6572.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.fgsm(threat.Linf(0.125))
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    Array([[0.5  , 0.625, 0.375]], dtype=float32)
    """
    return _ascent_attack(
        threat, 1, step_size, loss, targeted, length=1.0, random_start=random_start
    )


@attack_factory()
def mi_fgsm(
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | PerExample | None = None,
    decay: float = 1.0,
    accumulate: str = "gradient",
    loss: LossFn | str = losses.cross_entropy,
    random_start: bool = False,
    targeted: bool = False,
) -> Attack:
    """Momentum iterative FGSM: m <- decay m + g / ||g||_1, a step along m; default eps / steps.

    Args:
      threat: norm, eps, bounds.
      steps: gradient steps.
      step_size: image units; default eps / steps.
      decay: mu.
      accumulate: 'gradient' is the paper's sum; 'direction' sums the steps' unit directions
        (sign g in L_inf), which is what Foolbox 3 does.
      loss: see `pgd`.
      random_start: see `pgd`.
      targeted: see `pgd`.

    Reference: Dong et al., Boosting adversarial attacks with momentum, arXiv 1710.06081, eq. 6-7.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.mi_fgsm(threat.Linf(0.125), steps=2)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    Array([[0.5  , 0.625, 0.375]], dtype=float32)
    """
    if accumulate not in ("gradient", "direction"):
        registry.raise_unknown("accumulate", accumulate, ("gradient", "direction"))
    checks.check_step("decay", decay)
    options: dict[str, Any] = dict(random_start=random_start, decay=decay, accumulate=accumulate)
    return _ascent_attack(threat, steps, step_size, loss, targeted, length=1.0, **options)
