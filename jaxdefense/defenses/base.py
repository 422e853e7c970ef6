"""What a defence is: its parameters, its phases of updates, and how the deployed model predicts.

One train loop runs any list of phases, so no defence has a trainer of its own:

    params   by role: {"classifier": ..., "generator": ...}
    carry    what is neither trained nor data: BatchNorm statistics, averages; by role
    batch    {"image", "label", "id", "step", "epoch"} and what views and crafts add to it
    Craft    (params, carry, batch, key) -> batch      the inner maximisation; never differentiated
    Loss     (params, carry, batch, key) -> (scalar, (carry, metrics))   the outer minimisation
    metrics  {name: (sum, count)}

What a defence may change is what these dataclasses hold:

    Defense  init, phases (read by `train`), predictors and purifiers (by `evaluation`), deployed
             (by `runs.load_classifier`), pretrained (by checkpoints, which leave it out), judged
             (by AutoAttack), variant_classes (by the transform `stacked`)
    Phase    its length, optimisers, view of the data, what begins anew, what follows each batch
    Update   a loss, the roles that it trains, the craft before it

What is asked of it, which the contract of tests/test_defenses.py tries: `make(model, threat, *,
...)` raises ValueError before anything is compiled; a loss is a scalar, finite, with the same
structure of carry each time; each trained parameter moves in one phase at least, and no other;
crafting leaves BatchNorm's statistics alone; predictors answer float32 logits (B, K). A craft adds
entries to the batch and hands on the others as they are.

The carry's "member" is a stack's, "ema" the averages'; the batch's "target" are a teacher's soft
labels, "parts" a combination's and "members" a stack's crafts.

Craft and loss run inside the mapped axis `AXIS`; the step averages over it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import attacks, losses
from jaxdefense.attacks import checks
from jaxdefense.rewrite import fast_convolutions
from jaxdefense.types import (
    Array,
    Images,
    Key,
    Labels,
    Logits,
    LossFn,
    Objective,
    PerExample,
    Predict,
    PyTree,
    Scalar,
    Threat,
)

AXIS = "batch"

Params = dict[str, PyTree]
Carry = dict[str, PyTree]
Batch = dict[str, Any]
Metrics = dict[str, tuple[Scalar, Scalar]]
Craft = Callable[[Params, Carry, Batch, Key], Batch]
LossValue = tuple[Scalar, tuple[Carry, Metrics]]
Loss = Callable[[Params, Carry, Batch, Key], LossValue]
After = Callable[[Params, Carry, Batch], Carry]
View = Callable[[Key, Images], dict[str, Images]]
Predictor = Callable[[Params, Carry], Predict]


def _as_they_are(params: Params, carry: Carry) -> tuple[Params, Carry]:
    return params, carry


def unchanged(params: Params, carry: Carry, batch: Batch, key: Key) -> Batch:
    """The craft that adds nothing."""
    return batch


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """One optimiser step.

    Attributes:
      loss: what is minimised over the trained roles.
      roles: whose parameters move; each role's optimiser state is its own.
      craft: adds the adversarial inputs (and whatever else needs no gradient) to the batch.
    """

    loss: Loss
    roles: tuple[str, ...] = ("classifier",)
    craft: Craft = unchanged


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """A stretch of training in which the same updates are applied, in order, to every batch.

    Attributes:
      name: shown in logs.
      updates: applied one after the other to each batch.
      length: epochs, or "500s" or "30%" of the run (`train.optim.steps_of`); None: an equal share
        of what the other phases leave of the run.
      optimizers: {role: optimiser spec} where they differ from the run's (`train.optim`).
      view: (key, images) -> {"image": ..., ...}; None: the run's augmentation.
      fresh_params: roles initialised anew (with their optimiser) when the phase begins.
      fresh_optimizers: roles whose optimiser begins anew.
      after: run after the updates of each batch (running averages of parameters).
      shared_by_variants: the updates ignore carry["member"], so that a stack with equal keys
        computes them once for all members (a warm start).
    """

    name: str
    updates: tuple[Update, ...]
    length: float | str | None = None
    optimizers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    view: View | None = None
    fresh_params: tuple[str, ...] = ()
    fresh_optimizers: tuple[str, ...] = ()
    after: tuple[After, ...] = ()
    shared_by_variants: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Purifier:
    """What an audit needs to know of a predictor that cleans images: predict(x) = base(purify(x)).

    Attributes:
      base: the name of the predictor behind the purifier.
      purify: (params, carry) -> (images -> images).
      detours: {name: predictor} with the same logits and other gradients, past the places where
        the purifier's own vanish (a clip, a saturated tanh); an attack climbs them too.
    """

    base: str
    purify: Callable[[Params, Carry], Callable[[Images], Images]]
    detours: Mapping[str, Predictor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A network that was trained before, as a value: what a defence takes for its teacher, say.

    In a config it is written as {"workdir": ..., "checkpoint": "best"};
    `runs.load_classifier` reads one.

    Attributes:
      module: the network.
      params: its parameters, on the host.
      batch_stats: its running statistics, on the host.
      source: where they come from, for messages.
    """

    module: nn.Module
    params: PyTree
    batch_stats: PyTree
    source: str = "memory"

    def init(self, role: str) -> tuple[Params, Carry]:
        """({role: parameters}, {role: running statistics})."""
        return {role: self.params}, {role: self.batch_stats}


@dataclasses.dataclass(frozen=True, eq=False)
class Defense:
    """A defence of a classifier.

    Attributes:
      init: (key, example images (1, H, W, C)) -> (params, carry).
      phases: run in order; the same Phase may stand in the list several times.
      predictors: {name: (params, carry) -> Predict}; the first is the deployed classifier.
      purifiers: {name of a predictor that cleans images first: its Purifier}.
      pretrained: {role: the trained network that `init` puts there}. No update trains such a role,
        and checkpoints leave it out.
      variant_classes: the class that each variant protects, where the carry's "member" chooses
        among variants and each protects one class (see `transforms.stacked`).
      judged: {predictor: the one class that it is judged on}, of a stack's members in their order,
        each of which protects one class; empty where predictors are judged on all classes.
      deployed: (params, carry) of the networks that predict: averages, where a transform keeps
        some.
    """

    init: Callable[[Key, Images], tuple[Params, Carry]]
    phases: tuple[Phase, ...]
    predictors: Mapping[str, Predictor]
    purifiers: Mapping[str, Purifier] = dataclasses.field(default_factory=dict)
    pretrained: Mapping[str, Trained] = dataclasses.field(default_factory=dict)
    variant_classes: Sequence[int] = ()
    judged: Mapping[str, int] = dataclasses.field(default_factory=dict)
    deployed: Callable[[Params, Carry], tuple[Params, Carry]] = _as_they_are

    @property
    def primary(self) -> str:
        """The name of the deployed classifier's predictor."""
        return next(iter(self.predictors))

    def without_pretrained(self, by_role: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Parameters or carry without the roles of pretrained networks."""
        return {role: tree for role, tree in by_role.items() if role not in self.pretrained}

    def map_phases(self, change: Callable[[Phase], Phase]) -> tuple[Phase, ...]:
        """Every phase changed; what is one Phase in several places stays one."""
        changed = {phase: change(phase) for phase in self.phases}
        return tuple(changed[phase] for phase in self.phases)

    def map_updates(self, change: Callable[[Update], Update]) -> tuple[Phase, ...]:
        """Every phase with its updates changed."""

        def with_updates(phase: Phase) -> Phase:
            return dataclasses.replace(phase, updates=tuple(map(change, phase.updates)))

        return self.map_phases(with_updates)


@dataclasses.dataclass(frozen=True)
class Net:
    """A Flax module in a role: params[role] are its parameters, carry[role] its statistics."""

    module: nn.Module
    role: str = "classifier"

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        return fast_convolutions(self.module.apply)

    def init(self, key: Key, images: Images) -> tuple[Params, Carry]:
        """({role: parameters}, {role: running statistics})."""
        variables = jax.jit(self.module.init)(key, images)
        return {self.role: variables["params"]}, {self.role: variables.get("batch_stats", {})}

    def predict(self, params: Params, carry: Carry, **kwargs: Any) -> Predict:
        """The network in eval mode; keyword arguments (`features`, `bn_set`) are the module's."""
        variables = {"params": params[self.role], "batch_stats": carry[self.role]}

        return functools.partial(self._apply, variables, **kwargs)

    def train(self, params: Params, carry: Carry, x: Images, **kwargs: Any) -> tuple[Any, Carry]:
        """(output, carry): BatchNorm on the batch's statistics, which the carry follows."""
        variables = {"params": params[self.role], "batch_stats": carry[self.role]}
        out, new = self._apply(variables, x, train=True, mutable=["batch_stats"], **kwargs)
        return out, {**carry, self.role: new.get("batch_stats", {})}

    def train_on_both(
        self, params: Params, carry: Carry, batch: Batch
    ) -> tuple[Logits, Logits, Carry]:
        """(logits of the images, of the adversarial ones, carry), two batches to BatchNorm.

        The images come first.
        """
        clean, carry = self.train(params, carry, batch["image"])
        moved, carry = self.train(params, carry, batch["adversarial"])
        return clean, moved, carry


def single_phase(
    net: Net, loss: Loss, *, craft: Craft = unchanged, phase: str = "train"
) -> Defense:
    """The defence of one network, one phase, one update per batch.

    Args:
      net: what is trained and deployed.
      loss: minimised over its parameters.
      craft: of the update.
      phase: name of the phase.
    """
    update = Update(loss, (net.role,), craft)
    return Defense(net.init, (Phase(phase, (update,)),), {net.role: net.predict})


def pgd_craft(
    net: Net,
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    loss: LossFn | str = losses.cross_entropy,
    random_start: bool = True,
    ramp_epochs: float = 0.0,
) -> Craft:
    """The craft that adds batch["adversarial"]: PGD around batch["image"] against batch["label"].

    It attacks the network in eval mode, so that BatchNorm neither sees nor follows its images.

    Args:
      net: what is attacked.
      threat: the set.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      loss: what the PGD raises.
      random_start: whether it starts at a random point of the ball, else at the image.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Raises:
      ValueError: an option out of range.
    """
    if not ramp_epochs >= 0:
        raise ValueError(f"ramp_epochs must not be negative, got {ramp_epochs!r}")
    length = default_step_size(threat, step_size)
    pgd = functools.partial(attacks.pgd, steps=steps, loss=loss, random_start=random_start)
    pgd(threat, step_size=length)  # a wrong option fails here, not in a jit

    def craft(params: Params, carry: Carry, batch: Batch, key: Key) -> Batch:
        factor = eps_ramp(batch, ramp_epochs)
        attack = pgd(threat.scaled(factor), step_size=length * factor)
        x_adv = attack(net.predict(params, carry), key, batch["image"], batch["label"])
        return {**batch, "adversarial": x_adv}

    return craft


def objective_craft(
    objective: Callable[[Params, Carry, Batch], Objective],
    threat: Threat,
    *,
    steps: int,
    step_size: float | None = None,
    noise: float = 1e-3,
    ramp_epochs: float = 0.0,
    growth: Callable[[Carry, Batch], PerExample] | None = None,
) -> Craft:
    """The craft that adds batch["adversarial"]: an objective's maximum, from x + noise N(0, 1).

    Args:
      objective: (params, carry, batch) -> per-example objective of images; networks in eval mode.
      threat: the set around batch["image"].
      steps: number of steps of the ascent.
      step_size: of those steps, in image units; default eps / 4.
      noise: standard deviation of the start, image units; a KL's gradient vanishes at x itself.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs of the run.
      growth: (carry, batch) -> (B,), a further factor of eps and step size per example.

    Raises:
      ValueError: a number out of range.
    """
    checks.check_count("steps", steps)
    for name, value in (("step_size", step_size), ("noise", noise), ("ramp_epochs", ramp_epochs)):
        checks.check_step(name, value)
    length = default_step_size(threat, step_size)

    def craft(params: Params, carry: Carry, batch: Batch, key: Key) -> Batch:
        x, factor = batch["image"], eps_ramp(batch, ramp_epochs)
        if growth is not None:
            factor = factor * growth(carry, batch)
        x_adv = attacks.maximize(
            objective(params, carry, batch),
            x,
            threat.scaled(factor),
            key,
            steps=steps,
            step_size=length * factor,
            start=x + noise * jax.random.normal(key, x.shape, x.dtype),
        )
        return {**batch, "adversarial": x_adv}

    return craft


def kl_objective(net: Net) -> Callable[[Params, Carry, Batch], Objective]:
    """The objective KL(f(x) || f(z)): how far an image z moves what the network says of x."""

    def objective(params: Params, carry: Carry, batch: Batch) -> Objective:
        predict = net.predict(params, carry)
        clean = predict(batch["image"])
        return lambda z: losses.kl(clean, predict(z))

    return objective


def targets(batch: Batch, logits: Logits, *, smoothing: float = 0.0) -> Array:
    """The batch's soft targets (B, K) where a transform put some, else the smoothed labels.

    Args:
      batch: with "label" and, perhaps, "target".
      logits: (B, K), for the number of classes alone.
      smoothing: label smoothing, in [0, 1).
    """
    if "target" in batch:
        return batch["target"]
    return losses.one_hot(batch["label"], logits.shape[-1], smoothing=smoothing)


def default_step_size(threat: Threat, step_size: float | None) -> float | Array:
    """A training attack's step size, by default a quarter of eps."""
    return threat.eps / 4 if step_size is None else step_size


def eps_ramp(batch: Batch, epochs: float) -> Array | float:
    """The factor of eps that grows from 0 to 1 over the first `epochs` (1 where epochs is 0)."""
    return jnp.minimum(batch["epoch"] / epochs, 1.0) if epochs else 1.0


def mean_metric(values: PerExample) -> tuple[Scalar, Scalar]:
    """The mean of one number per example as a metric: (sum, count)."""
    return jnp.sum(values), jnp.float32(values.size)


def accuracies(clean: Logits, moved: Logits, labels: Labels) -> Metrics:
    """The accuracy on images and on adversarial ones, as metrics."""
    return {"accuracy": accuracy(clean, labels), "robust_accuracy": accuracy(moved, labels)}


def accuracy(logits: Logits, labels: Labels) -> tuple[Scalar, Scalar]:
    """The accuracy as a metric: (correct, count)."""
    hits = jnp.argmax(logits, -1) == labels
    return jnp.sum(hits, dtype=jnp.float32), jnp.float32(hits.size)
