"""Protocols: a trained run judged on its whole test set, as a record."""

import time
from typing import Any

from jaxdefense import data
from jaxdefense.evaluation import records, robust
from jaxdefense.train.run import Run
from jaxdefense.types import PyTree


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
      examples: only the first so many test examples; the record then says so.
      progress: show bars.

    Raises:
      ValueError: see `robust.Evaluator.check`.
    """
    began = time.monotonic()
    arrays = run.arrays("test")
    if examples is not None:
        arrays = arrays.take(slice(examples))
    images = data.to_float(arrays.images)
    results = {}
    for predictor in run.defense.predictors:
        evaluator = robust.Evaluator(
            run.apply(predictor),
            run.threat,
            batch_size=run.config["evaluation"].get("batch_size", 500),
        )
        bits = evaluator.bits(
            variables,
            images,
            arrays.labels,
            arrays.ids,
            run.attacks,
            seed=run.seed,
            progress=progress,
        )
        results[predictor] = robust.summary(bits, arrays.labels, arrays.num_classes)
    return records.make(
        run.config["name"],
        run.config,
        results,
        seed=run.seed,
        seconds=time.monotonic() - began,
        protocol="paper",
        training=training,
        reported=run.config.get("reported", {}),
    )
