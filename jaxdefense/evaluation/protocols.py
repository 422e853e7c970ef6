"""Protocols: a trained run judged on its whole test set, as a record."""

import dataclasses
import json
import math
import operator
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import attacks, data, distributed, registry, validate
from jaxdefense.attacks import checks
from jaxdefense.evaluation import cascade, records
from jaxdefense.evaluation.audit import Audit
from jaxdefense.evaluation.audit import audit as judge
from jaxdefense.evaluation.crafting import Apply
from jaxdefense.evaluation.evaluator import Attacked, Evaluator, Examples, summarize
from jaxdefense.evaluation.journal import Journal, hash_arrays, keeps_folder
from jaxdefense.runs.run import Run
from jaxdefense.types import HostArray, Images, Predict, PyTree, Threat

_SHOWN = 6  # examples in a gallery

# Takes a predictor's name, its evaluator, its variables, the examples and their adversarial images.
Keep = Callable[[str, Evaluator, PyTree, data.Arrays, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """A run and its test examples, timed since `begin`."""

    run: Run
    variables: PyTree
    arrays: data.Arrays
    began: float

    @classmethod
    def begin(cls, run: Run, variables: PyTree, examples: int | None) -> "_Measurement":
        """Starts the clock and loads the first so many test examples, or all."""
        if examples is not None:
            checks.check_count("examples", examples)
        distributed.check_same_values("evaluation", {"examples": examples, "config": run.config})
        began = time.monotonic()
        return cls(run, variables, run.arrays("test").take(slice(examples)), began)

    def evaluator(self, predictor: str, journal: Journal | None = None) -> Evaluator:
        return Evaluator(
            self.run.apply(predictor),
            self.run.threat,
            batch_size=self.batch_size,
            journal=journal,
        )

    def journal(self, folder: pathlib.Path | None, predictor: str) -> Journal | None:
        """Keeps what attacks on a predictor find, in a folder of its own."""
        if folder is None:
            return None
        images = data.to_float(self.arrays.images)
        config = json.dumps(self.run.config, sort_keys=True, default=str)
        description = {
            "config": hash_arrays(config.encode()),
            "predictor": predictor,
            "weights": hash_arrays(*map(np.asarray, jax.tree.leaves(self.variables))),
            "images": hash_arrays(images, self.arrays.labels, self.arrays.ids),
        }
        logits = self.evaluator(predictor).logits(self.variables, images)
        return Journal(folder / predictor, description, logits)

    @property
    def batch_size(self) -> int | None:
        """The config's, or None for the evaluator's own, which large images would overflow."""
        asked = self.run.config["evaluation"].get("batch_size")
        fitting = self.run.judging_batch(self.arrays.images.shape)
        return fitting if asked is None and fitting < 512 else asked

    def record(self, results: Any, *, seconds: float | None = None, **more: Any) -> records.Record:
        """The record of results, which took `seconds`, by default those since `begin`."""
        seconds = time.monotonic() - self.began if seconds is None else seconds
        image = data.to_float(self.arrays.images[:1])
        if notes := self.arrays.notes:  # what was done to the data to make them so
            more["dataset"] = {"notes": list(notes)}
        return records.make(
            self.run.name,
            self.run.config,
            results,
            seed=self.run.seed,
            seconds=seconds,
            reported=self.run.config.get("reported", {}),
            parameters={
                name: count_parameters(self.run.apply(name), self.variables, image)
                for name in results
            },
            **more,
        )


# Names of BatchNorm's running statistics, which are no parameters.
_STATISTICS = ("mean", "var")


def count_parameters(apply: Apply, variables: PyTree, images: HostArray) -> int:
    """How many numbers a predictor computes with, without BatchNorm's running statistics.

    Counted in its program: networks that it does not use (a teacher, a discriminator, a
    projector) and a stack's other members do not count.

    Args:
      apply: (variables, images) -> logits.
      variables: its weights.
      images: (B, H, W, C), whose shape counts.
    """
    program = jax.make_jaxpr(apply)(variables, images).jaxpr
    live = set(map(id, program.outvars))
    read: dict[int, int] = {}  # variable: how many of its numbers are used
    for equation in reversed(program.eqns):
        if not any(id(out) in live for out in equation.outvars):
            continue
        live |= set(map(id, equation.invars))
        for variable in equation.invars:
            part = equation.outvars[0] if equation.primitive.name == "slice" else variable
            used = math.prod(part.aval.shape)  # type: ignore[attr-defined]
            read[id(variable)] = max(read.get(id(variable), 0), used)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    count = 0
    for (path, _), variable in zip(leaves, program.invars, strict=False):  # the images come last
        if jax.tree_util.keystr(path[-1:], simple=True) not in _STATISTICS:
            count += read.get(id(variable), 0)
    return count


@keeps_folder
def configured(
    run: Run,
    variables: PyTree,
    *,
    training: dict[str, Any],
    examples: int | None = None,
    folder: pathlib.Path | None = None,
    progress: bool = False,
    keep: Keep | None = None,
) -> records.Record:
    """Clean accuracy and the config's own attacks, for every predictor of the defence.

    Args:
      run: what was trained.
      variables: {"params", "carry"}.
      training: the checkpoint and its metadata, kept in the record.
      examples: only the first so many test examples; the record's "n" says so.
      folder: keeps finished dispatches, so that a killed evaluation goes on.
      progress: show bars.
      keep: called with each predictor's adversarial images, those of the first attack that fools
        it, else the image itself.

    Raises:
      ValueError: see `Evaluator.check_model`, or a folder of another evaluation.
    """
    measurement = _Measurement.begin(run, variables, examples)
    arrays = measurement.arrays
    images = data.to_float(arrays.images)
    results: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for predictor in run.defense.predictors:
        journal = measurement.journal(folder, predictor)
        evaluator, found = measurement.evaluator(predictor, journal), _FirstFound(images)
        bits = evaluator.bits(
            variables,
            images,
            arrays.labels,
            arrays.ids,
            run.attacks,
            seed=run.seed,
            progress=progress,
            keep=found if keep else None,
        )
        if keep:
            keep(predictor, evaluator, variables, arrays, found.x_adv)
        results[predictor] = summarize(bits, arrays.labels, arrays.num_classes)
        if predictor == run.defense.primary and run.attacks:
            more["examples"] = _fooled_examples(measurement, evaluator, bits)
    made = {name: repr(attack) for name, attack in run.attacks.items()}
    return measurement.record(
        results, protocol="configured", training=training, attacks=made, **more
    )


def _fooled_examples(
    measurement: _Measurement, evaluator: Evaluator, bits: dict[str, np.ndarray]
) -> dict[str, Any]:
    """A few examples that the hardest attack fooled, made again: images, labels, answers."""
    run, arrays = measurement.run, measurement.arrays
    name = min(run.attacks, key=lambda attack: bits[attack].mean())
    rows = np.flatnonzero(bits["clean"] & ~bits[name])[:_SHOWN]
    if not len(rows):
        return {}
    images = evaluator.check_images(data.to_float(arrays.images))
    few = Examples.of(images, arrays.labels, arrays.ids).take(rows)
    attacked = evaluator.attack(name, run.attacks[name], measurement.variables, few, seed=run.seed)
    purifier = run.defense.purifiers.get(run.defense.primary)
    variables = jax.tree.map(jnp.asarray, measurement.variables)
    purify = purifier.purify(variables["params"], variables["carry"]) if purifier else None
    said = attacked.logits.argmax(-1)
    return {"attack": name, **_pack(rows, few.images, attacked.x_adv, few.labels, said, purify)}


def _pack(
    rows: np.ndarray,
    images: np.ndarray,
    x_adv: np.ndarray,
    labels: np.ndarray,
    said: np.ndarray,
    purify: Callable[[Images], Images] | None,
) -> dict[str, Any]:
    """Examples for the eye: which they are, what was said of `x_adv`, the images."""
    shown = {
        "rows": rows.tolist(),
        "labels": labels.tolist(),
        "said": said.tolist(),
        "clean": records.pack_images(images),
        "adversarial": records.pack_images(x_adv),
    }
    if purify is not None:
        shown["cleaned"] = records.pack_images(np.asarray(purify(jnp.asarray(x_adv))))
    return shown


class _FirstFound:
    """Keeps each example's adversarial image, of the first attack that finds one."""

    def __init__(self, images: np.ndarray):
        self.x_adv, self._found = images.copy(), np.zeros(len(images), bool)

    def __call__(self, rows: np.ndarray, attacked: Attacked) -> None:
        new = attacked.fooled & ~self._found[rows]
        self.x_adv[rows[new]] = attacked.x_adv[new]
        self._found[rows[new]] = True


def autoattack(
    run: Run,
    variables: PyTree,
    *,
    training: dict[str, Any],
    examples: int | None = None,
    folder: pathlib.Path | None = None,
    progress: bool = False,
    keep: Keep | None = None,
) -> records.Record:
    """AutoAttack (standard) on the deployed predictor, AA-fast beside it.

    A defence that declares a class for some of its predictors (`Defense.judged`) is judged by these
    instead, each on the examples of its class alone.

    Args:
      run: what was trained.
      variables: {"params", "carry"}.
      training: the checkpoint and its metadata, kept in the record.
      examples: only the first so many test examples; the record's "n" says so.
      folder: keeps finished dispatches, so that a killed evaluation goes on.
      progress: show bars.
      keep: called with each predictor's adversarial images.

    Returns:
      A record whose results hold "clean", "aa-fast" (APGD-CE and APGD-T), "autoattack", and under
      "cascade" the flags and, for each predictor, the survivors after each attack and the passes.

    Raises:
      ValueError: see `cascade.run_stages`.
    """
    measurement = _Measurement.begin(run, variables, examples)
    stages = cascade.stages(run.threat, measurement.arrays.num_classes)
    evaluator = measurement.evaluator(run.defense.primary)
    judged = _judged(run, variables, measurement.arrays)
    results: dict[str, Any] = {}
    told: dict[str, Any] = {}
    flags: list[dict[str, str]] = []
    seconds = 0.0
    for name, (weights, own) in judged.items():
        verdict = cascade.run_stages(
            evaluator,
            weights,
            data.to_float(own.images),
            own.labels,
            stages,
            ids=own.ids,
            seed=run.seed,
            folder=folder / name if folder and len(judged) > 1 else folder,
            progress=progress,
        )
        if keep:
            keep(name, evaluator, weights, own, verdict.x_adv)
        bits = {"clean": verdict.clean, "aa-fast": verdict.fast, "autoattack": verdict.robust}
        results[name] = summarize(bits, own.labels, own.num_classes)
        survivors = {stage: int(left.sum()) for stage, left in verdict.by_attack.items()}
        told[name] = {"survivors": survivors, "passes": verdict.passes}
        flags += [{"predictor": name, **dataclasses.asdict(flag)} for flag in verdict.flags]
        seconds += verdict.seconds
    told["flags"] = flags
    return measurement.record(
        results,
        seconds=seconds,
        protocol="autoattack",
        training=training,
        cascade=told,
        attacks={stage.name: repr(stage.attack) for stage in stages},
    )


def _judged(run: Run, variables: PyTree, arrays: data.Arrays) -> dict[str, Any]:
    """{predictor: (variables, examples)}: what AutoAttack judges, all by the deployed predictor.

    Predictors with a class each are the members of a stack, in order. A member's slice of
    the variables takes the first place there, so that each attack is compiled once for all.
    """
    classes = run.defense.judged
    if not classes:
        return {run.defense.primary: (variables, arrays)}
    judged = {}
    for i, (name, label) in enumerate(classes.items()):
        own = arrays.take(arrays.labels == label)
        if len(own):
            member = operator.itemgetter(slice(i, i + 1))
            judged[name] = (jax.tree.map(member, variables), own)
    return judged


# What a config's evaluation.audit may hold: `audit.audit`'s options.
_AUDIT_OPTIONS = ("queries", "restarts", "samples", "stages", "steps")


def check_audit_options(options: Mapping[str, Any], threat: Threat) -> None:
    """Checks the section "evaluation.audit" of a config.

    Args:
      options: of `audit.audit`.
      threat: of the run; the stages are those of its AutoAttack.

    Raises:
      ValueError: an unknown option, or one of another type or out of range.
    """
    registry.check_known("option of evaluation.audit", options, _AUDIT_OPTIONS)
    validate.check_types("evaluation.audit", options, validate.declared(judge))
    validate.check_positive_numbers("evaluation.audit", options)
    cascade.stages(threat, 10, attacks=options.get("stages", ()))  # refuses an unknown one


@keeps_folder
def audit(
    run: Run,
    variables: PyTree,
    *,
    training: dict[str, Any],
    examples: int | None = None,
    folder: pathlib.Path | None = None,
    progress: bool = False,
    keep: Keep | None = None,
) -> records.Record:
    """The honesty report of the deployed predictor and of every one that cleans images first.

    Args:
      run: what was trained. Its config's "evaluation": {"audit": {...}} may change `audit.audit`'s
        steps, restarts, stages, queries and samples.
      variables: {"params", "carry"}.
      training: the checkpoint and its metadata, kept in the record.
      examples: only the first so many test examples; the record's "n" says so.
      folder: keeps finished dispatches, so that a killed evaluation goes on.
      progress: show bars.
      keep: called with each predictor's adversarial images.

    Returns:
      A record whose results hold "clean", each tier's attacks and "worst" (per example, without
      T0), and under "audit" for each predictor its "checks", the "curve" (eps, accuracy), and
      "examples" for the eye: images in steps of 1/255.

    Raises:
      ValueError: an unknown option, a folder of another evaluation, or see `audit.audit`.
    """
    options = dict(run.config["evaluation"].get("audit", {}))
    check_audit_options(options, run.threat)
    measurement = _Measurement.begin(run, variables, examples)
    arrays = measurement.arrays
    images, labels = data.to_float(arrays.images), arrays.labels
    params, carry = jax.tree.map(jnp.asarray, (variables["params"], variables["carry"]))
    results, told = {}, {}
    for name in dict.fromkeys((run.defense.primary, *run.defense.purifiers)):
        predict = run.defense.predictors[name](params, carry)
        known: dict[str, Any] = {}
        if name in run.defense.purifiers:
            purifier = run.defense.purifiers[name]
            climb = attacks.pgd(run.threat, steps=options.get("steps", 50), best=True)
            known = {
                "base": run.defense.predictors[purifier.base](params, carry),
                "purify": purifier.purify(params, carry),
                "extra": {
                    f"pgd {detour}": attacks.transfer(climb, [other(params, carry)])
                    for detour, other in purifier.detours.items()
                },
            }
        report = judge(
            predict,
            images,
            labels,
            run.threat,
            seed=run.seed,
            batch_size=measurement.batch_size,
            journal=measurement.journal(folder, name),
            progress=progress,
            **known,
            **options,
        )
        if keep:
            keep(name, measurement.evaluator(name), variables, arrays, report.x_adv)
        found = report.record(labels, arrays.num_classes)
        results[name] = found.pop("tiers")
        told[name] = {**found, "examples": _shown(report, images, labels, predict, known)}
    return measurement.record(results, protocol="audit", training=training, audit=told)


def _shown(
    report: Audit,
    images: np.ndarray,
    labels: np.ndarray,
    predict: Predict,
    known: dict[str, Callable[[Images], Images]],
) -> dict[str, Any]:
    """A few examples, first those that an attack turned: images, labels and what was said."""
    turned = np.any(report.x_adv != images, (1, 2, 3))
    rows = np.argsort(~turned, kind="stable")[:_SHOWN]
    x, x_adv = images[rows], report.x_adv[rows]
    said = np.argmax(predict(jnp.asarray(x_adv)), -1)
    return _pack(rows, x, x_adv, labels[rows], said, known.get("purify"))
