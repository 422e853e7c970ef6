"""Losses of arrays: logits (B, K) in, one number per example (B,) out, float32.

Only the train step takes a mean. `labels` are (B,) integers; a loss that also takes soft targets
says so. All are safe under half-precision logits: the arithmetic is float32.
"""

import jax
import jax.numpy as jnp
import optax

from jaxdefense import registry
from jaxdefense.types import Array, Labels, Logits, LossFn, PerExample


def _float32(logits: Logits) -> Logits:
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating, got {logits.dtype}")
    if logits.ndim != 2:
        raise ValueError(f"logits must be (B, K), got {logits.shape}")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _pick(logits: Logits, labels: Labels) -> PerExample:
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def _runner_up(logits: Logits, labels: Labels) -> PerExample:
    """The largest logit of the other classes."""
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(own, -jnp.inf, logits), -1)


def one_hot(labels: Labels, num_classes: int, *, smoothing: float = 0.0) -> Array:
    """Targets (B, K): 1 - smoothing on the label, the rest spread over all K classes."""
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return hot * (1 - smoothing) + smoothing / num_classes


def cross_entropy(logits: Logits, targets: Array) -> PerExample:
    """-sum_k t_k log softmax(logits)_k.

    Args:
      logits: (B, K).
      targets: (B,) integer labels, or (B, K) probabilities.

    Returns:
      (B,).
    """
    logits = _float32(logits)
    if targets.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return optax.softmax_cross_entropy(logits, targets)


def kl(p_logits: Logits, q_logits: Logits) -> PerExample:
    """KL(softmax(p) || softmax(q)) summed over the classes, (B,).

    torch's `KLDivLoss(reduction='batchmean')` is the mean of this; its elementwise mean is this
    over K, which makes a weight depend on the number of classes: no loss here does that.
    """
    p = jax.nn.log_softmax(_float32(p_logits))
    q = jax.nn.log_softmax(_float32(q_logits))
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def margin(logits: Logits, labels: Labels) -> PerExample:
    """max_{k != y} z_k - z_y: positive exactly where the prediction is wrong (Carlini, Wagner).

    Reference: Towards Evaluating the Robustness of Neural Networks, arXiv 1608.04644, f_6.
    """
    logits = _float32(logits)
    return _runner_up(logits, labels) - _pick(logits, labels)


def dlr(logits: Logits, labels: Labels) -> PerExample:
    """Difference of logits ratio, -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)).

    Shift and scale of the logits cancel, so saturated softmaxes give no zero gradient.

    Raises:
      ValueError: fewer than 3 classes, for which the ratio is not defined.

    Reference: Croce, Hein, Reliable evaluation of adversarial robustness, arXiv 2003.01690, eq. 6.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"dlr needs 3 classes or more, got {logits.shape[-1]}; use margin")
    logits = _float32(logits)
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2): the targeted form of `dlr`.

    Raises:
      ValueError: fewer than 4 classes.

    Reference: Croce, Hein, arXiv 2003.01690, eq. 7.
    """
    if logits.shape[-1] < 4:
        raise ValueError(f"dlr_targeted needs 4 classes or more, got {logits.shape[-1]}")
    logits = _float32(logits)
    top = jax.lax.top_k(logits, 4)[0]
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12
    return (_pick(logits, targets) - _pick(logits, labels)) / scale


_NAMED: dict[str, LossFn] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def make(name: str) -> LossFn:
    """The attack loss of a config by its name."""
    if name not in _NAMED:
        registry.unknown("loss", name, _NAMED)
    return _NAMED[name]
