"""The questions that are asked of a model before it is attacked.

`ask` asks them, of some images and of random points in their balls. Two readers word the answers:
`examine` as the `Flag`s of `evaluation.autoattack`, and `evaluation.audit` as its `Check`s.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxdefense.attacks.checks import check_attack_name
from jaxdefense.attacks.ensemble import Stage
from jaxdefense.evaluation import flags
from jaxdefense.evaluation.checks import has_unknown_threat
from jaxdefense.evaluation.evaluator import Evaluator
from jaxdefense.evaluation.flags import Flag
from jaxdefense.types import Array, Images, Labels, PerExample, PyTree

_EXAMINED = 128  # images that `examine` asks about


def check_stage_names(stages: Sequence[Stage]) -> None:
    """Checks that no two stages have one name, which the random keys and a journal go by.

    Args:
      stages: of a cascade.

    Raises:
      ValueError: two of one name, or one that no attack may have.
    """
    names = [stage.name for stage in stages]
    for name in names:
        check_attack_name(name)
        if names.count(name) > 1:
            raise ValueError(f"two stages are called {name!r}: name them differently")


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a model answered about n images and a random point in the ball of each.

    Attributes:
      nearby: (n, K) logits of the random points.
      gradients: (2 n, 3) of `flags.gradient_shares`, the images first; None where JAX cannot
        differentiate the model.
      why_no_gradients: what JAX said then, else "".
      loop: whether the forward pass iterates (`while` or `scan`).
    """

    nearby: np.ndarray
    gradients: np.ndarray | None
    why_no_gradients: str
    loop: bool


def ask(
    evaluator: Evaluator, variables: PyTree, images: np.ndarray, labels: np.ndarray, *, count: int
) -> Answers:
    """Asks a model about its gradients, its program and points beside the images.

    Args:
      evaluator: of the classifier.
      variables: its weights.
      images: (N, H, W, C).
      labels: (N,).
      count: how many of the images, from the first.
    """
    threat, first = evaluator.threat, slice(count)
    eps = np.broadcast_to(np.asarray(threat.eps, np.float32), len(images))[first]
    points = flags.random_points(images[first], threat)

    def shares(variables: PyTree, x: Images, y: Labels, eps: PerExample) -> Array:
        predict = functools.partial(evaluator.apply, variables)
        return flags.gradient_shares(predict, x, y, threat.with_eps(eps))

    pairs = ((images[first], points), (labels[first], labels[first]), (eps, eps))
    both = [np.concatenate(pair) for pair in pairs]
    gradients, why_none = None, ""
    try:
        gradients = evaluator.map_rows("gradients", shares, variables, *both)
    except flags.NoGradients as error:
        why_none = str(error)
    return Answers(
        nearby=evaluator.logits(variables, points),
        gradients=gradients,
        why_no_gradients=why_none,
        loop=flags.has_loop(functools.partial(evaluator.apply, variables), jnp.asarray(images[:1])),
    )


def examine(
    evaluator: Evaluator,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    stages: Sequence[Stage],
) -> list[Flag]:
    """The flags of a model and of the attacks on it, before any attack.

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
    answers = ask(evaluator, variables, images, labels, count=_EXAMINED)
    result = flags.logit_flags(logits, labels) + flags.image_flags(images, evaluator.threat)
    where = "points of the balls, drawn at random"
    result += flags.answer_flags(answers.nearby, len(answers.nearby), where)
    if answers.gradients is not None:
        result += flags.gradient_flags(answers.gradients)
    elif any(stage.backward for stage in stages):
        raise ValueError(
            f"{answers.why_no_gradients}; attacks=('square',) needs none, and evaluation.audit "
            f"goes on without"
        )
    else:
        result.append(Flag("no gradients", "warning", answers.why_no_gradients))
    if answers.loop:
        evidence = "the model iterates (while or scan): attack what it optimises, too"
        result.append(Flag("loop in the forward pass", "warning", evidence))
    if unknown := [stage.name for stage in stages if has_unknown_threat(stage.attack)]:
        evidence = f"{', '.join(unknown)}: bare functions, of which no eps is known"
        result.append(Flag("attack without its threat", "note", evidence))
    return result + [Flag("few classes", "note", stage.note) for stage in stages if stage.note]
