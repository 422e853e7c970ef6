"""Losses of arrays: logits (B, K) in, one number per example (B,) out, float32.

Only the train step takes a mean over the batch. `labels` are (B,) integers; a loss that also takes
soft targets says so. Logits may be in half precision: the arithmetic is float32.
"""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdefense import mixing, registry
from jaxdefense.types import Array, Labels, Logits, LossFn, PerExample


def _checked_float32(logits: Logits, labels: Labels | None = None) -> Logits:
    """The logits in float32 or wider; raises unless they are floating and (B, K), labels (B,)."""
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floating, got {logits.dtype}")
    chex.assert_rank(logits, 2, custom_message="logits must be (B, K)", exception_type=ValueError)
    if labels is not None:
        _check_labels(labels, logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _check_same_shape(message: str, *arrays: Array) -> None:
    """Arrays that would otherwise broadcast in silence have one shape."""
    chex.assert_equal_shape(arrays, custom_message=message, exception_type=ValueError)


def _check_labels(labels: Array, logits: Logits) -> None:
    _check_same_shape("labels must be (B,), one for each row of logits", labels, logits[:, 0])


def _at_labels(logits: Logits, labels: Labels) -> PerExample:
    """Each example's logit of its label, (B,)."""
    _check_labels(labels, logits)
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def _runner_up(logits: Logits, labels: Labels) -> PerExample:
    """The largest logit of the other classes, (B,)."""
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(own, -jnp.inf, logits), -1)


def one_hot(labels: Labels, num_classes: int, *, smoothing: float = 0.0) -> Array:
    """Targets (B, K): 1 - smoothing on the label, the rest spread over all K classes.

    Args:
      labels: (B,) integers.
      num_classes: K, at least 1.
      smoothing: share of the target that is spread, in [0, 1].

    Raises:
      ValueError: no classes, or another share.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.one_hot(jnp.array([1]), 4, smoothing=0.5)
    Array([[0.125, 0.625, 0.125, 0.125]], dtype=float32)
    """
    if not num_classes >= 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes!r}")
    if isinstance(smoothing, int | float):  # an array may be traced
        mixing.check_share("smoothing", smoothing)
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return hot * (1 - smoothing) + smoothing / num_classes


def cross_entropy(logits: Logits, targets: Array) -> PerExample:
    """-sum_k t_k log softmax(logits)_k.

    Args:
      logits: (B, K).
      targets: (B,) integer labels, or (B, K) probabilities.

    Returns:
      (B,).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([0]))
    Array([0.69...], dtype=float32)
    """
    logits = _checked_float32(logits)
    if targets.ndim == 1:
        _check_labels(targets, logits)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    _check_same_shape("soft targets must be (B, K) as the logits", targets, logits)
    return optax.softmax_cross_entropy(logits, targets)


def log_odds(logits: Logits, labels: Labels) -> PerExample:
    """log((1 - p_y) / p_y) = log sum_{k != y} exp(z_k) - z_y: the cross-entropy for attacks.

    The cross-entropy is log(1 + exp(log_odds)): the two rise together and their gradients are
    parallel, but the cross-entropy's vanishes in float32 where the model is sure, as p_y - 1 rounds
    to 0, and this one's does not, however large the logits are.

    Args:
      logits: (B, K), K >= 2.
      labels: (B,) integers.

    Returns:
      (B,).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.log_odds(jnp.array([[2.0, 0.0], [0.0, 100.0]]), jnp.array([0, 1]))
    Array([  -2., -100.], dtype=float32)
    """
    logits = _checked_float32(logits, labels)
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), -1)
    return others - _at_labels(logits, labels)


def probability_margin(logits: Logits, labels: Labels) -> PerExample:
    """max_{k != y} p_k - p_y with p = softmax(logits), PMA's loss.

    Args:
      logits: (B, K).
      labels: (B,) integers.

    Returns:
      (B,), in [-1, 1].

    Reference: Xie et al., Towards million-scale adversarial robustness evaluation with stronger
      individual attacks, arXiv 2411.15210.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.probability_margin(jnp.array([[0.0, 5.0]]), jnp.array([0]))
    Array([0.98...], dtype=float32)
    """
    return margin(jax.nn.softmax(_checked_float32(logits)), labels)


def kl(p_logits: Logits, q_logits: Logits) -> PerExample:
    """KL(softmax(p) || softmax(q)) summed over the classes, (B,).

    torch's `KLDivLoss(reduction='batchmean')` is the mean of this; its elementwise mean is this
    over K, which makes a weight depend on the number of classes: no loss here does that.

    Args:
      p_logits: (B, K).
      q_logits: (B, K).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> p, q = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]])
    >>> losses.kl(p, p), losses.kl(p, q)
    (Array([0.], dtype=float32), Array([0.12...], dtype=float32))
    """
    _check_same_shape("both logits must be (B, K)", p_logits, q_logits)
    p = jax.nn.log_softmax(_checked_float32(p_logits))
    q = jax.nn.log_softmax(_checked_float32(q_logits))
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def distillation(
    teacher_logits: Logits, student_logits: Logits, *, temperature: float = 1.0
) -> PerExample:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)) summed over the classes, (B,).

    tau^2 keeps the size of the gradient as tau grows. At tau = 1 it is `kl`.

    Args:
      teacher_logits: (B, K).
      student_logits: (B, K).
      temperature: tau, positive.

    Raises:
      ValueError: a temperature that is not.

    Reference: Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> teacher, student = jnp.array([[4.0, 0.0]]), jnp.array([[1.0, 0.0]])
    >>> losses.distillation(teacher, student, temperature=4.0)
    Array([0.97...], dtype=float32)
    """
    if isinstance(temperature, int | float):  # an array may be traced
        mixing.check_positive("temperature", temperature)
    teacher, student = _checked_float32(teacher_logits), _checked_float32(student_logits)
    return temperature**2 * kl(teacher / temperature, student / temperature)


def margin(logits: Logits, labels: Labels) -> PerExample:
    """max_{k != y} z_k - z_y: positive exactly where the prediction is wrong (Carlini, Wagner).

    Args:
      logits: (B, K).
      labels: (B,) integers.

    Reference: Towards Evaluating the Robustness of Neural Networks, arXiv 1608.04644, f_6.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.margin(jnp.array([[2.0, 0.5, 0.0]]), jnp.array([0]))
    Array([-1.5], dtype=float32)
    """
    logits = _checked_float32(logits, labels)
    return _runner_up(logits, labels) - _at_labels(logits, labels)


def dlr(logits: Logits, labels: Labels) -> PerExample:
    """Difference of logits ratio, -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)).

    Shift and scale of the logits cancel, so saturated softmaxes give no zero gradient.

    Args:
      logits: (B, K), K >= 3.
      labels: (B,) integers.

    Raises:
      ValueError: fewer than 3 classes, for which the ratio is not defined.

    Reference: Croce, Hein, Reliable evaluation of adversarial robustness, arXiv 2003.01690, eq. 6.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> logits = jnp.array([[2.0, 1.0, 0.0]])
    >>> losses.dlr(logits, jnp.array([0])), losses.dlr(100 * logits, jnp.array([0]))
    (Array([-0.5], dtype=float32), Array([-0.5], dtype=float32))
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"dlr needs 3 classes or more, got {logits.shape[-1]}; use margin")
    logits = _checked_float32(logits)
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2): the targeted form of `dlr`.

    Args:
      logits: (B, K), K >= 4.
      labels: (B,) integers.
      targets: (B,) integers.

    Raises:
      ValueError: fewer than 4 classes.

    Reference: Croce, Hein, arXiv 2003.01690, eq. 7.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> logits = jnp.array([[3.0, 2.0, 1.0, 1.0]])
    >>> losses.dlr_targeted(logits, jnp.array([0]), jnp.array([1]))
    Array([-0.5], dtype=float32)
    """
    if logits.shape[-1] < 4:
        raise ValueError(f"dlr_targeted needs 4 classes or more, got {logits.shape[-1]}")
    logits = _checked_float32(logits)
    top = jax.lax.top_k(logits, 4)[0]
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12
    return (_at_labels(logits, targets) - _at_labels(logits, labels)) / scale


def mart(
    clean: Logits,
    moved: Logits,
    labels: Labels,
    *,
    weight: float,
    targets: Array | None = None,
) -> PerExample:
    """CE(p', t) - log(1 - max_{k != y} p'_k) + weight KL(p || p') (1 - p_y).

    p and p' are the softmaxes on the clean and on the adversarial images. The first two terms are
    the boosted cross-entropy; the last weighs most where the clean image is misclassified, and is
    differentiated through its weight too. Everything is computed from log-probabilities, where
    the authors' code adds constants of 1e-4 to 1e-12 instead.

    Args:
      clean: (B, K), logits of the clean images.
      moved: (B, K), logits of the adversarial images.
      labels: (B,), y.
      weight: of the last term (the paper's lambda).
      targets: (B, K) probabilities t; by default the labels.

    Reference: Wang et al., Improving adversarial robustness requires revisiting misclassified
      examples, ICLR 2020.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> clean, moved = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])
    >>> losses.mart(clean, moved, jnp.array([0]), weight=5.0)
    Array([3.12...], dtype=float32)
    """
    own = jax.nn.one_hot(labels, moved.shape[-1], dtype=bool)
    _check_same_shape("both logits must be (B, K)", clean, moved)
    log_p, log_q = (jax.nn.log_softmax(_checked_float32(z)) for z in (clean, moved))
    runner_up = jnp.argmax(jnp.where(own, -jnp.inf, log_q), -1)
    others = ~jax.nn.one_hot(runner_up, moved.shape[-1], dtype=bool)
    boosted = cross_entropy(moved, labels if targets is None else targets)
    boosted = boosted - jax.nn.logsumexp(log_q, -1, where=others)
    return boosted + weight * kl(clean, moved) * -jnp.expm1(_at_labels(log_p, labels))


def supcon(
    views: Array,
    labels: Labels | None = None,
    *,
    temperature: float = 0.07,
    mask: Array | None = None,
    axis_name: str | None = None,
) -> PerExample:
    """Supervised contrastive loss; without labels it is NT-Xent, SimCLR's loss.

    Of the anchor a, one view of one example, with P(a) all other views of its class (without
    labels: of its example) and i over all views of all examples but a itself,

        l(a) = -1/|P(a)| sum_{p in P(a)} log(exp(z_a z_p / T) / sum_{i != a} exp(z_a z_i / T)),

    the 'out' form; an example's loss is the mean over its views. An anchor without a positive
    has the loss 0.

    Args:
      views: (V, B, D) unit vectors.
      labels: (B,) integers, or None.
      temperature: T, positive.
      mask: (B,) bool; the examples where it is False are padding: neither anchors nor in a sum.
      axis_name: a mapped axis over whose devices the views are gathered: own anchors against
        all views. The mean over devices of the loss, or of its gradient, is then what one
        device would find with the whole batch.

    Returns:
      (B,), 0 where the mask is False.

    Raises:
      ValueError: another rank, or a temperature that is not positive.

    Reference: Khosla et al., Supervised contrastive learning, arXiv 2004.11362, eq. 2; Chen et
      al., A simple framework for contrastive learning, arXiv 2002.05709, eq. 1.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> views = jnp.array([[[1.0, 0.0], [0.0, 1.0]]] * 2)  # 2 equal views of 2 examples
    >>> losses.supcon(views, temperature=0.5)
    Array([0.23..., 0.23...], dtype=float32)
    """
    if views.ndim != 3:
        raise ValueError(f"views must be (V, B, D), got {views.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    z = views.astype(jnp.promote_types(views.dtype, jnp.float32))
    rows = jnp.arange(z.shape[1])
    real = jnp.ones(rows.shape, bool) if mask is None else mask
    pool, pool_real = z, real
    if axis_name is not None:
        rows = rows + jax.lax.axis_index(axis_name) * z.shape[1]
        pool = jax.lax.all_gather(z, axis_name, axis=1, tiled=True)
        pool_real = jax.lax.all_gather(real, axis_name, tiled=True)
    pool_rows = jnp.arange(pool.shape[1])
    own = rows[:, None] == pool_rows[None]
    same = own
    if labels is not None:
        pool_labels = labels
        if axis_name is not None:
            pool_labels = jax.lax.all_gather(labels, axis_name, tiled=True)
        same = labels[:, None] == pool_labels[None]

    # (V, B) anchors by (V, C) views of the pool.
    itself = jnp.eye(len(z), dtype=bool)[:, None, :, None] & own[None, :, None, :]
    others = pool_real[None, None, None, :] & ~itself
    positive = others & same[None, :, None, :]
    logits = jnp.einsum("vbd,wcd->vbwc", z, pool, precision="highest") / temperature
    count = jnp.sum(positive, (2, 3))
    alone = count == 0
    # Without a positive there may be no other at all: a sum over nothing has a NaN gradient.
    compared = others | alone[:, :, None, None]
    total = jax.nn.logsumexp(jnp.where(compared, logits, -jnp.inf), (2, 3))
    mean = jnp.sum(jnp.where(positive, logits, 0), (2, 3)) / jnp.maximum(count, 1)
    loss = jnp.mean(jnp.where(alone, 0, total - mean), 0)
    return jnp.where(real, loss, 0)


def cost_matrix(
    num_classes: int,
    protected: int | Sequence[int],
    cost: float = 10.0,
    *,
    others: float = 1.0,
    columns: bool = True,
) -> Array:
    """C (K, K): `cost` in the rows and columns of the protected classes, 0 on the diagonal.

    Args:
      num_classes: K.
      protected: one class or several.
      cost: of an error that a protected class takes part in.
      others: of every other error.
      columns: protect the columns too, not the rows alone.

    Raises:
      ValueError: a class outside [0, K), none at all, or a cost that is negative or not finite.

    >>> from jaxdefense import losses
    >>> losses.cost_matrix(3, protected=0, cost=10.0)
    Array([[ 0., 10., 10.],
           [10.,  0.,  1.],
           [10.,  1.,  0.]], dtype=float32)
    """
    classes = [protected] if isinstance(protected, int) else list(protected)
    if not classes or any(k not in range(num_classes) for k in classes):
        raise ValueError(f"protected classes must be in [0, {num_classes}), got {protected!r}")
    if not (0 <= cost < math.inf and 0 <= others < math.inf):
        raise ValueError(f"costs must be finite and not negative, got {cost} and {others}")
    matrix = np.full((num_classes, num_classes), others, np.float32)
    matrix[classes] = cost
    if columns:
        matrix[:, classes] = cost
    np.fill_diagonal(matrix, 0)
    return jnp.asarray(matrix)


def expected_cost(logits: Logits, labels: Labels, cost: Array) -> PerExample:
    """sum_j C[j, y] p_j with p = softmax(logits): what the network's guess costs on average.

    Args:
      logits: (B, K).
      labels: (B,).
      cost: (K, K), C[guess, label], see `cost_matrix`.

    Reference: Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> cost = losses.cost_matrix(2, protected=0, cost=10.0)
    >>> losses.expected_cost(jnp.array([[0.0, 0.0]]), jnp.array([0]), cost)
    Array([5.], dtype=float32)
    """
    logits = _checked_float32(logits, labels)
    return jnp.sum(jax.nn.softmax(logits) * jnp.take(cost, labels, 1).T, -1)


def margin_cost(logits: Logits, labels: Labels, cost: Array) -> PerExample:
    """log(1 + sum_{j != y} C[y, j] exp(z_j - z_y)): the cross-entropy where all costs are 1.

    Args:
      logits: (B, K).
      labels: (B,).
      cost: (K, K), C[label, guess], see `cost_matrix`; its diagonal does not count.

    Reference: Zhang, Evans, Cost-sensitive robustness against adversarial examples,
      arXiv 1810.09225.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> cost = losses.cost_matrix(2, protected=0, cost=10.0)
    >>> losses.margin_cost(jnp.array([[0.0, 0.0]]), jnp.array([0]), cost)
    Array([2.39...], dtype=float32)
    """
    logits = _checked_float32(logits, labels)
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    weights = jnp.where(own, 1.0, cost[labels])
    return jax.nn.logsumexp(logits, -1, b=weights) - _at_labels(logits, labels)


def min_max(weights: Array, *, epsilon: float = 1e-12) -> Array:
    """R(W) = ||W||_1 - ||W||_2 of all entries, (): 0 for at most one non-zero entry, else positive.

    dR/dW = sign(W) - W / ||W||_2: small entries are driven to zero, one large one is left alone.

    Args:
      weights: an array of any shape, taken as one vector.
      epsilon: added under the root, so that the gradient at W = 0 is 0.

    Reference: Shen et al., arXiv 2101.12372 (the regulariser of CSE).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.min_max(jnp.array([3.0, 4.0])), losses.min_max(jnp.array([0.0, 4.0]))
    (Array(2., dtype=float32), Array(0., dtype=float32))
    """
    weights = weights.astype(jnp.float32)
    return jnp.sum(jnp.abs(weights)) - jnp.sqrt(jnp.sum(jnp.square(weights)) + epsilon)


def excess_kurtosis(weights: Array, *, epsilon: float = 1e-12) -> Array:
    """m_4 / m_2^2 - 3 of all entries, (): Fisher's, biased; 0 for a Gaussian.

    Args:
      weights: an array of any shape.
      epsilon: added to m_2^2, so that equal entries give -3 and no NaN.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.excess_kurtosis(jnp.array([-1.0, 1.0]))
    Array(-2., dtype=float32)
    """
    centred = weights.astype(jnp.float32) - jnp.mean(weights)
    variance = jnp.mean(jnp.square(centred))
    return jnp.mean(centred**4) / (jnp.square(variance) + epsilon) - 3


def squared_error(x: Array, y: Array) -> PerExample:
    """mean_i (x_i - y_i)^2 over all axes but the first, (B,).

    Args:
      x: (B, ...).
      y: (B, ...).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.squared_error(jnp.zeros((2, 4)), jnp.full((2, 4), 3.0))
    Array([9., 9.], dtype=float32)
    """
    return _mean(jnp.square(_difference(x, y)))


def absolute_error(x: Array, y: Array) -> PerExample:
    """mean_i |x_i - y_i| over all axes but the first, (B,).

    Args:
      x: (B, ...).
      y: (B, ...).

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.absolute_error(jnp.zeros((2, 4)), jnp.full((2, 4), 3.0))
    Array([3., 3.], dtype=float32)
    """
    return _mean(jnp.abs(_difference(x, y)))


def _difference(x: Array, y: Array) -> Array:
    _check_same_shape("need arrays of one shape", x, y)
    return x.astype(jnp.float32) - y.astype(jnp.float32)


def _mean(x: Array) -> PerExample:
    return jnp.mean(x, range(1, x.ndim))


def gaussian_kl(mean: Array, log_variance: Array) -> PerExample:
    """KL(N(m, v) || N(0, 1)) = sum_j (v_j + m_j^2 - 1 - log v_j) / 2, a VAE's term.

    Args:
      mean: (B, D), m.
      log_variance: (B, D), log v.

    Returns:
      (B,).

    Raises:
      ValueError: the two have different shapes, or no axis D.

    Reference: Kingma, Welling, Auto-encoding variational Bayes, arXiv 1312.6114, app. B.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.gaussian_kl(jnp.array([[1.0, 1.0]]), jnp.zeros((1, 2)))
    Array([1.], dtype=float32)
    """
    _check_same_shape("moments must be (B, D) both", mean, log_variance)
    chex.assert_rank(mean, 2, custom_message="moments must be (B, D)", exception_type=ValueError)
    mean, log_variance = mean.astype(jnp.float32), log_variance.astype(jnp.float32)
    return jnp.sum(jnp.expm1(log_variance) - log_variance + jnp.square(mean), -1) / 2


def binary_cross_entropy(logits: Array, targets: Array | float) -> PerExample:
    """-t log s(z) - (1 - t) log(1 - s(z)) with s the logistic function.

    Args:
      logits: (B,), z.
      targets: t in [0, 1], one or one per example.

    Returns:
      (B,).

    Raises:
      ValueError: logits of another rank.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import losses
    >>> losses.binary_cross_entropy(jnp.array([0.0, 5.0]), 1.0)
    Array([0.69..., 0.0067...], dtype=float32)
    """
    chex.assert_rank(logits, 1, custom_message="logits must be (B,)", exception_type=ValueError)
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), jnp.asarray(targets))


_NAMED: dict[str, LossFn] = {
    "cross_entropy": cross_entropy,
    "dlr": dlr,
    "log_odds": log_odds,
    "margin": margin,
    "probability_margin": probability_margin,
}


def make(name: str) -> LossFn:
    """The attack loss of a config by its name.

    Args:
      name: one of the attack losses: 'cross_entropy', 'dlr', 'log_odds', 'margin',
        'probability_margin'.

    Raises:
      ValueError: unknown name.

    >>> from jaxdefense import losses
    >>> losses.make("dlr") is losses.dlr
    True
    """
    if name not in _NAMED:
        registry.raise_unknown("loss", name, _NAMED)
    return _NAMED[name]
