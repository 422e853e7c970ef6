"""Judges a randomised model: attacks on its expectation, a verdict over draws they never saw.

A verdict by one draw would hold for that draw alone. Here every step of an attack has fresh draws,
whose losses and gradients are averaged. No attack stops early, since one fooled draw proves little.
Of all attacks' images the worst is chosen by draws of its own, and reported over fresh ones.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdefense import losses
from jaxdefense.attacks import checks
from jaxdefense.attacks.ensemble import Stage
from jaxdefense.attacks.outcome import mean_over_draws
from jaxdefense.evaluation import examine, flags
from jaxdefense.evaluation.checks import check_attack, check_ids
from jaxdefense.evaluation.evaluator import Apply, Evaluator, Examples, attack_keys
from jaxdefense.evaluation.flags import Flag
from jaxdefense.evaluation.journal import LOG, Journal, describe_evaluation, keeps_folder
from jaxdefense.evaluation.verdict import RandomVerdict
from jaxdefense.types import Array, HostArray, Images, Labels, Logits, Predict, PyTree


@keeps_folder
def run_stages(
    evaluator: Evaluator,
    variables: PyTree,
    images: np.ndarray,
    labels: HostArray,
    stages: Sequence[Stage],
    classes: int,
    *,
    draws: int,
    ids: HostArray | None = None,
    seed: int = 0,
    folder: pathlib.Path | None = None,
    progress: bool = False,
) -> RandomVerdict:
    """Runs attacks on every image, and judges the worst ones found over fresh draws.

    Args:
      evaluator: its `apply` is (variables, key, images) -> logits.
      variables: the model's weights.
      images: (N, H, W, C) of `Evaluator.check_images`.
      labels: (N,) integers.
      stages: attacks with `samples`, in order.
      classes: K.
      draws: fresh draws of each image, for the choice and for the verdict alike.
      ids: (N,) the examples' names in the random keys; default their positions.
      seed: of all attacks and draws.
      folder: where finished dispatches are kept, to resume from.
      progress: show a bar.

    Raises:
      ValueError: bad labels or logits, an attack of another threat, or a folder of another
        evaluation.
    """
    checks.check_count("draws", draws)
    labels = np.asarray(labels)
    checks.check_labels(labels, len(images), classes)
    for stage in stages:
        check_attack(stage.name, stage.attack, evaluator.threat, len(images))
    examine.check_stage_names(stages)
    ids = check_ids(ids, len(images))
    variables = evaluator.replicate(variables)
    judge = Draws(evaluator, variables, labels, ids, draws, seed)
    first, second = judge.logits("first", images), judge.logits("second", images)
    checks.check_logits(first, len(images))
    fixed = evaluator.with_model(_one_draw(evaluator, seed))
    logits = fixed.logits(variables, images)
    raised = examine.examine(fixed, variables, images, labels, logits, stages)
    if np.array_equal(first, second):
        evidence = "two draws give the same logits for every image: is the key used?"
        raised.append(Flag("not random", "warning", evidence))
    weights = None if folder is None else evaluator.model_arrays(variables, images, keyed=True)
    arrays = {"images": images, "labels": labels, "ids": ids}
    options = {"draws": draws}
    description = describe_evaluation(evaluator.threat, stages, seed, options, weights, arrays)
    journal = Journal(folder, description, first)

    clean_share = judge.share("clean", images)
    x_adv = images.astype(np.promote_types(images.dtype, np.float32))
    worst = judge.share("choice", images)
    start = worst >= 0.5
    by_attack, passes, seconds = {}, {}, 0.0
    examples = Examples.of(images, labels, ids)

    with tqdm(total=len(stages) * len(images), disable=not progress, unit="image") as bar:
        for stage in stages:
            began = time.monotonic()
            passes[stage.name] = (stage.forward * len(images), stage.backward * len(images))
            dispatch = functools.partial(_craft, evaluator, variables, stage, examples, seed)
            for done in journal.replay_and_run(
                stage.name, examples.rows, evaluator.split_rows, dispatch
            ):
                rows = done["asked"]
                share = judge.share("choice", done["x_adv"], rows)
                better = share < worst[rows]
                worst[rows[better]] = share[better]
                x_adv[rows[better]] = done["x_adv"][better]
                seconds += float(done["seconds"])
                bar.set_postfix_str(f"{stage.name}, {worst.mean():.2%} right")
                bar.update(len(rows))
            by_attack[stage.name] = worst >= 0.5
            LOG.info(f"{stage.name}: {time.monotonic() - began:.0f} s")
    counts = {name: int(bits.sum()) for name, bits in {"clean": start, **by_attack}.items()}
    raised += flags.survivor_flags(counts, len(images))
    share = judge.share("verdict", x_adv)
    return RandomVerdict(
        clean=clean_share >= 0.5,
        robust=share >= 0.5,
        by_attack=by_attack,
        x_adv=x_adv,
        passes=passes,
        flags=tuple(raised),
        seconds=seconds,
        clean_share=clean_share,
        share=share,
        draws=draws,
    )


def _one_draw(evaluator: Evaluator, seed: int) -> Apply:
    """The model with one key for all images: deterministic, so that it can be examined."""

    def apply(variables: PyTree, x: Images) -> Logits:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return jax.vmap(lambda z: evaluator.apply(variables, key, z[None])[0])(x)

    return apply


def _craft(
    evaluator: Evaluator,
    variables: PyTree,
    stage: Stage,
    examples: Examples,
    seed: int,
    rows: np.ndarray,
) -> dict[str, np.ndarray]:
    """What one dispatch of a stage writes in the journal: its images and seconds.

    Args:
      evaluator: of the model.
      variables: its weights.
      stage: an attack with `samples`.
      examples: all of the evaluation.
      seed: of all attacks.
      rows: (n,) the examples of this dispatch.
    """
    began = time.monotonic()
    x_adv, _ = evaluator.craft(stage.name, stage.attack, variables, examples.take(rows), seed=seed)
    return {"x_adv": x_adv, "seconds": np.asarray(time.monotonic() - began)}


class Draws:
    """A randomised model over fresh draws; each example has random keys of its own.

    Args:
      evaluator: its `apply` is (variables, key, images) -> logits.
      variables: the model's weights.
      labels: (N,) integers.
      ids: (N,) the examples' names in the random keys.
      draws: of each image.
      seed: of the draws.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        variables: PyTree,
        labels: np.ndarray,
        ids: np.ndarray,
        draws: int,
        seed: int,
    ):
        self.evaluator, self.variables, self.labels = evaluator, variables, labels
        self.ids, self.draws, self.seed = ids, draws, seed

    def _mean_over(
        self,
        name: str,
        purpose: str,
        values: Callable[[Predict, Images, Labels], Array],
        samples: int,
        x: np.ndarray,
        rows: np.ndarray | None,
    ) -> np.ndarray:
        """The mean of values(predict, x, y) over draws.

        Args:
          name: of what is computed, for the compiled program.
          purpose: other purposes have other draws.
          values: (predict, x, y) -> an array of as many rows.
          samples: draws.
          x: (n, ...) images.
          rows: (n,) the examples that they are; None for all.
        """
        rows = np.arange(len(x)) if rows is None else rows

        def run(variables: PyTree, data: Array, x: Images, y: Labels) -> Array:
            apply = functools.partial(self.evaluator.apply, variables)
            keys = jax.random.wrap_key_data(data)
            return mean_over_draws(apply, keys, samples, lambda predict: values(predict, x, y))

        keys = attack_keys(self.seed, f"draws for the {purpose}", self.ids[rows])
        data = np.asarray(jax.random.key_data(keys))
        arrays = (data, x, self.labels[rows])
        return self.evaluator.map_rows((name, samples), run, self.variables, *arrays)

    def logits(self, purpose: str, x: np.ndarray) -> np.ndarray:
        """The logits (N, K) of one draw.

        Args:
          purpose: other purposes have other draws.
          x: (N, ...) images.
        """
        logits = self._mean_over("a draw", purpose, lambda predict, x, _: predict(x), 1, x, None)
        return logits.astype(np.float32)

    def share(self, purpose: str, x: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """The share (N,) of draws in which each image is classified rightly; ties and NaN are not.

        Args:
          purpose: other purposes have other draws.
          x: (n, ...) images.
          rows: (n,) the examples that they are; default all.
        """

        def right(predict: Predict, x: Images, y: Labels) -> Array:
            return (losses.margin(predict(x), y) < 0).astype(jnp.float32)

        return self._mean_over("draws", purpose, right, self.draws, x, rows)
