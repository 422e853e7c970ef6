"""Protocols: a trained run judged on its whole test set, as a record."""

import dataclasses
import operator
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import attacks, data, registry
from jaxdefense.evaluation import cascade, records
from jaxdefense.evaluation.audit import Audit
from jaxdefense.evaluation.audit import audit as judge
from jaxdefense.evaluation.evaluator import Evaluator, summarize
from jaxdefense.runs.run import Run
from jaxdefense.types import Images, Predict, PyTree


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """A run and its test examples, timed since `begin`."""

    run: Run
    arrays: data.Arrays
    began: float

    @classmethod
    def begin(cls, run: Run, examples: int | None) -> "_Measurement":
        """Starts the clock and loads the first so many test examples, or all."""
        began = time.monotonic()
        return cls(run, run.arrays("test").take(slice(examples)), began)

    def evaluator(self, predictor: str) -> Evaluator:
        return Evaluator(self.run.apply(predictor), self.run.threat, batch_size=self.batch_size)

    @property
    def batch_size(self) -> int | None:
        """The config's, or None for the evaluator's own, which large images would overflow."""
        asked = self.run.config["evaluation"].get("batch_size")
        fitting = self.run.judging_batch(self.arrays.images.shape)
        return fitting if asked is None and fitting < 512 else asked

    def record(self, results: Any, *, seconds: float | None = None, **more: Any) -> records.Record:
        """The record of results, which took `seconds`, by default those since `begin`."""
        if notes := self.arrays.notes:  # what was done to the data to make them so
            more["dataset"] = {"notes": list(notes)}
        return records.make(
            self.run.name,
            self.run.config,
            results,
            seed=self.run.seed,
            seconds=time.monotonic() - self.began if seconds is None else seconds,
            reported=self.run.config.get("reported", {}),
            **more,
        )


def configured(
    run: Run,
    variables: PyTree,
    *,
    training: dict[str, Any],
    examples: int | None = None,
    progress: bool = False,
) -> records.Record:
    """Clean accuracy and the config's own attacks, for every predictor of the defence.

    Args:
      run: what was trained.
      variables: {"params", "carry"}.
      training: the checkpoint and its metadata, kept in the record.
      examples: only the first so many test examples; the record's "n" says so.
      progress: show bars.

    Raises:
      ValueError: see `Evaluator.check_model`.
    """
    measurement = _Measurement.begin(run, examples)
    arrays = measurement.arrays
    images = data.to_float(arrays.images)
    results = {}
    for predictor in run.defense.predictors:
        bits = measurement.evaluator(predictor).bits(
            variables,
            images,
            arrays.labels,
            arrays.ids,
            run.attacks,
            seed=run.seed,
            progress=progress,
        )
        results[predictor] = summarize(bits, arrays.labels, arrays.num_classes)
    made = {name: repr(attack) for name, attack in run.attacks.items()}
    return measurement.record(results, protocol="configured", training=training, attacks=made)


def autoattack(
    run: Run,
    variables: PyTree,
    *,
    training: dict[str, Any],
    examples: int | None = None,
    folder: pathlib.Path | None = None,
    progress: bool = False,
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

    Returns:
      A record whose results hold "clean", "aa-fast" (APGD-CE and APGD-T), "autoattack", and under
      "cascade" the flags and, for each predictor, the survivors after each attack and the passes.

    Raises:
      ValueError: see `cascade.run_stages`.
    """
    measurement = _Measurement.begin(run, examples)
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

_SHOWN = 6  # examples in an audit's gallery


def audit(
    run: Run,
    variables: PyTree,
    *,
    training: dict[str, Any],
    examples: int | None = None,
    progress: bool = False,
) -> records.Record:
    """The honesty report of the deployed predictor and of every one that cleans images first.

    Args:
      run: what was trained. Its config's "evaluation": {"audit": {...}} may change `audit.audit`'s
        steps, restarts, stages, queries and samples.
      variables: {"params", "carry"}.
      training: the checkpoint and its metadata, kept in the record.
      examples: only the first so many test examples; the record's "n" says so.
      progress: show bars.

    Returns:
      A record whose results hold "clean", each tier's attacks and "worst" (per example, without
      T0), and under "audit" for each predictor its "checks", the "curve" (eps, accuracy), and
      "examples" for the eye: images in steps of 1/255.

    Raises:
      ValueError: an unknown option, or see `audit.audit`.
    """
    options = dict(run.config["evaluation"].get("audit", {}))
    registry.check_known("option of evaluation.audit", options, _AUDIT_OPTIONS)
    measurement = _Measurement.begin(run, examples)
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
            progress=progress,
            **known,
            **options,
        )
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
    shown = {
        "rows": rows.tolist(),
        "labels": labels[rows].tolist(),
        "said": np.argmax(predict(jnp.asarray(x_adv)), -1).tolist(),
        "clean": records.pack_images(x),
        "adversarial": records.pack_images(x_adv),
    }
    if "purify" in known:
        cleaned = np.asarray(known["purify"](jnp.asarray(x_adv)))
        shown["cleaned"] = records.pack_images(cleaned)
    return shown
