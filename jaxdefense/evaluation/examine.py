"""The questions that are asked of a classifier before anything is attacked."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdefense.evaluation import flags
from jaxdefense.evaluation.evaluator import Evaluator, bare
from jaxdefense.evaluation.flags import Flag
from jaxdefense.evaluation.verdict import Stage
from jaxdefense.types import Images, Labels, PyTree

_ASKED = 128  # images of which, with points beside them, a gradient is asked before any attack


def check_names(stages: Sequence[Stage]) -> None:
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
    found = flags.about_logits(logits, labels)
    some = slice(_ASKED)
    eps = np.broadcast_to(np.asarray(evaluator.threat.eps, np.float32), len(images))[some]
    x = np.concatenate(
        [images[some], flags.nearby(images[some], evaluator.threat.resized(jnp.asarray(eps)))]
    )
    y = np.concatenate([labels[some]] * 2)
    answers = evaluator.logits(variables, x[len(x) // 2 :])
    found += flags.about_answers(answers, len(answers), "points of the balls, drawn at random")

    def shares(variables: PyTree, x: Images, y: Labels, eps: Any) -> Any:
        def predict(z: Images) -> Any:
            return evaluator.apply(variables, z)

        return flags.gradient_shares(predict, x, y, evaluator.threat.resized(eps))

    try:
        given = (x, y, np.concatenate([eps, eps]))
        asked = evaluator.over("gradients", shares, variables, *given)
        found += flags.about_gradients(asked)
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
    if unknown := [stage.name for stage in stages if bare(stage.attack)]:
        evidence = f"{', '.join(unknown)}: bare functions, of which no eps is known"
        found.append(Flag("attack without its threat", "note", evidence))
    found += [Flag("few classes", "note", stage.note) for stage in stages if stage.note]
    return found
