"""Tools for attacks that know the defence: surrogate gradients, averages, other models."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense.attacks import checks
from jaxdefense.attacks.method import attack_factory, takes_targets
from jaxdefense.attacks.outcome import select_rows, success_margin
from jaxdefense.types import (
    Array,
    Attack,
    Images,
    Key,
    Labels,
    Logits,
    Predict,
    PredictWithKey,
    example_keys,
    fold_in,
)


def _identity(x: Array) -> Array:
    return x


def normalised(
    predict: Predict, mean: float | Sequence[float], std: float | Sequence[float]
) -> Predict:
    """predict((x - mean) / std): a model of normalised images as one of images in [0, 1].

    Attacks and their eps belong to the pixels, so normalisation belongs inside the model.

    Args:
      predict: normalised images (B, H, W, C) -> logits.
      mean: of the pixels, one number or one a channel.
      std: of the pixels, likewise, positive.

    Returns:
      A `Predict` of images in [0, 1].

    Raises:
      ValueError: a std that is not positive, or numbers beyond [0, 1], as for pixels in 0 to 255.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks
    >>> predict = attacks.normalised(lambda x: x.reshape(len(x), -1), 0.5, 0.25)
    >>> predict(jnp.ones((1, 1, 2, 1)))
    Array([[2., 2.]], dtype=float32)
    """
    means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if np.any(stds <= 0) or np.any(stds > 1) or np.any(means < 0) or np.any(means > 1):
        raise ValueError(
            f"mean and std are of pixels in [0, 1], got mean={mean!r}, std={std!r}; divide those "
            f"of pixels in 0 to 255 by 255"
        )
    return lambda x: predict((x - _last_axis(means, x)) / _last_axis(stds, x))


def _last_axis(numbers: np.ndarray, x: Array) -> Array:
    """The numbers, () or (C,), as an array that broadcasts over x's last axis."""
    return jnp.asarray(numbers, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def binary(predict: Callable[[Images], Array]) -> Predict:
    """A model of one logit as one of two classes: label 1 where the logit is positive.

    Args:
      predict: images (B, ...) -> one logit each, (B,) or (B, 1), of class 1.

    Returns:
      A `Predict` with logits (B, 2), (0, z): their softmax is the logit's sigmoid.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks
    >>> attacks.binary(lambda x: x.sum(-1))(jnp.ones((1, 3)))
    Array([[0., 3.]], dtype=float32)
    """

    def two_logits(x: Images) -> Logits:
        logit = predict(x).reshape(x.shape[0])
        return jnp.stack([jnp.zeros_like(logit), logit], -1)

    return two_logits


def bpda(
    forward: Callable[[Array], Array], backward: Callable[[Array], Array] = _identity
) -> Callable[[Array], Array]:
    """Backward-pass differentiable approximation: forward's values, backward's gradients.

    g(x) = forward(x) and dg/dx := dbackward/dx, so an attack passes through a step that has no
    useful gradient: `predict = lambda x: net(bpda(quantise)(x))`.

    Args:
      forward: any function of arrays, of which no gradient is asked.
      backward: a differentiable stand-in with the same shapes; the identity by default.

    Returns:
      The function g.

    Raises:
      ValueError: at the call, the two have different output shapes.

    Reference: Athalye et al., Obfuscated gradients give a false sense of security,
      arXiv 1802.00420, section 4.1.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks
    >>> quantise = attacks.bpda(jnp.round)
    >>> print(quantise(0.75), jax.grad(quantise)(0.75))
    1.0 1.0
    """

    @jax.custom_vjp
    def apply(x):
        return forward(x)

    def forward_rule(x):
        out = forward(x)
        stand_in = jax.eval_shape(backward, x)
        if stand_in.shape != out.shape:
            raise ValueError(
                f"forward returns {out.shape}, backward {stand_in.shape} for {x.shape}: "
                f"give bpda a backward of the same shapes"
            )
        return out, x

    def backward_rule(x, cotangent):
        out, pull = jax.vjp(backward, x)
        return pull(cotangent.astype(out.dtype))

    apply.defvjp(forward_rule, backward_rule)
    return apply


def _fingerprint(image: Array) -> Array:
    """A hash of an image's bits, () uint32."""
    bits = jax.lax.bitcast_convert_type(image.astype(jnp.float32), jnp.uint32).reshape(-1)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    # Knuth's multiplicative hash of each place, made odd.
    weights = (place * np.uint32(2654435761)) | np.uint32(1)
    mixed = bits * weights
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)


def eot(predict: PredictWithKey, key: Key, *, samples: int = 20) -> Predict:
    """Expectation over transformation: the mean logits over a model's own randomness.

    z(x) = 1/n sum_i predict(key_i, x), whose gradient is the mean of the gradients.

    The result is a pure `Predict` for any attack. Each image draws from keys of its own, made of
    `key` and the image's bits: every step of an attack sees new draws, the same image sees the
    same ones, and nothing depends on the rest of the batch.

    Args:
      predict: (key, images (B, ...)) -> logits (B, K), parameters inside; called with B = 1 under
        `vmap`.
      key: one key.
      samples: n, draws for each evaluation.

    Returns:
      A `Predict` that costs `samples` passes.

    Raises:
      ValueError: samples below 1.

    Reference: Athalye et al., Synthesizing robust adversarial examples, arXiv 1707.07397.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks
    >>> noisy = lambda key, x: x + jax.random.normal(key, x.shape)
    >>> predict = attacks.eot(noisy, jax.random.key(0), samples=1000)
    >>> jnp.abs(predict(jnp.zeros((2, 3)))).max() < 0.2  # the noise's mean over 1,000 draws
    Array(True, dtype=bool)
    """
    checks.check_count("samples", samples)

    def one(image: Array) -> Array:
        own = jax.random.fold_in(key, _fingerprint(jax.lax.stop_gradient(image)))
        draws = jax.vmap(lambda k: predict(k, image[None])[0])(jax.random.split(own, samples))
        return jnp.mean(draws, 0)

    return jax.vmap(one)


@attack_factory(flatten_images=False)
def transfer(attack: Attack, sources: Sequence[Predict]) -> Attack:
    """Black-box attack by transfer: `attack` other models, keep what works best on the target.

    Args:
      attack: run against each source with the key `fold_in(key, its number)`. One that does not
        stop early (`apgd(..., early_stop=False)`, `pgd`) transfers better.
      sources: models with their parameters inside.

    Returns:
      An `Attack`: per example the image with the target's largest margin
      max_{k != y} z_k - z_y; the target's gradients are never asked for. It takes targets where
      `attack` does.

    Raises:
      ValueError: no sources.

    Reference: Papernot et al., Transferability in machine learning, arXiv 1605.07277.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.transfer(attacks.pgd(threat.Linf(0.125)), [lambda x: 5 * x + 1])
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    if not sources:
        raise ValueError("transfer needs at least one source model")

    def run(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        keys = example_keys(key, images.shape[0])
        best_x, best = images, jnp.full(images.shape[0], -jnp.inf)
        for n, source in enumerate(sources):
            x_adv = attack(source, fold_in(keys, n), images, labels)
            value = success_margin(predict(x_adv), labels, takes_targets(attack))
            better = value > best
            best_x, best = select_rows(better, x_adv, best_x), jnp.where(better, value, best)
        return best_x

    return run
