"""A cascade of attacks over the examples that are still classified rightly.

Each attack runs on the survivors of the one before, packed into few static shapes, so nothing is
compiled again as they dwindle. Keys are per example, so an example's fate does not depend on the
others. Every image that counts as a success is checked again: in the ball, in the box, finite,
and misclassified by a plain forward pass. With a folder, each dispatch is written down when it is
done, and a killed evaluation goes on from there.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdefense import registry
from jaxdefense.attacks import checks, ensemble
from jaxdefense.evaluation import records, robust
from jaxdefense.types import Attack, Predict, PyTree, Threat


class Stage(NamedTuple):
    """One attack of a cascade, and the most passes it spends on an example."""

    name: str
    attack: Attack
    forward: int
    backward: int


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What a cascade found.

    Attributes:
      clean: (N,) bool, classified rightly without an attack.
      robust: (N,) bool, classified rightly under every attack.
      by_attack: {attack: (N,) bool}, the survivors after each attack, in order.
      x_adv: (N, H, W, C), the adversarial image where one was found, else the image itself.
      passes: {attack: (forward, backward)} passes through the model, summed over the examples
        that met the attack; an upper bound, since finished examples leave early.
      flags: what should make a reader doubt the numbers, in words.
      seconds: wall time, of all sessions together where it was resumed.
    """

    clean: np.ndarray
    robust: np.ndarray
    by_attack: dict[str, np.ndarray]
    x_adv: np.ndarray
    passes: dict[str, tuple[int, int]]
    flags: tuple[str, ...]
    seconds: float

    @property
    def fast(self) -> np.ndarray:
        """AA-fast: the survivors of the gradient attacks on the loss (APGD-CE and APGD-T)."""
        names = [name for name in self.by_attack if name.startswith("apgd")]
        return self.by_attack[names[-1]] if names else self.clean


def stages(
    threat: Threat,
    num_classes: int,
    *,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
) -> list[Stage]:
    """AutoAttack's stages.

    Args:
      threat: norm, eps, bounds.
      num_classes: K.
      version: 'standard', 'plus' or 'rand'.
      attacks: only these of its stages, in its order.

    Raises:
      ValueError: unknown version or stage.
    """
    passes = ensemble.budgets(threat, version, num_classes)
    found = ensemble.stages(threat, version, num_classes)
    for name in attacks or ():
        if name not in passes:
            registry.unknown(f"stage of {version}", name, passes)
    return [
        Stage(name, attack, *passes[name])
        for name, attack in found
        if attacks is None or name in attacks
    ]


def autoattack(
    predict: Predict,
    images: np.ndarray,
    labels: np.ndarray,
    threat: Threat,
    *,
    version: str = "standard",
    seed: int = 0,
    batch_size: int | None = None,
    attacks: Sequence[str] | None = None,
    ids: np.ndarray | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool = False,
) -> Verdict:
    """AutoAttack on a whole set: APGD-CE, APGD-T, FAB-T, Square, each on the survivors.

    Args:
      predict: images (B, H, W, C) -> logits (B, K), parameters inside, eval mode.
      images: (N, H, W, C) floats in the threat's bounds.
      labels: (N,) integers.
      threat: Linf, L2 or L1.
      version: 'standard', 'plus' or 'rand' (for a predict made by `attacks.eot`).
      seed: of all attacks.
      batch_size: most examples per dispatch, over all devices; default as `Evaluator`'s.
      attacks: only these stages, e.g. ("apgd-ce", "apgd-t").
      ids: (N,) the examples' names in the random keys; default their positions.
      folder: keep finished dispatches there; the same call then goes on where it was killed.
      progress: show a bar.

    Returns:
      A `Verdict`. What few classes changed is among its flags.

    Raises:
      ValueError: bad images or labels, probabilities or NaN instead of logits, BatchNorm in train
        mode, unknown names, or a folder of another evaluation.

    Reference: Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of
      diverse parameter-free attacks, arXiv 2003.01690. Differences from the authors' programme are
      listed in the attacks' docstrings.
    """
    images = np.asarray(images)
    robust.check_some(images)
    checks.check_images(jnp.asarray(images), threat.bounds)
    classes = checks.num_classes(predict, images[:1])
    verdict = run(
        robust.Evaluator(lambda _, x: predict(x), threat, batch_size=batch_size),
        (),
        images,
        labels,
        stages(threat, classes, version=version, attacks=attacks),
        ids=ids,
        seed=seed,
        folder=None if folder is None else pathlib.Path(folder),
        progress=progress,
    )
    notes = tuple(ensemble.notes(threat, version, classes))
    return dataclasses.replace(verdict, flags=verdict.flags + notes)


class _Journal:
    """One file per finished dispatch; a fingerprint keeps runs apart."""

    def __init__(self, folder: pathlib.Path | None, fingerprint: str):
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "cascade.json"
        if path.exists() and json.loads(path.read_text()).get("fingerprint") != fingerprint:
            raise ValueError(
                f"{folder} holds an evaluation of another model, data, threat or seed; "
                f"choose another folder, or remove it"
            )
        records.write_text(path, json.dumps({"fingerprint": fingerprint}) + "\n")

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays written under `name`, or None."""
        if self.folder is None or not (self.folder / f"{name}.npz").exists():
            return None
        with np.load(self.folder / f"{name}.npz") as file:
            return dict(file)

    def write(self, name: str, **arrays: Any) -> None:
        """Written whole, then renamed."""
        if self.folder is not None:
            temporary = self.folder / f".{name}.tmp.npz"
            np.savez(temporary, **arrays)
            temporary.rename(self.folder / f"{name}.npz")


def run(
    evaluator: robust.Evaluator,
    variables: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    stages: Sequence[Stage],
    *,
    ids: np.ndarray | None = None,
    seed: int = 0,
    folder: pathlib.Path | None = None,
    progress: bool = False,
) -> Verdict:
    """All stages on the whole set, each on the survivors of those before.

    Args:
      evaluator: of the classifier.
      variables: its weights.
      images: (N, H, W, C) floats in the threat's bounds.
      labels: (N,) integers.
      stages: in order; names must differ.
      ids: (N,) the examples' names in the random keys; default their positions.
      seed: of all attacks.
      folder: where finished dispatches are kept, to resume from.
      progress: show a bar.

    Raises:
      ValueError: bad images or labels, probabilities or NaN instead of logits, BatchNorm in train
        mode, or a folder of another evaluation.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    variables = evaluator.place(variables)
    logits = evaluator.check(variables, images, labels)
    clean = logits.argmax(-1) == labels
    told = repr((evaluator.threat, [stage.name for stage in stages], seed, evaluator.large))
    journal = _Journal(folder, _fingerprint(told, images, labels, ids, logits))
    left, x_adv = clean.copy(), images.copy()
    by_attack, passes, seconds = {}, {}, 0.0

    def dispatch(stage: Stage, pack: np.ndarray) -> dict[str, np.ndarray]:
        began = time.monotonic()
        given = (images[pack], labels[pack], ids[pack])
        found, wrong = evaluator.attack(stage.name, stage.attack, variables, *given, seed=seed)
        spent = np.asarray(time.monotonic() - began)
        return {"rows": pack[wrong], "x_adv": found[wrong], "seconds": spent}

    with tqdm(total=len(stages) * int(clean.sum()), disable=not progress, unit="image") as bar:
        for stage in stages:
            rows = np.flatnonzero(left)
            passes[stage.name] = (stage.forward * len(rows), stage.backward * len(rows))
            for i, pack in enumerate(evaluator.packs(rows)):
                bar.set_postfix_str(f"{stage.name}, {left.mean():.2%} robust")
                done = journal.read(f"{stage.name}-{i}")
                if done is None:
                    done = dispatch(stage, pack)
                    journal.write(f"{stage.name}-{i}", **done)
                left[done["rows"]] = False
                x_adv[done["rows"]] = done["x_adv"]
                seconds += float(done["seconds"])
                bar.update(len(pack))
            by_attack[stage.name] = left.copy()
    return Verdict(clean, left, by_attack, x_adv, passes, _flags(clean, by_attack), seconds)


def _fingerprint(told: str, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(told.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _flags(clean: np.ndarray, by_attack: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The masking alarm: what the gradient attacks left and others took."""
    flags, before = [], clean
    for name, after in by_attack.items():
        taken = int(before.sum() - after.sum())
        if name.startswith(("square", "fab")) and taken > 0.005 * len(clean):
            flags.append(
                f"{name} fooled {taken} of {len(clean)} examples that the gradient attacks on the "
                f"loss had left: gradients may be masked"
            )
        before = after
    return tuple(flags)
