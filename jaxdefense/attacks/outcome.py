"""What the attacks share about their results: who is fooled, what is kept, what it costs."""

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.types import (
    Array,
    Images,
    Key,
    Labels,
    Logits,
    LossFn,
    PerExample,
    Predict,
    PredictWithKey,
    PyTree,
    Threat,
    fold_in,
    per_example,
)

# What the keys of a randomised model's draws are folded with; starts and proposals use them plain.
DRAWS = 0xD1CE


class Passes(NamedTuple):
    """The most passes through the model that an attack spends on one example."""

    forward: int
    backward: int


class FewClassesWarning(UserWarning):
    """The model has fewer classes than the attack was written for, and a fallback runs."""


def warn_few_classes(attack: str, num_classes: int, instead: str) -> None:
    """Warns, while a program is traced, that a fallback runs because there are too few classes.

    Args:
      attack: what cannot run.
      num_classes: K of the model.
      instead: the fallback, in words.
    """
    warnings.warn(
        f"{attack} needs more than {num_classes} classes: {instead}",
        FewClassesWarning,
        stacklevel=2,
    )


def attack_loss(loss: LossFn | str) -> LossFn:
    """The loss that an attack maximises: `losses.log_odds` in place of the cross-entropy.

    The two rise together, but the cross-entropy's gradient vanishes in float32 where the model is
    sure.

    Args:
      loss: (logits, labels) -> (B,), or the name of one of `losses`.

    Raises:
      ValueError: unknown name.
    """
    loss = losses.make(loss) if isinstance(loss, str) else loss
    return losses.log_odds if loss is losses.cross_entropy else loss


def zero_non_finite(grad: Array) -> Array:
    """`grad` with 0 for every entry that is NaN or infinite.

    One NaN would spoil its image for the rest of the attack: sign(NaN) is NaN, and momentum keeps
    it.
    """
    return jnp.where(jnp.isfinite(grad), grad, 0)


def value_fooled_grad(
    predict: Predict, x: Images, labels: Labels, loss: LossFn, targeted: bool = False
) -> tuple[PerExample, Array, Images]:
    """The loss, who is fooled, and the loss's gradient, from one forward and one backward pass.

    Args:
      predict: the model.
      x: (B, ...) images.
      labels: (B,) labels, or targets.
      loss: (logits, labels) -> (B,).
      targeted: whether the labels are targets.

    Returns:
      (B,) values, (B,) bool, (B, ...) gradients with 0 where an entry is not finite.
    """

    def total(x):
        logits = predict(x)
        values = loss(logits, labels)
        return jnp.sum(values), (values, fooled(logits, labels, targeted))

    grad, (values, wrong) = jax.grad(total, has_aux=True)(x)
    return values, wrong, zero_non_finite(grad)


_REQUIRED: contextvars.ContextVar[Any] = contextvars.ContextVar("required lead", default=0.0)


@contextlib.contextmanager
def require_margin(lead: Array | float) -> Iterator[None]:
    """A context in which an attack succeeds only with a lead of more than `lead` logits.

    It counts where the attack is traced.

    Args:
      lead: in logits, ().
    """
    token = _REQUIRED.set(lead)
    try:
        yield
    finally:
        _REQUIRED.reset(token)


def required_margin(logits: Logits) -> PerExample | float:
    """The lead in logits that a success has to exceed: 0, unless `require_margin` asks for more.

    In half precision one rounding of the logits is added: a compiled attack computes with more
    digits than it stores, so a later forward pass may decide a tie either way.

    Args:
      logits: (B, K).

    Returns:
      (B,) or a number.
    """
    if jnp.finfo(logits.dtype).bits >= 32:
        return _REQUIRED.get()
    size = jnp.max(jnp.abs(logits.astype(jnp.float32)), -1)
    rounding = float(jnp.finfo(logits.dtype).eps) * size
    return jax.lax.stop_gradient(rounding) + _REQUIRED.get()


def success_margin(logits: Logits, labels: Labels, targeted: bool = False) -> PerExample:
    """How far an attack has come in logits, positive exactly where it has succeeded.

    Args:
      logits: (B, K).
      labels: (B,) labels to be left, or targets to be reached.
      targeted: which of the two.

    Returns:
      (B,): the largest other logit minus the label's; of a target, the other way round; less what
      `required_margin` asks for.
    """
    margin = losses.margin(logits, labels)
    return (-margin if targeted else margin) - required_margin(logits)


def fooled(logits: Logits, labels: Labels, targeted: bool = False) -> Array:
    """(B,) bool: another class is strictly larger; ties and NaN count for the defender.

    It has to be larger by `required_margin`, 0 unless in half precision.

    Args:
      logits: (B, K).
      labels: (B,) labels, or targets.
      targeted: whether they are targets; then the target is strictly larger than all others.

    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks
    >>> attacks.fooled(jnp.array([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0]]), jnp.array([0, 0, 0]))
    Array([ True, False, False], dtype=bool)
    """
    return success_margin(logits, labels, targeted) > 0


def mean_over_draws(
    predict: PredictWithKey, keys: Key, samples: int, values: Callable[[Predict], PyTree]
) -> PyTree:
    """The mean of `values` over draws of a randomised model, one draw after another.

    Args:
      predict: (key, images (1, ...)) -> logits (1, K).
      keys: (B,) one per example; each example and draw has a key of its own.
      samples: draws.
      values: of a model without randomness -> arrays, e.g. a loss and its gradient.
    """

    def draw(i: Any) -> PyTree:
        own = fold_in(keys, i)

        def fixed(x: Images) -> Logits:
            return jax.vmap(lambda k, z: predict(k, z[None])[0])(own, x)

        return values(fixed)

    def add(i: Any, total: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, total, draw(i))

    total = jax.lax.fori_loop(1, samples, add, draw(0))
    return jax.tree.map(lambda value: value / samples, total)


def select_rows(mask: Array, x: Array, y: Array) -> Array:
    """x (B, ...) in the rows where mask (B,) holds, y in the others."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y)


def runner_up_classes(logits: Logits, labels: Labels, count: int) -> Array:
    """(B, count) classes other than the label, the largest logit first.

    `count` is cut to K - 1.
    """
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.where(own, -jnp.inf, logits.astype(jnp.float32))
    return jax.lax.top_k(others, min(count, logits.shape[-1] - 1))[1]


def runner_up_class(logits: Logits, labels: Labels) -> Labels:
    """(B,) the class other than the label with the largest logit."""
    return runner_up_classes(logits, labels, 1)[:, 0]


def nearest_found(best_x: Images, x: Images, threat: Threat, minimal: bool) -> Images:
    """What a minimal-norm attack returns of its nearest fooling points, without a gradient.

    Args:
      best_x: (B, ...) the nearest fooling points, x itself where none was found.
      x: (B, ...) images.
      threat: its ball is what the points have to lie in.
      minimal: return them outside the ball too; else x stands there.
    """
    if not minimal:
        best_x = select_rows(threat.distance(best_x, x) <= threat.eps, best_x, x)
    return jax.lax.stop_gradient(best_x)


def interpolate(x: Images, x_adv: Images, fraction: PerExample) -> Images:
    """The point at a fraction (B,) of the way from x to x_adv, (B, ...)."""
    return x + per_example(fraction, x) * (x_adv - x)


def minimize_distance(
    advance: Callable[[Any, Any, PerExample], tuple[Images, Array, Any]],
    state: Any,
    x: Images,
    best_x: Images,
    best: PerExample,
    threat: Threat,
    *,
    steps: int,
    enough: PerExample,
) -> tuple[Any, Images, PerExample]:
    """Runs a minimal-norm attack's steps and keeps each example's nearest fooling point.

    Args:
      advance: (step's number, state, best distance) -> (point, whether it fools, state).
      state: of the attack, any pytree.
      x: (B, ...) images.
      best_x: (B, ...) nearest fooling points so far.
      best: (B,) their distances, inf for none.
      threat: gives the distance.
      steps: at most; the loop ends when every example is finished.
      enough: (B,) an example at this distance or nearer is finished, and keeps its point.

    Returns:
      State, best_x, best.
    """

    def step(carry: Any) -> Any:
        n, state, best_x, best = carry
        z, hit, state = advance(n, state, best)
        distance = threat.distance(z, x)
        closer = hit & (distance < best) & (best > enough)
        return n + 1, state, select_rows(closer, z, best_x), jnp.where(closer, distance, best)

    def going(carry: Any) -> Array:
        return (carry[0] < steps) & jnp.any(carry[3] > enough)

    return jax.lax.while_loop(going, step, (jnp.array(0), state, best_x, best))[1:]


def threat_of_rows(threat: Threat, rows: Array) -> Threat:
    """The threat of the examples `rows`: their eps, where each example has its own."""
    return threat.with_eps(jnp.asarray(threat.eps)[rows]) if jnp.ndim(threat.eps) else threat


def best_of_runs(
    run: Callable[[Array, Array, Array], tuple[Images, PerExample]],
    x: Images,
    done: Array,
    runs: int,
) -> Images:
    """The best of several independent runs per example, as many at once as the batch has room for.

    Runs are taken up in their order, each by all unfinished examples before the next. Where
    examples are finished their places go to the runs that are next, so a batch of which few are
    left (or one filled up with finished ones) is through in few rounds. What is returned is what
    the runs one after another would give, each up to the first that finishes its example.

    Args:
      run: (numbers (B,), rows (B,), idle (B,) bool) -> (points (B, ...), scores (B,)): run
        numbers[i] of example rows[i], or nothing where a place is idle. An infinite score finishes
        an example; minus infinity or NaN is no result.
      x: (B, ...) what is returned for an example without a result.
      done: (B,) bool, examples that need no run.
      runs: for each example.

    Returns:
      (B, ...) per example the point of the largest score, of equal ones the earlier run's.
    """
    batch = x.shape[0]
    places = jnp.arange(batch)
    if runs == 1:
        points, scores = run(jnp.zeros_like(places), places, done)
        return select_rows(~done & (scores > -jnp.inf), points, x)

    def turn(carry: Any) -> Any:
        waiting, kept, best = carry
        chosen = jnp.flatnonzero(waiting, size=batch, fill_value=waiting.size)
        idle = chosen == waiting.size
        numbers, rows = jnp.divmod(jnp.where(idle, 0, chosen), batch)
        points, scores = run(numbers, rows, idle)
        scores = jnp.where(idle | jnp.isnan(scores), -jnp.inf, scores)
        top = jax.ops.segment_max(scores, rows, batch)
        first = jax.ops.segment_min(jnp.where(scores == top[rows], places, batch), rows, batch)
        kept = select_rows(top > best, points[jnp.minimum(first, batch - 1)], kept)
        best = jnp.maximum(best, top)
        waiting = waiting.ravel().at[chosen].set(False, mode="drop").reshape(waiting.shape)
        return waiting & (best < jnp.inf)[None], kept, best

    waiting = jnp.broadcast_to(~done, (runs, batch))
    start = (waiting, x, jnp.full(batch, -jnp.inf, jnp.promote_types(x.dtype, jnp.float32)))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), turn, start)[1]


def initial_radii(
    right: Array, x: Images, threat: Threat, minimal: bool
) -> tuple[PerExample, PerExample]:
    """The distances that a minimal-norm attack starts with, and those at which it may stop.

    Args:
      right: (B,) bool, classified rightly; other images start at distance 0, these at infinity.
      x: (B, ...) images.
      threat: its eps is where an example may stop.
      minimal: never stop; then the second is 0.

    Returns:
      (B,) best distances so far, (B,) distances that are enough.
    """
    best = jnp.where(right, jnp.inf, 0).astype(x.dtype)
    eps = jnp.broadcast_to(jnp.asarray(threat.eps, x.dtype), right.shape)
    return best, jnp.zeros_like(eps) if minimal else eps
