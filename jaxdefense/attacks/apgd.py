"""Auto-PGD: projected gradient ascent that sets its own step size."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import losses, registry
from jaxdefense.attacks import checks
from jaxdefense.attacks.fab import boundary_distances
from jaxdefense.attacks.method import attack_factory
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
    value_fooled_grad,
    warn_few_classes,
)
from jaxdefense.mixing import check_share
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
# (iterate, its number) -> value, whether it fools, gradient
_Evaluation = Callable[[Images, Array], tuple[PerExample, Array, Images]]

# The multi-eps schedule of L1-APGD: (times eps, share of the steps), ending in the ball itself.
_WARM_EPS = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))

# rank="distance" looks for the nearest among this many of the most likely wrong classes.
RANKED = 100


class _State(NamedTuple):
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
    """A norm's rule for the step size, the checkpoints and the step itself."""

    def windows(self, steps: int) -> np.ndarray: ...
    def first_step(self, eps: Array) -> Array: ...
    def start(self, threat: Threat, key: Key, x: Images) -> Images: ...
    def memory(self, x_adv: Images, x: Images, restarted: bool) -> PyTree: ...
    def seen(self, memory: PyTree, rose: Array) -> PyTree: ...
    def check(
        self, state: _State, grad: Images, x: Images, eps: Array, window: Array
    ) -> tuple[_State, Images]: ...
    def move(
        self, state: _State, grad: Images, x: Images, threat: Threat, first: Array
    ) -> Images: ...


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

    def check(self, state, grad, x, eps, window):
        oscillates = state.memory["rises"] <= self.rho * window
        stalled = ~state.memory["halved"] & (state.best <= state.memory["best"])
        halve = oscillates | stalled
        memory = {
            "rises": jnp.zeros_like(state.memory["rises"]),
            "halved": halve,
            "best": state.best,
        }
        step = jnp.where(halve, state.step / 2, state.step)
        x_next = select_rows(halve, state.best_x, state.x)
        grad = select_rows(halve, state.best_grad, grad)
        return state._replace(x=x_next, step=step, memory=memory), grad

    def move(self, state, grad, x, threat, first):
        share = jnp.where(first, 1.0, self.momentum).astype(x.dtype)
        ahead = threat.project(state.x + threat.ascent(grad, state.x, state.step), x)
        return threat.project(
            state.x + share * (ahead - state.x) + (1 - share) * (state.x - state.old), x
        )


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

    def check(self, state, grad, x, eps, window):
        held = _support(state.best_x, x)
        sparser = held < 0.95 * state.memory["held"]
        step = jnp.clip(jnp.where(sparser, eps, state.step / 1.5), eps / 10, eps)
        memory = {"share": held / x[0].size / 1.5, "held": held}
        x_next = select_rows(sparser, state.best_x, state.x)
        grad = select_rows(sparser, state.best_grad, grad)
        return state._replace(x=x_next, step=step, memory=memory), grad

    def move(self, state, grad, x, threat, first):
        sign = jnp.sign(_largest(grad, state.memory["share"]))
        length = jnp.sum(jnp.abs(sign), range(1, x.ndim))
        step = (state.step / jnp.maximum(length, 1)).astype(x.dtype)
        return threat.project(state.x + per_example(step, x) * sign, x)


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
    counts = [int(np.ceil(share * steps)) for _, share in _WARM_EPS[:-1]]
    counts.append(steps - sum(counts))
    if counts[-1] < 1:
        raise ValueError(f"warm_eps leaves no step for eps itself: needs 5 or more, got {steps}")
    return [(factor, n) for (factor, _), n in zip(_WARM_EPS, counts)]


@dataclasses.dataclass(frozen=True)
class _Search:
    """The runs of `apgd` and of `apgd_targeted`, which differ in what a run maximises.

    Args: see `apgd`.
    """

    threat: Threat
    steps: int
    restarts: int
    rho: float
    momentum: float
    warm_eps: bool
    early_stop: bool = True

    def __post_init__(self) -> None:
        checks.check_count("steps", self.steps)
        checks.check_count("restarts", self.restarts)
        check_share("rho", self.rho)
        check_share("momentum", self.momentum)
        _balls(self.steps, self.warm_eps)

    def best_points(
        self,
        evaluations: Callable[[Array, Array], _Evaluation],
        x: Images,
        keys: Key,
        done: Array,
        *,
        targets: int = 1,
    ) -> Images:
        """The best point of all runs: the first that fools, else the one of the largest value.

        Args:
          evaluations: (numbers (B,), rows (B,)) -> what run numbers[i] of example rows[i]
            maximises.
          x: (B, ...) images.
          keys: (B,) one per example.
          done: (B,) bool, examples that keep their image.
          targets: for each example; each has `restarts` runs.
        """

        def run(numbers: Array, rows: Array, idle: Array) -> tuple[Images, PerExample]:
            ball = threat_of_rows(self.threat, rows)
            own = fold_in(keys[rows], numbers)
            best_x, best, won = self._ascend(evaluations(numbers, rows), x[rows], own, ball, idle)
            # An infinite value would stop the runs, which only a fooled point may.
            return best_x, jnp.where(won, jnp.inf, jnp.minimum(best, jnp.finfo(best.dtype).max))

        return jax.lax.stop_gradient(best_of_runs(run, x, done, targets * self.restarts))

    def _ascend(
        self, evaluate: _Evaluation, x: Images, keys: Key, threat: Threat, done: Array
    ) -> tuple[Images, PerExample, Array]:
        """One run from a random start: its best points, their values, and who is fooled."""
        rule = _rule(threat, self.rho, self.momentum)
        plan = _Plan.make(rule, self.steps, self.warm_eps)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        eps = jnp.broadcast_to(jnp.asarray(threat.eps, dtype), x.shape[:1])
        several = int(plan.opens.sum()) > 1
        factor, opens, window, counts = map(jnp.asarray, plan)
        last = len(plan.factor) - 1

        def ball(n: Any) -> Threat:
            return threat.scaled(factor[n]) if several else threat

        def enter(x_adv: Images, n: Any) -> _State:
            low = jnp.full(x.shape[0], -jnp.inf, dtype)
            step = rule.first_step(eps * factor[n].astype(dtype))
            memory = rule.memory(x_adv, x, several)
            return _State(x_adv, x_adv, x_adv, jnp.zeros_like(x), low, -low, step, memory)

        def observe(
            state: _State, value: PerExample, hit: Array, grad: Images, won: Array
        ) -> _State:
            # A fooled example is finished: nothing replaces its point any more.
            better = hit | ((value > state.best) & ~won)
            return state._replace(
                best_x=select_rows(better, state.x, state.best_x),
                best_grad=select_rows(better, grad, state.best_grad),
                best=jnp.where(better, value, state.best),
                last=value,
                memory=rule.seen(state.memory, value > state.last),
            )

        def turn(carry: Any) -> Any:
            n, won, state = carry
            value, wrong, grad = evaluate(state.x, n)
            value, grad = value.astype(dtype), grad.astype(x.dtype)
            hit = wrong & counts[n] & ~won if self.early_stop else jnp.zeros_like(won)
            state = observe(state, value, hit, grad, won)
            won = won | hit
            here = eps * factor[n].astype(dtype)
            state, grad = jax.lax.cond(
                window[n] > 0,
                lambda state, grad: rule.check(state, grad, x, here, window[n]),
                lambda state, grad: (state, grad),
                state,
                grad,
            )
            moved = state._replace(x=rule.move(state, grad, x, ball(n), opens[n]), old=state.x)
            if several:
                following = jnp.minimum(n + 1, last)
                moved = jax.lax.cond(
                    opens[following] & (n < last),
                    lambda state: enter(ball(following).project(state.best_x, x), following),
                    lambda state: state,
                    moved,
                )
            return n + 1, won, moved

        def going(carry: Any) -> Array:
            return (carry[0] <= last) & ~jnp.all(carry[1])

        start = enter(rule.start(ball(0), keys, x), 0)
        _, won, state = jax.lax.while_loop(going, turn, (jnp.array(0), done, start))
        return state.best_x, state.best, won


def _evaluation(
    predict: Predict, labels: Labels, loss: LossFn, targeted: bool = False
) -> _Evaluation:
    """Of one model: the loss, negative for targets, and its gradient."""

    def signed(logits: Logits, labels: Labels) -> PerExample:
        return -loss(logits, labels) if targeted else loss(logits, labels)

    return lambda x_adv, _: value_fooled_grad(predict, x_adv, labels, signed, targeted)


def _evaluation_over_draws(
    predict: PredictWithKey,
    keys: Key,
    samples: int,
    evaluation: Callable[[Predict], _Evaluation],
) -> _Evaluation:
    """Of a randomised model: the mean loss over fresh draws and the mean of its gradients."""

    def evaluate(x_adv: Images, n: Array) -> tuple[PerExample, Array, Images]:
        def values(fixed: Predict) -> tuple[PerExample, Images]:
            value, _, grad = evaluation(fixed)(x_adv, n)
            return value, grad

        value, grad = mean_over_draws(predict, fold_in(keys, n), samples, values)
        return value, jnp.zeros(value.shape, bool), grad

    return evaluate


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
    both = restarts * targets * (steps + (len(_WARM_EPS) if warm_eps else 1)) * (samples or 1)
    return Passes(1 + both + (ranked > 0), both + ranked)


@attack_factory()
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
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.apgd(threat.L2(0.25), steps=10, loss="margin")
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    attack_loss(loss)  # an unknown name fails here
    if samples is not None:
        checks.check_count("samples", samples)
    stops = early_stop and samples is None
    runs = _Search(threat, steps, restarts, rho, momentum, warm_eps=warm_eps, early_stop=stops)

    def attack(predict: Any, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        classes = checks.count_classes(predict, x, keyed=samples is not None)
        chosen = _untargeted_loss(loss, classes)
        keys = example_keys(key, x.shape[0])

        def evaluations(numbers: Array, rows: Array) -> _Evaluation:
            def evaluation(fixed: Predict) -> _Evaluation:
                return _evaluation(fixed, labels[rows], chosen, targeted)

            if samples is None:
                return evaluation(predict)
            draws = fold_in(fold_in(keys[rows], numbers), DRAWS)
            return _evaluation_over_draws(predict, draws, samples, evaluation)

        if stops:
            done = fooled(predict(x), labels, targeted)
        else:
            done = jnp.zeros(labels.shape, bool)
        return runs.best_points(evaluations, x, keys, done)

    return attack


@attack_factory()
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
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.apgd_targeted(threat.L2(0.25), targets=2, loss="difference")
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    checks.check_count("targets", targets)
    if isinstance(loss, str) and loss not in _TARGETED:
        registry.raise_unknown("targeted loss", loss, _TARGETED)
    if rank not in ("logit", "distance"):
        registry.raise_unknown("rank", rank, ("logit", "distance"))
    runs = _Search(threat, steps, restarts, rho, momentum, warm_eps=warm_eps)

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

        def evaluations(numbers: Array, rows: Array) -> _Evaluation:
            aim = ranked[rows, numbers // restarts]
            return _evaluation(predict, labels[rows], lambda z, y: chosen(z, y, aim))

        keys, done = example_keys(key, x.shape[0]), fooled(clean, labels)
        return runs.best_points(evaluations, x, keys, done, targets=ranked.shape[1])

    return attack
