"""Auto-PGD: projected gradient ascent that sets its own step size."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import losses, registry
from jaxdefense.attacks import checks
from jaxdefense.attacks.fab import boundary_distances
from jaxdefense.attacks.method import method
from jaxdefense.attacks.outcome import (
    DRAWS,
    Passes,
    attack_loss,
    best_of_runs,
    fooled,
    mean_over_draws,
    runner_up_classes,
    select_rows,
    threat_of_rows,
    warn_few_classes,
    zero_non_finite,
)
from jaxdefense.types import (
    Array,
    Attack,
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
    example_keys,
    fold_in,
    per_example,
)

TargetedLoss = Callable[[Logits, Labels, Labels], PerExample]
# (iterate, its number) -> value, fooled, gradient
_Look = Callable[[Images, Array], tuple[PerExample, Array, Images]]

# The multi-eps schedule of L1-APGD: (times eps, share of the steps), ending in the ball itself.
_WARM = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


# The most likely wrong classes among which rank="distance" looks for the nearest.
RANKED = 100


class _Climb(NamedTuple):
    """One run's state: the iterate, the best point so far, and the step rule's memory."""

    x: Images
    old: Images  # the iterate that x was made from
    best_x: Images
    best_grad: Images
    best: PerExample
    last: PerExample  # the value at the previous iterate
    step: PerExample
    memory: PyTree


class _Rule(Protocol):
    """A step rule: first step, checkpoints, what happens there, and the move."""

    def windows(self, steps: int) -> np.ndarray: ...
    def first_step(self, eps: Array) -> Array: ...
    def start(self, threat: Threat, key: Key, x: Images) -> Images: ...
    def memory(self, x_adv: Images, x: Images, restarted: bool) -> PyTree: ...
    def seen(self, memory: PyTree, rose: Array) -> PyTree: ...
    def check(
        self, c: _Climb, grad: Images, x: Images, eps: Array, window: Array
    ) -> tuple[_Climb, Images]: ...
    def move(self, c: _Climb, grad: Images, x: Images, threat: Threat, first: Array) -> Images: ...


class _Halving(NamedTuple):
    """The rule of L_inf and L2: momentum, and halved steps where progress stalls.

    At a checkpoint the step is halved, and the run goes back to its best point, where the loss
    rose in at most a share rho of the steps since the last checkpoint, or where the best loss has
    not moved since then and the step was not halved there.
    """

    rho: float
    momentum: float

    def windows(self, steps):
        """(steps + 1,) lengths of the windows that end at each iterate, 0 for no checkpoint.

        The first is 22 % of the steps, each further one 3 % shorter, down to 6 %.
        """
        length, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
        windows, n = np.zeros(steps + 1, np.int32), length
        while n <= steps:
            windows[n] = length
            length = max(length - shrink, least)
            n += length
        return windows

    def first_step(self, eps):
        return 2 * eps

    def start(self, threat, key, x):
        return threat.project(threat.sample(key, x), x)

    def memory(self, x_adv, x, restarted):
        zeros = jnp.zeros(x.shape[0], jnp.int32)
        best = jnp.zeros(x.shape[0], jnp.promote_types(x.dtype, jnp.float32))
        return {"rises": zeros, "halved": zeros == 0, "best": best}

    def seen(self, memory, rose):
        return {**memory, "rises": memory["rises"] + rose}

    def check(self, c, grad, x, eps, window):
        oscillates = c.memory["rises"] <= self.rho * window
        stalled = ~c.memory["halved"] & (c.best <= c.memory["best"])
        halve = oscillates | stalled
        memory = {"rises": jnp.zeros_like(c.memory["rises"]), "halved": halve, "best": c.best}
        step = jnp.where(halve, c.step / 2, c.step)
        climb = c._replace(x=select_rows(halve, c.best_x, c.x), step=step, memory=memory)
        return climb, select_rows(halve, c.best_grad, grad)

    def move(self, c, grad, x, threat, first):
        share = jnp.where(first, 1.0, self.momentum).astype(x.dtype)
        ahead = threat.project(c.x + threat.ascent(grad, c.x, c.step), x)
        return threat.project(c.x + share * (ahead - c.x) + (1 - share) * (c.x - c.old), x)


class _Sparse(NamedTuple):
    """The rule of L1: steps of equal size along the sign of the largest gradient entries.

    At a checkpoint (every 4 % of the steps) the share of entries becomes that of the best
    perturbation's non-zeros over 1.5. Where it fell by 5 % or more the step is eps again and the
    run goes back to its best point; elsewhere the step is divided by 1.5, down to eps / 10.
    """

    share: float = 0.2

    def windows(self, steps):
        every = max(int(0.04 * steps), 1)
        return np.where(np.arange(steps + 1) % every == 0, every, 0) * (np.arange(steps + 1) > 0)

    def first_step(self, eps):
        return eps

    def start(self, threat, key, x):
        """Normal noise projected onto the ball: sparse, unlike a uniform draw."""
        keys = example_keys(key, x.shape[0])
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
        return threat.project(x + noise, x)

    def memory(self, x_adv, x, restarted):
        size = x[0].size
        if restarted:
            held = _support(x_adv, x)
            return {"share": held / size / 1.5, "held": held}
        ones = jnp.ones(x.shape[0])
        return {"share": self.share * ones, "held": size * ones}

    def seen(self, memory, rose):
        return memory

    def check(self, c, grad, x, eps, window):
        held = _support(c.best_x, x)
        sparser = held < 0.95 * c.memory["held"]
        step = jnp.clip(jnp.where(sparser, eps, c.step / 1.5), eps / 10, eps)
        memory = {"share": held / x[0].size / 1.5, "held": held}
        climb = c._replace(x=select_rows(sparser, c.best_x, c.x), step=step, memory=memory)
        return climb, select_rows(sparser, c.best_grad, grad)

    def move(self, c, grad, x, threat, first):
        sign = jnp.sign(_largest(grad, c.memory["share"]))
        length = jnp.sum(jnp.abs(sign), range(1, x.ndim))
        step = (c.step / jnp.maximum(length, 1)).astype(x.dtype)
        return threat.project(c.x + per_example(step, x) * sign, x)


def _support(x_adv: Images, x: Images) -> PerExample:
    """How many entries the perturbation has, (B,)."""
    return jnp.sum(x_adv != x, range(1, x.ndim)).astype(jnp.result_type(float))


def _largest(grad: Images, share: PerExample) -> Images:
    """`grad` with all but that share of its entries, the largest, set to 0."""
    flat = jnp.abs(grad.reshape(grad.shape[0], -1))
    n = flat.shape[1]
    rank = jnp.clip((1 - share) * n, 0, n - 1).astype(jnp.int32)
    least = jnp.take_along_axis(jnp.sort(flat, -1), rank[:, None], -1)
    return jnp.where(flat >= least, grad.reshape(flat.shape), 0).reshape(grad.shape)


def _rule(threat: Threat, rho: float, momentum: float) -> _Rule:
    halving = _Halving(rho, momentum)
    rules: dict[str, _Rule] = {"linf": halving, "l2": halving, "l1": _Sparse()}
    return rules[threat.norm]


class _Plan(NamedTuple):
    """What each evaluation of a run does: constants of the program, indexed by its number."""

    factor: np.ndarray  # the ball's radius over eps
    opens: np.ndarray  # it starts a ball
    window: np.ndarray  # the window that ends at it, 0 for no checkpoint
    counts: np.ndarray  # a fooled iterate is a result: the ball is the threat's own

    @classmethod
    def make(cls, rule: _Rule, steps: int, warm_eps: bool) -> "_Plan":
        parts = []
        for factor, n in _balls(steps, warm_eps):
            opens = np.arange(n + 1) == 0
            full = np.full(n + 1, factor, np.float32)
            parts.append((full, opens, rule.windows(n), full == 1))
        return cls(*map(np.concatenate, zip(*parts)))


def _balls(steps: int, warm_eps: bool) -> list[tuple[float, int]]:
    """(times eps, steps) of each ball; the last takes what rounding leaves."""
    if not warm_eps:
        return [(1.0, steps)]
    counts = [int(np.ceil(share * steps)) for _, share in _WARM[:-1]]
    counts.append(steps - sum(counts))
    if counts[-1] < 1:
        raise ValueError(f"warm_eps leaves no step for eps itself: needs 5 or more, got {steps}")
    return [(factor, n) for (factor, _), n in zip(_WARM, counts)]


def _climb(
    look: _Look,
    x: Images,
    key: Key,
    threat: Threat,
    rule: _Rule,
    plan: _Plan,
    done: Array,
    early_stop: bool,
) -> tuple[Images, PerExample, Array]:
    """One run from a random start: its best point, that point's value, and who is fooled."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    eps = jnp.broadcast_to(jnp.asarray(threat.eps, dtype), x.shape[:1])
    several = int(plan.opens.sum()) > 1
    factor, opens, window, counts = map(jnp.asarray, plan)
    last = len(plan.factor) - 1

    def ball(n: Any) -> Threat:
        return threat.scaled(factor[n]) if several else threat

    def enter(x_adv: Images, n: Any) -> _Climb:
        low = jnp.full(x.shape[0], -jnp.inf, dtype)
        step = rule.first_step(eps * factor[n].astype(dtype))
        memory = rule.memory(x_adv, x, several)
        return _Climb(x_adv, x_adv, x_adv, jnp.zeros_like(x), low, -low, step, memory)

    def observe(c: _Climb, value: PerExample, hit: Array, grad: Images, won: Array) -> _Climb:
        # A fooled example is finished: nothing replaces its point any more.
        better = hit | ((value > c.best) & ~won)
        return c._replace(
            best_x=select_rows(better, c.x, c.best_x),
            best_grad=select_rows(better, grad, c.best_grad),
            best=jnp.where(better, value, c.best),
            last=value,
            memory=rule.seen(c.memory, value > c.last),
        )

    def evaluate(carry: Any) -> Any:
        n, won, c = carry
        value, wrong, grad = look(c.x, n)
        value, grad = value.astype(dtype), grad.astype(x.dtype)
        hit = wrong & counts[n] & ~won if early_stop else jnp.zeros_like(won)
        c = observe(c, value, hit, grad, won)
        won = won | hit
        here = eps * factor[n].astype(dtype)
        c, grad = jax.lax.cond(
            window[n] > 0,
            lambda c, grad: rule.check(c, grad, x, here, window[n]),
            lambda c, grad: (c, grad),
            c,
            grad,
        )
        moved = c._replace(x=rule.move(c, grad, x, ball(n), opens[n]), old=c.x)
        if several:
            following = jnp.minimum(n + 1, last)
            moved = jax.lax.cond(
                opens[following] & (n < last),
                lambda c: enter(ball(following).project(c.best_x, x), following),
                lambda c: c,
                moved,
            )
        return n + 1, won, moved

    def going(carry: Any) -> Array:
        return (carry[0] <= last) & ~jnp.all(carry[1])

    start = enter(rule.start(ball(0), key, x), 0)
    _, won, c = jax.lax.while_loop(going, evaluate, (jnp.array(0), done, start))
    return c.best_x, c.best, won


def _runs(
    look: Callable[[Array, Array], _Look],
    x: Images,
    keys: Key,
    threat: Threat,
    rule: _Rule,
    plan: _Plan,
    done: Array,
    *,
    runs: int,
    early_stop: bool,
) -> Images:
    """Independent runs; an example leaves at its first fooled point, else the largest value.

    Args:
      look: (numbers (B,), rows (B,)) -> how run numbers[i] looks at example rows[i].
    """

    def run(numbers: Array, rows: Array, idle: Array) -> tuple[Images, PerExample]:
        best_x, best, won = _climb(
            look(numbers, rows),
            x[rows],
            fold_in(keys[rows], numbers),
            threat_of_rows(threat, rows),
            rule,
            plan,
            idle,
            early_stop,
        )
        # Only a fooled point is a reason to stop.
        return best_x, jnp.where(won, jnp.inf, jnp.minimum(best, jnp.finfo(best.dtype).max))

    return jax.lax.stop_gradient(best_of_runs(run, x, done, runs))


def _looking(predict: Predict, labels: Labels, loss: LossFn, targeted: bool = False) -> _Look:
    """One forward and backward pass gives the value, the verdict and the gradient."""

    def look(x_adv: Images, n: Array) -> tuple[PerExample, Array, Images]:
        def total(z):
            logits = predict(z)
            values = -loss(logits, labels) if targeted else loss(logits, labels)
            return jnp.sum(values), (values, fooled(logits, labels, targeted))

        grad, (values, wrong) = jax.grad(total, has_aux=True)(x_adv)
        return values, wrong, zero_non_finite(grad)

    return look


def _looking_at_draws(
    predict: PredictWithKey,
    keys: Key,
    samples: int,
    looking: Callable[[Predict], _Look],
) -> _Look:
    """The mean loss over fresh draws of a randomised model, and the mean of its gradients."""

    def look(x_adv: Images, n: Array) -> tuple[PerExample, Array, Images]:
        def values(fixed: Predict) -> tuple[PerExample, Images]:
            value, _, grad = looking(fixed)(x_adv, n)
            return value, grad

        value, grad = mean_over_draws(predict, fold_in(keys, n), samples, values)
        return value, jnp.zeros(value.shape, bool), grad

    return look


def _difference(logits: Logits, labels: Labels, targets: Labels) -> PerExample:
    """z_t - z_y."""
    hot = jax.nn.one_hot(targets, logits.shape[-1]) - jax.nn.one_hot(labels, logits.shape[-1])
    return jnp.sum(hot * logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)


_TARGETED: dict[str, TargetedLoss] = {
    "dlr_targeted": losses.dlr_targeted,
    "difference": _difference,
}


def _untargeted_loss(loss: LossFn | str, num_classes: int) -> LossFn:
    """The loss, or the margin where the DLR ratio has too few logits."""
    loss = attack_loss(loss)
    if loss is losses.dlr and num_classes < 3:
        warn_few_classes("the DLR loss", num_classes, "the margin is maximised")
        return losses.margin
    return loss


def _targeted_loss(loss: TargetedLoss | str, num_classes: int) -> TargetedLoss:
    if isinstance(loss, str):
        loss = _TARGETED[loss]
    if loss is losses.dlr_targeted and num_classes < 4:
        warn_few_classes(
            "the targeted DLR loss", num_classes, "the logits' difference is maximised"
        )
        return _difference
    return loss


def passes(
    *,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 1,
    warm_eps: bool = False,
    samples: int | None = None,
    ranked: int = 0,
) -> Passes:
    """One forward pass on the image, then steps + 1 of both kinds a run; 1 more per warm ball.

    Args:
      steps: of a run.
      restarts: runs, for each of `targets`.
      targets: of `apgd_targeted`.
      warm_eps: see `apgd`.
      samples: draws of a randomised model for each pass.
      ranked: classes whose gradients `apgd_targeted` ranks, with rank="distance".
    """
    both = restarts * targets * (steps + (len(_WARM) if warm_eps else 1)) * (samples or 1)
    return Passes(1 + both + (ranked > 0), both + ranked)


def _check_options(steps: int, restarts: int, rho: float, momentum: float, warm_eps: bool) -> None:
    checks.check_count("steps", steps)
    checks.check_count("restarts", restarts)
    for name, value in (("rho", rho), ("momentum", momentum)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    _balls(steps, warm_eps)


@method()
def apgd(
    threat: Threat,
    *,
    steps: int = 100,
    loss: LossFn | str = "cross_entropy",
    restarts: int = 1,
    rho: float = 0.75,
    momentum: float = 0.75,
    warm_eps: bool = False,
    early_stop: bool = True,
    targeted: bool = False,
    samples: int | None = None,
) -> Attack:
    """Auto-PGD: the step size adapts to the loss's progress, nothing else needs tuning.

    In L_inf and L2, with the step's start at 2 eps and P the projection onto ball and box,

        z_{t+1} = P(x_t + step * ascent(grad f(x_t)))
        x_{t+1} = P(x_t + momentum (z_{t+1} - x_t) + (1 - momentum) (x_t - x_{t-1}))

    and at checkpoints (22 % of the steps, then ever closer ones) the step is halved, and the run
    restarts at its best point, where the loss rose in at most a share `rho` of the steps, or where
    the best loss and the step stayed the same since the last checkpoint. In L1 the steps go along
    the signs of the largest gradient entries, as many as the best perturbation's sparsity
    suggests, and the projection onto ball and box is exact.

    Args:
      threat: norm, eps, bounds.
      steps: gradient steps of a run; a run takes one gradient more than it has steps.
      loss: any (logits, labels) -> (B,), or the name of one of `losses`, maximised; the
        cross-entropy in the form that does not saturate, `losses.log_odds`.
      restarts: runs from other random points.
      rho: share of improving steps below which the step is halved (L_inf, L2).
      momentum: weight of the gradient's step against the last move (L_inf, L2).
      warm_eps: three tenths of the steps in the ball of 3 eps, three in 2 eps, the rest in eps,
        each from the last one's best point projected; the L1 attack of AutoAttack.
      early_stop: an example is finished at its first misclassified point, which is returned (the
        image itself where it is misclassified). False: the point of the largest loss of all runs,
        as for training or for measuring a loss.
      targeted: labels are targets to be reached, and the loss is lowered.
      samples: for a randomised model; the attack then takes predict(key, images), each step has so
        many fresh draws, whose losses and gradients are averaged, and nothing stops early.

    Returns:
      An `Attack`: the fooling point, or where there is none the point of the largest loss.

    Raises:
      ValueError: counts or shares out of range; at the call, bad images, labels or keys.

    With fewer than 3 classes the DLR loss is replaced by the margin (a FewClassesWarning says so).

    Reference: Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of
      diverse parameter-free attacks, arXiv 2003.01690, algorithm 1; for L1: Croce, Hein, Mind the
      box: l1-APGD for sparse adversarial attacks on image classifiers, arXiv 2103.01208.

    Deviations: the authors' code projects onto the L2 ball first and the box then, here it is the
    nearest point of both; it counts the loss's rise over the first step against 0, here (and in
    the paper) against the start's loss; it returns the last fooled iterate, here the first.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks, threat
    >>> x, labels = jnp.array([[0.625, 0.5, 0.25]]), jnp.array([0])
    >>> attack = attacks.apgd(threat.L2(0.25), steps=10, loss="margin")
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    _check_options(steps, restarts, rho, momentum, warm_eps)
    attack_loss(loss)
    if samples is not None:
        checks.check_count("samples", samples)
    rule = _rule(threat, rho, momentum)
    plan = _Plan.make(rule, steps, warm_eps)
    stops = early_stop and samples is None

    def attack(predict: Any, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        classes = checks.count_classes(predict, x, keyed=samples is not None)
        chosen = _untargeted_loss(loss, classes)
        keys = example_keys(key, x.shape[0])

        def look(numbers: Array, rows: Array) -> _Look:
            def looking(fixed: Predict) -> _Look:
                return _looking(fixed, labels[rows], chosen, targeted)

            if samples is None:
                return looking(predict)
            draws = fold_in(fold_in(keys[rows], numbers), DRAWS)
            return _looking_at_draws(predict, draws, samples, looking)

        if stops:
            done = fooled(predict(x), labels, targeted)
        else:
            done = jnp.zeros(labels.shape, bool)
        return _runs(look, x, keys, threat, rule, plan, done, runs=restarts, early_stop=stops)

    return attack


@method()
def apgd_targeted(
    threat: Threat,
    *,
    targets: int = 9,
    steps: int = 100,
    loss: TargetedLoss | str = "dlr_targeted",
    restarts: int = 1,
    rho: float = 0.75,
    momentum: float = 0.75,
    warm_eps: bool = False,
    rank: str = "logit",
) -> Attack:
    """APGD-T: one Auto-PGD run towards each of the most likely wrong classes.

    The classes are ranked at the clean image, by their logits or by the distances to the linearised
    boundaries with them; an example leaves at its first misclassified point, whatever the class.

    Args:
      threat: norm, eps, bounds.
      targets: wrong classes tried, at most K - 1.
      steps: gradient steps of a run.
      loss: 'dlr_targeted', 'difference' (z_t - z_y) or any (logits, labels, targets) -> (B,).
      restarts: runs for each class.
      rho: see `apgd`.
      momentum: see `apgd`.
      warm_eps: see `apgd`.
      rank: 'logit', the largest first, or 'distance', (z_y - z_k) / ||grad (z_y - z_k)||_dual, the
        least first, among the 100 likeliest wrong classes: a gradient for each of those.

    Returns:
      An `Attack`: the fooling point, or where there is none the point of the largest loss.

    Raises:
      ValueError: counts or shares out of range, an unknown loss or rank; at the call, bad images,
        labels or keys.

    With fewer than 4 classes the difference of the two logits replaces the targeted DLR loss, and
    with K <= targets there are K - 1 targets (a FewClassesWarning says so).

    Reference: Croce, Hein, arXiv 2003.01690, section 4; rank='distance': Melamed et al., MALT
      powers up adversarial attacks, arXiv 2407.02240.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxdefense import attacks, threat
    >>> x, labels = jnp.array([[0.625, 0.5, 0.25]]), jnp.array([0])
    >>> attack = attacks.apgd_targeted(threat.L2(0.25), targets=2, loss="difference")
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    _check_options(steps, restarts, rho, momentum, warm_eps)
    checks.check_count("targets", targets)
    if isinstance(loss, str) and loss not in _TARGETED:
        registry.raise_unknown("targeted loss", loss, _TARGETED)
    if rank not in ("logit", "distance"):
        registry.raise_unknown("rank", rank, ("logit", "distance"))
    rule = _rule(threat, rho, momentum)
    plan = _Plan.make(rule, steps, warm_eps)

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        clean = predict(x)
        num_classes = clean.shape[-1]
        if num_classes <= targets:
            warn_few_classes(f"{targets} targets", num_classes, f"{num_classes - 1} are tried")
        chosen = _targeted_loss(loss, num_classes)
        if rank == "distance":
            likely = runner_up_classes(clean, labels, max(targets, RANKED))
            far = boundary_distances(predict, x, labels, likely, threat)
            order = jnp.argsort(far, -1)[:, :targets]
            ranked = jnp.take_along_axis(likely, order, -1)
        else:
            ranked = runner_up_classes(clean, labels, targets)

        def look(numbers: Array, rows: Array) -> _Look:
            aim = ranked[rows, numbers // restarts]
            return _looking(predict, labels[rows], lambda z, y: chosen(z, y, aim))

        return _runs(
            look,
            x,
            example_keys(key, x.shape[0]),
            threat,
            rule,
            plan,
            fooled(clean, labels),
            runs=ranked.shape[1] * restarts,
            early_stop=True,
        )

    return attack
