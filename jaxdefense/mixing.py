"""Masks, mixtures and the soft labels that go with them: pure functions of keys and arrays.

Each example has draws of its own. `key` is one typed key or one per example. Shares and weights are
(B,) floats in [0, 1], masks (B, H, W, 1) of zeros and ones, targets (B, K) probabilities.
"""

import math

import jax
import jax.numpy as jnp

from jaxdefense.types import Array, Images, Key, PerExample, example_keys, per_example


def weights(key: Key, batch: int, *, alpha: float = 1.0, per_sample: bool = True) -> PerExample:
    """A mixture's weights, Beta(alpha, alpha).

    Args:
      key: one key, or one per example.
      batch: B.
      alpha: 1 is uniform; small ones favour the ends 0 and 1.
      per_sample: one draw per example; else one for the whole batch, repeated.

    Returns:
      (B,).

    Raises:
      ValueError: `alpha` is not positive, or `key` is no typed key.

    Reference: Zhang et al., mixup: Beyond empirical risk minimization, arXiv 1710.09412.

    >>> import jax
    >>> from jaxdefense import mixing
    >>> mixing.weights(jax.random.key(0), 8, alpha=0.2).shape
    (8,)
    """
    check_positive("alpha", alpha)
    return jax.vmap(lambda k: _beta(k, alpha))(_keys(key, batch, per_sample))


def box_mask(key: Key, images: Images, *, alpha: float = 1.0, per_sample: bool = True) -> Array:
    """1 inside a random box, 0 outside: CutMix's box, cut to the image.

    The sides are floor(H sqrt(1 - u)) and floor(W sqrt(1 - u)) with u ~ Beta(alpha, alpha), the
    centre is a uniform pixel, and the box goes side // 2 to each direction, so that sides of 0
    and 1 are empty: with alpha = 1 one box in (min(H, W) / 2)^2. Cutting takes from the area:
    at 32x32 it is .30 in the mean, not .5.

    Args:
      key: one key, or one per example.
      images: (B, H, W, C), for their shape and dtype.
      alpha: of the Beta law.
      per_sample: a box per example; else one for the whole batch.

    Returns:
      (B, H, W, 1) of the images' dtype; the mean over an example's mask is its box's true area.

    Raises:
      ValueError: `alpha` is not positive.

    Reference: Yun et al., CutMix, arXiv 1905.04899 (the authors' rule for the box).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import mixing
    >>> mask = mixing.box_mask(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    >>> mask.shape, jnp.unique(mask)
    ((2, 32, 32, 1), Array([0., 1.], dtype=float32))
    """
    check_positive("alpha", alpha)
    batch, height, width, _ = images.shape

    def box(key: Key) -> Array:
        k_share, k_row, k_column = jax.random.split(key, 3)
        share = jnp.sqrt(1 - _beta(k_share, alpha))

        def inside(key: Key, size: int) -> Array:
            half = jnp.floor(size * share).astype(jnp.int32) // 2
            distance = jnp.arange(size) - jax.random.randint(key, (), 0, size)
            return (-half <= distance) & (distance < half)

        return inside(k_row, height)[:, None] & inside(k_column, width)[None, :]

    return jax.vmap(box)(_keys(key, batch, per_sample))[..., None].astype(images.dtype)


def area(mask: Array) -> PerExample:
    """The share of the image that the mask covers, (B,).

    Args:
      mask: (B, H, W, 1).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import mixing
    >>> mixing.area(jnp.zeros((1, 4, 4, 1)).at[:, :2, :2].set(1))
    Array([0.25], dtype=float32)
    """
    return jnp.mean(mask, range(1, mask.ndim))


def perturb(
    x: Images, x_adv: Images, strength: float | Array, bounds: tuple[float, float]
) -> Images:
    """clip(x + strength (x_adv - x)): part of a perturbation, or more than all of it.

    Args:
      x: (B, H, W, C).
      x_adv: (B, H, W, C).
      strength: a number, or an array that broadcasts against x, such as a mask: 1 gives x_adv, 0
        gives x, 2 AVmixup's vertex.
      bounds: (low, high) of valid images.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import mixing
    >>> x, x_adv = jnp.array([[0.5, 0.75]]), jnp.array([[0.625, 1.0]])
    >>> mixing.perturb(x, x_adv, 2.0, (0.0, 1.0))
    Array([[0.75, 1.  ]], dtype=float32)
    """
    return jnp.clip(x + strength * (x_adv - x), *bounds)


def mix(weight: PerExample, first: Array, second: Array) -> Array:
    """weight first + (1 - weight) second, for images (B, H, W, C) as for targets (B, K).

    Args:
      weight: (B,) in [0, 1], the share of `first`.
      first: (B, ...).
      second: (B, ...).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import mixing
    >>> mixing.mix(jnp.array([0.25]), jnp.ones((1, 2)), jnp.zeros((1, 2)))
    Array([[0.25, 0.25]], dtype=float32)
    """
    weight = per_example(weight, first)
    return weight * first + (1 - weight) * second


def smooth(targets: Array, share: float | PerExample) -> Array:
    """LS(t, q) = q t + (1 - q) (1 - t) / (K - 1): of one-hot t, q stays on the class.

    The rest is spread over the K - 1 other classes. (`losses.one_hot(smoothing=...)` spreads over
    all K.) q = 1 changes nothing and q = 1/K gives uniform targets.

    Args:
      targets: (B, K) probabilities.
      share: q, () or (B,), in [0, 1].

    Returns:
      (B, K) probabilities.

    Raises:
      ValueError: a number outside [0, 1]; an array, which may be traced, is not looked at.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import mixing
    >>> mixing.smooth(jnp.array([[1.0, 0.0, 0.0]]), 0.5)
    Array([[0.5 , 0.25, 0.25]], dtype=float32)
    """
    if isinstance(share, int | float):
        check_share("share", share)
    q = per_example(share, targets)
    return q * targets + (1 - q) * (1 - targets) / (targets.shape[-1] - 1)


def soften(targets: Array, strength: PerExample, l1: float, l2: float) -> Array:
    """(1 - s) LS(t, l1) + s LS(t, l2): targets of images that carry a share s of a perturbation.

    Args:
      targets: (B, K) probabilities.
      strength: s, (B,) in [0, 1].
      l1: what the true class keeps at s = 0.
      l2: what the true class keeps at s = 1.

    Returns:
      (B, K) probabilities.

    Reference: Lee et al., Adversarial vertex mixup, arXiv 2003.02484.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import mixing
    >>> clean = jnp.array([[1.0, 0.0, 0.0]])
    >>> mixing.soften(clean, jnp.array([0.5]), l1=1.0, l2=0.5)
    Array([[0.75 , 0.125, 0.125]], dtype=float32)
    """
    return smooth(targets, (1 - strength) * l1 + strength * l2)  # LS is linear in its share


def check_positive(name: str, value: float) -> None:
    """Checks that an option is a positive finite number.

    Args:
      name: of the argument, for the message.
      value: of the argument.

    Raises:
      ValueError: otherwise.

    >>> from jaxdefense import mixing
    >>> mixing.check_positive("alpha", 0.0)
    Traceback (most recent call last):
    ValueError: alpha must be positive and finite, got 0.0
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_share(name: str, value: float) -> None:
    """Checks that an option is a number in [0, 1].

    Args:
      name: of the argument, for the message.
      value: of the argument.

    Raises:
      ValueError: otherwise.

    >>> from jaxdefense import mixing
    >>> mixing.check_share("beta", 1.5)
    Traceback (most recent call last):
    ValueError: beta must be in [0, 1], got 1.5
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def _keys(key: Key, batch: int, per_sample: bool) -> Key:
    """One key per example, or the first example's for all."""
    keys = example_keys(key, batch)
    return keys if per_sample else jnp.broadcast_to(keys[:1], keys.shape)


def _beta(key: Key, alpha: float) -> Array:
    """One draw of Beta(alpha, alpha), ()."""
    if alpha == 1:  # uniform, without the rejection sampling of two Gammas
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)
