"""A cascade of attacks over the examples that are still classified rightly.

Each attack runs on the survivors of the one before, packed into few static shapes, so nothing is
compiled again as they dwindle. Keys are per example, so an example's fate does not depend on the
others. Every image that counts as a success is checked again: in the ball, in the box, finite,
and misclassified by a plain forward pass. With a folder, each dispatch is written down when it is
done, and a killed evaluation goes on from there (`journal`).
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxdefense import registry, validate
from jaxdefense.attacks import checks, ensemble
from jaxdefense.attacks.ensemble import Stage
from jaxdefense.attacks.square import check_layout
from jaxdefense.evaluation import examine, flags, randomised
from jaxdefense.evaluation.checks import check_attack, check_ids, check_targets
from jaxdefense.evaluation.evaluator import Apply, Evaluator, Examples
from jaxdefense.evaluation.flags import Flag
from jaxdefense.evaluation.journal import LOG, Journal, describe_evaluation, keeps_folder
from jaxdefense.evaluation.verdict import Verdict
from jaxdefense.types import HostArray, PredictWithKey, PyTree, Threat


def stages(
    threat: Threat,
    num_classes: int,
    *,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    layout: str | None = None,
    samples: int | None = None,
) -> list[Stage]:
    """The stages of AutoAttack for a threat and number of classes.

    Args:
      threat: norm, eps, bounds.
      num_classes: K.
      version: see `attacks.autoattack`.
      attacks: only these of its stages, in its order.
      layout: of the images, see `attacks.square`.
      samples: draws a step, for a randomised model and version 'rand'.

    Raises:
      ValueError: unknown version, stage or layout.
    """
    available = ensemble.stages(threat, version, num_classes, layout=layout, samples=samples)
    known = [stage.name for stage in available]
    registry.check_known(f"stage of {version}", attacks or (), known)
    return [stage for stage in available if attacks is None or stage.name in attacks]


def autoattack(
    predict: Callable[..., Any] | None,
    images: HostArray,
    labels: HostArray | None,
    threat: Threat,
    *,
    version: str = "standard",
    variables: PyTree = None,
    targets: HostArray | None = None,
    random: PredictWithKey | None = None,
    samples: int = 20,
    draws: int = 100,
    grid: int | None = None,
    layout: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    attacks: Sequence[str] | None = None,
    ids: HostArray | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool = False,
) -> Verdict:
    """Runs AutoAttack on a whole set: APGD-CE, APGD-T, FAB-T, Square, each on the survivors.

    Before anything is attacked the model is asked what would make its number worthless. A random
    model, or one whose answer about an image depends on its batch, is refused, as are probabilities
    and NaN; what leaves doubt is among the verdict's flags (docs/flags.md says what each means and
    what to do):

    * zero gradients, non-finite gradients, no gradients: gradient attacks see little; look for
      rounding, `stop_gradient`, saturation; `attacks.bpda` and Square go past them.
    * loop in the forward pass: the model optimises when it is asked; attack what it optimises.
    * masked gradients: FAB or Square took what APGD had left; give Square more queries.
    * no better than chance: labels are shifted, or the images are not the model's.
    * ties, one class, unconfirmed wins, few classes, own labels, small sample: what the
      evidence says.

    Args:
      predict: images (B, H, W, C) -> logits (B, K), parameters inside, eval mode; with `variables`,
        (variables, images) -> logits. None where `random` is given.
      images: (N, H, W, C) floats in the threat's bounds, or vectors (N, D).
      labels: (N,) integers; None judges the model against its own answers.
      threat: Linf, L2 or L1, its eps one number or one for each image.
      version: 'standard', 'fast', 'plus', 'targeted', or 'rand', which `random` alone has; see
        `attacks.autoattack`.
      variables: any pytree of weights: arguments of the programs instead of constants in them.
      targets: (N,) classes to be reached instead of labels to be left; the version is then
        'targeted'.
      random: a randomised model instead of `predict`, (key, images) -> logits, or (variables, key,
        images) -> logits; the verdict is then a `RandomVerdict`.
      samples: fresh draws in each step of an attack on `random`.
      draws: fresh draws of each image that the verdict on `random` rests on.
      grid: 255 for images of 8 bits: the verdict is that of images rounded to them.
      layout: 'NHWC' or 'NCHW', see `attacks.square`.
      seed: of all attacks.
      batch_size: most examples per dispatch, over all devices; default as `Evaluator`'s.
      attacks: only these stages, e.g. ("apgd-ce", "apgd-t").
      ids: (N,) the examples' names in the random keys; default their positions.
      folder: keep finished dispatches there; the same call then goes on where it was killed, on
        other devices and in other batches too.
      progress: show a bar.

    Returns:
      A `Verdict`; a `RandomVerdict` for a randomised model.

    Raises:
      ValueError: bad images, labels or targets, probabilities or NaN instead of logits, a random
        model without `random`, BatchNorm in train mode, a model of (variables, images) without
        `variables`, unknown names, or a folder of another
        evaluation.

    >>> import jax
    >>> from jaxdefense import evaluation, threat
    >>> x = jax.random.uniform(jax.random.key(0), (8, 4, 4, 1))
    >>> predict, ball = lambda x: x.reshape(len(x), -1)[:, :3], threat.Linf(0.5)
    >>> verdict = evaluation.autoattack(predict, x, None, ball, attacks=("apgd-ce",))
    >>> int(verdict.clean.sum()), int(verdict.robust.sum())
    (8, 0)

    Reference: Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of
      diverse parameter-free attacks, arXiv 2003.01690. Differences from the authors' programme are
      listed in the attacks' docstrings.
    """
    if isinstance(attacks, str) or (attacks is not None and len(attacks) == 0):
        raise ValueError(f"attacks must name stages, e.g. ('apgd-ce', 'square'), got {attacks!r}")
    if (predict is None) == (random is None):
        raise ValueError("give predict, or random=predict with predict(key, images)")
    if targets is not None and version not in ("standard", "targeted"):
        raise ValueError(f"targets go with version 'targeted', got {version!r}")
    if targets is None and version == "targeted":
        raise ValueError("version 'targeted' needs targets=, one class for each image")
    if random is not None:
        if version not in ("standard", "rand"):
            raise ValueError(f"a randomised model is judged by version 'rand', got {version!r}")
        version = "rand"
    elif version == "rand":
        raise ValueError(
            "version 'rand' judges a randomised model: give it as random=predict with predict(key, "
            "images), not as `attacks.eot`, among whose draws an attack would choose the worst"
        )
    elif targets is not None:
        version = "targeted"
    with_variables = variables is not None
    role, model = ("random", random) if predict is None else ("predict", predict)
    inputs = ("images",) if random is None else ("key", "images")
    given = ", ".join(inputs)
    way = f"give variables=..., or a function of ({given}) alone"
    if with_variables:
        way = f"leave out variables=, or give a function of (variables, {given})"
    checks.check_takes(role, model, inputs, variables=with_variables, way=way)
    apply = _with_variables(model, with_variables=with_variables)
    evaluator = Evaluator(apply, threat, batch_size=batch_size, grid=grid)
    images = evaluator.check_images(images)
    if labels is not None:
        checks.check_label_count(np.asarray(labels), len(images))
    classes = checks.count_classes(
        lambda *inputs: apply(variables, *inputs), images[:1], keyed=random is not None
    )
    chosen = stages(
        threat,
        classes,
        version=version,
        attacks=attacks,
        layout=layout,
        samples=None if random is None else samples,
    )
    if any(stage.name == "square" for stage in chosen):
        check_layout(images.shape, layout)
    options: dict[str, Any] = dict(
        ids=ids,
        seed=seed,
        folder=None if folder is None else validate.check_folder("folder", folder),
        progress=progress,
    )
    if random is not None:
        if targets is not None or grid is not None or labels is None:
            raise ValueError("a randomised model is judged with labels, without targets or grid")
        return randomised.run_stages(
            evaluator, variables, images, labels, chosen, classes, draws=draws, **options
        )
    return run_stages(evaluator, variables, images, labels, chosen, targets=targets, **options)


def _with_variables(function: Any, *, with_variables: bool) -> Apply:
    """The function with variables as its first argument, added where it takes none."""
    return function if with_variables else lambda _, *inputs: function(*inputs)


@keeps_folder
def run_stages(
    evaluator: Evaluator,
    variables: PyTree,
    images: HostArray,
    labels: HostArray | None,
    stages: Sequence[Stage],
    *,
    targets: HostArray | None = None,
    ids: HostArray | None = None,
    seed: int = 0,
    folder: pathlib.Path | None = None,
    progress: bool = False,
) -> Verdict:
    """Runs attacks on a whole set, each on the examples that withstood those before.

    Args:
      evaluator: of the classifier.
      variables: its weights.
      images: (N, H, W, C) floats in the threat's bounds.
      labels: (N,) integers; None for the model's own answers.
      stages: in order; names must differ.
      targets: (N,) classes to be reached, for targeted stages.
      ids: (N,) the examples' names in the random keys; default their positions.
      seed: of all attacks.
      folder: where finished dispatches are kept (`journal`), to resume from.
      progress: show a bar.

    Raises:
      ValueError: bad images or labels, probabilities or NaN instead of logits, a random model,
        BatchNorm in train mode, an attack of another threat, or a folder of another evaluation.
    """
    validate.check_seed("seed", seed)
    images = evaluator.check_images(images)
    targeted = targets is not None
    threat, diameter = evaluator.threat, evaluator.threat.diameter(images[0].size)
    whole_box = bool(np.all(np.asarray(threat.eps) >= diameter * (1 - 1e-6)))  # the ball covers it
    for stage in stages:
        check_attack(
            stage.name, stage.attack, threat, len(images), targets=targeted, minimal=whole_box
        )
    examine.check_stage_names(stages)
    ids = check_ids(ids, len(images))
    variables = evaluator.replicate(variables)
    has_labels = labels is not None
    if labels is None:
        labels = evaluator.logits(variables, images).argmax(-1)
    labels = np.asarray(labels)
    logits = evaluator.check_model(variables, images, labels)
    aims = labels if targets is None else check_targets(targets, labels, logits.shape[-1])
    raised = examine.examine(evaluator, variables, images, labels, logits, stages)
    if not has_labels:
        raised.append(Flag("own labels", "note", "labels are the model's answers on clean images"))
    weights = None if folder is None else evaluator.model_arrays(variables, images)
    arrays = {"images": images, "labels": labels, "targets": aims if targeted else None, "ids": ids}
    options = {"grid": evaluator.grid}
    description = describe_evaluation(evaluator.threat, stages, seed, options, weights, arrays)
    journal = Journal(folder, description, logits)

    clean = logits.argmax(-1) == labels
    start = clean if not targeted else ~flags.is_fooled(logits, aims, targeted=True)
    examples = Examples.of(images, aims, ids)
    x_adv = images.astype(np.promote_types(images.dtype, np.float32))
    standing = _Progress(start.copy(), x_adv, logits.copy())
    with tqdm(total=len(stages) * int(start.sum()), disable=not progress, unit="image") as bar:
        for stage in stages:
            began, rows = time.monotonic(), standing.begin(stage)
            bar.set_postfix_str(standing.summary(stage))
            dispatch = functools.partial(_attack, evaluator, variables, stage, examples, seed)
            for done in journal.replay_and_run(stage.name, rows, evaluator.split_rows, dispatch):
                standing.add(stage, done)
                bar.set_postfix_str(standing.summary(stage))
                bar.update(len(done["asked"]))
            standing.end(stage)
            robust, seconds = standing.left.mean(), time.monotonic() - began
            LOG.info(f"{stage.name}: {robust:.2%} robust, {seconds:.0f} s")
    survivors = {"clean": start, **standing.by_attack}
    raised += flags.survivor_flags({n: int(b.sum()) for n, b in survivors.items()}, len(images))
    if stages:
        raised += _unconfirmed_flags(standing.unconfirmed)
        answers = standing.answers[start]
        raised += flags.answer_flags(answers, len(answers), "images after the attacks")
    return Verdict(
        clean,
        standing.left,
        standing.by_attack,
        standing.x_adv,
        standing.passes,
        tuple(raised),
        standing.seconds,
    )


def _attack(
    evaluator: Evaluator,
    variables: PyTree,
    stage: Stage,
    examples: Examples,
    seed: int,
    rows: np.ndarray,
) -> dict[str, np.ndarray]:
    """What one dispatch of a stage writes in the journal.

    Args:
      evaluator: of the classifier.
      variables: its weights.
      stage: of the cascade.
      examples: all of the evaluation.
      seed: of all attacks.
      rows: (n,) the examples of this dispatch.

    Returns:
      "rows" of the fooled examples and their "x_adv"; of all its examples the "logits" at the end
      and "seconds"; "unconfirmed", how many wins were not confirmed at first, and then won.
    """
    began = time.monotonic()
    attacked = evaluator.attack(stage.name, stage.attack, variables, examples.take(rows), seed=seed)
    fooled, unconfirmed = attacked.fooled, attacked.unconfirmed
    return {
        "rows": rows[fooled],
        "x_adv": attacked.x_adv[fooled],
        "logits": attacked.logits,
        "unconfirmed": np.asarray([unconfirmed.sum(), (unconfirmed & fooled).sum()]),
        "seconds": np.asarray(time.monotonic() - began),
    }


@dataclasses.dataclass(eq=False)
class _Progress:
    """What a cascade has found so far.

    Attributes:
      left: (N,) bool, who withstands every attack so far.
      x_adv: (N, ...) the adversarial image of each example, else the image itself.
      answers: (N, K) the model's logits of the last attack's image.
      by_attack: {stage: (N,) bool}, `left` after each stage.
      passes: {stage: (forward, backward)}.
      unconfirmed: {stage: (2,)} counts of wins that a plain pass did not confirm, and of those that
        were won again.
      seconds: of all dispatches.
    """

    left: np.ndarray
    x_adv: np.ndarray
    answers: np.ndarray
    by_attack: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    passes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    unconfirmed: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def begin(self, stage: Stage) -> np.ndarray:
        """The rows that a stage attacks."""
        rows = np.flatnonzero(self.left)
        self.passes[stage.name] = (stage.forward * len(rows), stage.backward * len(rows))
        self.unconfirmed[stage.name] = np.zeros(2, int)
        return rows

    def add(self, stage: Stage, done: Mapping[str, np.ndarray]) -> None:
        """Adds what one dispatch found."""
        self.left[done["rows"]] = False
        self.x_adv[done["rows"]] = done["x_adv"]
        self.answers[done["asked"]] = done["logits"]
        self.unconfirmed[stage.name] += done["unconfirmed"]
        self.seconds += float(done["seconds"])

    def end(self, stage: Stage) -> None:
        """Keeps who is left after a stage."""
        self.by_attack[stage.name] = self.left.copy()

    def summary(self, stage: Stage) -> str:
        """The progress bar's text."""
        return f"{stage.name}, {self.left.mean():.2%} robust"


def _unconfirmed_flags(counts: dict[str, np.ndarray]) -> list[Flag]:
    """The flag of wins that only the attack's own program saw.

    Args:
      counts: `_Progress.unconfirmed`.
    """
    lost, won = (int(sum(column)) for column in zip(*counts.values(), strict=True))
    if not lost:
        return []
    evidence = (
        f"{lost} wins, or near ones, were lost to rounding: a plain forward pass does not confirm "
        f"them; attacked again with a lead to reach, {won} were won"
    )
    return [Flag("unconfirmed wins", "note" if won == lost else "warning", evidence)]
