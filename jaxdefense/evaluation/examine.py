"""The questions that are asked of a classifier before anything is attacked."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdefense.evaluation import flags
from jaxdefense.evaluation.checks import has_unknown_threat
from jaxdefense.evaluation.evaluator import Evaluator
from jaxdefense.evaluation.flags import Flag
from jaxdefense.evaluation.verdict import Stage
from jaxdefense.types import Images, Labels, PyTree

_ASKED = 128  # images of which, with points beside them, a gradient is asked before any attack


def check_stage_names(stages: Sequence[Stage]) -> None:
    """Stages are told apart by their names, in the random keys and in a journal.

    Args:
      stages: of a cascade.

    Raises:
      ValueError: two of one name.
    """
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two stages are called {name!r}: name them differently")


def examine(
    evaluator: Evaluator,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    stages: Sequence[Stage],
) -> list[Flag]:
    """What is doubtful before an attack: passes on some images and on points beside them.

    Args:
      evaluator: of the classifier.
      variables: its weights.
      images: (N, H, W, C).
      labels: (N,).
      logits: (N, K), clean.
      stages: that will run.

    Raises:
      ValueError: a stage needs gradients, and there are none to be had.
    """
    found = flags.logit_flags(logits, labels)
    some = slice(_ASKED)
    eps = np.broadcast_to(np.asarray(evaluator.threat.eps, np.float32), len(images))[some]
    x = np.concatenate(
        [
            images[some],
            flags.random_points(images[some], evaluator.threat.with_eps(jnp.asarray(eps))),
        ]
    )
    y = np.concatenate([labels[some]] * 2)
    answers = evaluator.logits(variables, x[len(x) // 2 :])
    found += flags.answer_flags(answers, len(answers), "points of the balls, drawn at random")

    def shares(variables: PyTree, x: Images, y: Labels, eps: Any) -> Any:
        def predict(z: Images) -> Any:
            return evaluator.apply(variables, z)

        return flags.gradient_shares(predict, x, y, evaluator.threat.with_eps(eps))

    try:
        given = (x, y, np.concatenate([eps, eps]))
        asked = evaluator.map_rows("gradients", shares, variables, *given)
        found += flags.gradient_flags(asked)
    except flags.NoGradients as error:
        if any(stage.backward for stage in stages):
            raise ValueError(
                f"{error}; attacks=('square',) needs none, and evaluation.audit goes on without"
            ) from error
        found.append(Flag("no gradients", "warning", str(error)))

    def predict(x: Images) -> Any:
        return evaluator.apply(variables, x)

    if flags.has_loop(predict, jnp.asarray(images[:1])):
        evidence = "the model iterates (while or scan): attack what it optimises, too"
        found.append(Flag("loop in the forward pass", "warning", evidence))
    if unknown := [stage.name for stage in stages if has_unknown_threat(stage.attack)]:
        evidence = f"{', '.join(unknown)}: bare functions, of which no eps is known"
        found.append(Flag("attack without its threat", "note", evidence))
    found += [Flag("few classes", "note", stage.note) for stage in stages if stage.note]
    return found
