"""Protocols: a trained run judged on its whole test set, as a record."""

import pathlib
import time
from typing import Any

from jaxdefense import data
from jaxdefense.attacks import ensemble
from jaxdefense.evaluation import cascade, records, robust
from jaxdefense.train.run import Run
from jaxdefense.types import PyTree


def _record(run: Run, results: Any, seconds: float, **more: Any) -> records.Record:
    return records.make(
        run.config["name"],
        run.config,
        results,
        seed=run.seed,
        seconds=seconds,
        reported=run.config.get("reported", {}),
        **more,
    )


def _evaluator(run: Run, predictor: str) -> robust.Evaluator:
    batch_size = run.config["evaluation"].get("batch_size", 512)
    return robust.Evaluator(run.apply(predictor), run.threat, batch_size=batch_size)


def paper(
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
      training: the train summary, kept in the record.
      examples: only the first so many test examples; the record's "n" says so.
      progress: show bars.

    Raises:
      ValueError: see `robust.Evaluator.check`.
    """
    began = time.monotonic()
    arrays = run.arrays("test").take(slice(examples))
    images = data.to_float(arrays.images)
    results = {}
    for predictor in run.defense.predictors:
        bits = _evaluator(run, predictor).bits(
            variables,
            images,
            arrays.labels,
            arrays.ids,
            run.attacks,
            seed=run.seed,
            progress=progress,
        )
        results[predictor] = robust.summary(bits, arrays.labels, arrays.num_classes)
    seconds = time.monotonic() - began
    return _record(run, results, seconds, protocol="paper", training=training)


def honest(
    run: Run,
    variables: PyTree,
    *,
    training: dict[str, Any],
    examples: int | None = None,
    folder: pathlib.Path | None = None,
    progress: bool = False,
) -> records.Record:
    """AutoAttack (standard) on the deployed predictor, AA-fast beside it.

    Args:
      run, variables, training, examples, progress: as in `paper`.
      folder: keeps finished dispatches, so that a killed evaluation goes on.

    Returns:
      A record whose results hold "clean", "aa-fast" (APGD-CE and APGD-T), "autoattack", and under
      "cascade" the survivors after each attack, the passes spent and the flags.

    Raises:
      ValueError: see `cascade.run`.
    """
    arrays = run.arrays("test").take(slice(examples))
    verdict = cascade.run(
        _evaluator(run, run.defense.primary),
        variables,
        data.to_float(arrays.images),
        arrays.labels,
        cascade.stages(run.threat, arrays.num_classes),
        ids=arrays.ids,
        seed=run.seed,
        folder=folder,
        progress=progress,
    )
    bits = {"clean": verdict.clean, "aa-fast": verdict.fast, "autoattack": verdict.robust}
    results = {run.defense.primary: robust.summary(bits, arrays.labels, arrays.num_classes)}
    told = {
        "survivors": {name: int(left.sum()) for name, left in verdict.by_attack.items()},
        "passes": verdict.passes,
        "flags": [*verdict.flags, *ensemble.notes(run.threat, "standard", arrays.num_classes)],
    }
    return _record(
        run, results, verdict.seconds, protocol="honest", training=training, cascade=told
    )
