"""Tools for attacks that know the defence: surrogate gradients, averages, other models."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import losses
from jaxdefense.attacks import checks
from jaxdefense.attacks.outcome import pick
from jaxdefense.types import (
    Array,
    Attack,
    Images,
    Key,
    Labels,
    Logits,
    Predict,
    example_keys,
    fold_in,
)

PredictWithKey = Callable[[Key, Images], Logits]


def _identity(x: Array) -> Array:
    return x


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
    """

    @jax.custom_vjp
    def apply(x):
        return forward(x)

    def ahead(x):
        out = forward(x)
        stand_in = jax.eval_shape(backward, x)
        if stand_in.shape != out.shape:
            raise ValueError(
                f"forward returns {out.shape}, backward {stand_in.shape} for {x.shape}: "
                f"give bpda a backward of the same shapes"
            )
        return out, x

    def back(x, cotangent):
        out, pull = jax.vjp(backward, x)
        return pull(cotangent.astype(out.dtype))

    apply.defvjp(ahead, back)
    return apply


def _fingerprint(image: Array) -> Array:
    """A number of an image's bits: different images get different draws."""
    bits = jax.lax.bitcast_convert_type(image.astype(jnp.float32), jnp.uint32).reshape(-1)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    # Odd factors that look random: Knuth's multiplicative hash of the place.
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
    """
    checks.check_count("samples", samples)

    def one(image: Array) -> Array:
        own = jax.random.fold_in(key, _fingerprint(jax.lax.stop_gradient(image)))
        draws = jax.vmap(lambda k: predict(k, image[None])[0])(jax.random.split(own, samples))
        return jnp.mean(draws, 0)

    return jax.vmap(one)


def transfer(attack: Attack, sources: Sequence[Predict]) -> Attack:
    """Black box by transfer: `attack` against other models, the worst of them for the target.

    Args:
      attack: run against each source with the key `fold_in(key, its number)`. One that does not
        stop early (`apgd(..., early_stop=False)`, `pgd`) transfers better.
      sources: models with their parameters inside.

    Returns:
      An `Attack`: per example the image with the target's largest margin
      max_{k != y} z_k - z_y; the target's gradients are never asked for.

    Raises:
      ValueError: no sources.

    Reference: Papernot et al., Transferability in machine learning, arXiv 1605.07277.
    """
    if not sources:
        raise ValueError("transfer needs at least one source model")

    def run(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        keys = example_keys(key, images.shape[0])
        best_x, best = images, jnp.full(images.shape[0], -jnp.inf)
        for n, source in enumerate(sources):
            x_adv = attack(source, fold_in(keys, n), images, labels)
            value = losses.margin(predict(x_adv), labels)
            better = value > best
            best_x, best = pick(better, x_adv, best_x), jnp.where(better, value, best)
        return best_x

    return run
