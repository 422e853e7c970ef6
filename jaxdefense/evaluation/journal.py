"""How a verdict is resumed: a `Journal` keeps each finished dispatch, and gives it back.

FOLDER/journal.json tells what is judged, and by what attacks; FOLDER/clean.npz holds the clean
logits, and FOLDER/STAGE-00000.npz what one dispatch found. Each file is written whole or not at
all. A folder of another evaluation is refused. Nothing depends on how many images a dispatch has,
so a killed evaluation may go on with other devices and in other batches.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxdefense import files
from jaxdefense.attacks.ensemble import Stage
from jaxdefense.attacks.method import describe
from jaxdefense.evaluation.flags import logit_difference
from jaxdefense.types import Threat

FORMAT = 2


def hash_arrays(*arrays: np.ndarray | bytes) -> str:
    """A short hash of the arrays' values, shapes and dtypes.

    Args:
      *arrays: arrays, or bytes.
    """
    digest = hashlib.sha256()
    for array in arrays:
        if isinstance(array, bytes):
            digest.update(array)
            continue
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def describe_evaluation(
    threat: Threat,
    stages: Sequence[Stage],
    seed: int,
    options: Mapping[str, Any],
    weights: Sequence[Any] | None,
    arrays: Mapping[str, np.ndarray | None],
) -> dict[str, Any]:
    """What tells one evaluation from another, as plain values.

    Args:
      threat: of all attacks.
      stages: the attacks.
      seed: of all attacks.
      options: further plain values by name.
      weights: the model's arrays (`Evaluator.model_arrays`), or None to leave them out.
      arrays: images, labels and so on by name; None for what is not given.
    """
    return {
        "threat": describe(threat),
        "stages": {stage.name: describe(stage.attack) for stage in stages},
        "seed": seed,
        **options,
        "weights": None if weights is None else hash_arrays(*weights),
        **{name: None if array is None else hash_arrays(array) for name, array in arrays.items()},
    }


class Journal:
    """A folder of finished dispatches; without a folder, nothing is kept.

    Args:
      folder: where; None keeps nothing.
      description: what is judged, plain values by name; a folder with others is refused.
      logits: (N, K) the model's clean logits; a folder of another model is refused.

    Raises:
      ValueError: the folder holds an evaluation of something else (what differs is named), the
        description cannot tell one attack from another, or an attack's name cannot name a file.
    """

    def __init__(
        self, folder: pathlib.Path | None, description: Mapping[str, Any], logits: np.ndarray
    ):
        self.folder = folder
        if folder is None:
            return
        for name, text in description.items():
            if " at 0x" in str(text):
                raise ValueError(
                    f"{name} cannot be told from another in a later process, so {folder} could not "
                    f"be gone on with: leave the folder out, or use attacks and losses that are "
                    f"functions with a name ({text})"
                )
        for stage in description.get("stages", ()):
            files.check_name("attack", stage)
        folder.mkdir(parents=True, exist_ok=True)
        path, clean = folder / "journal.json", folder / "clean.npz"
        if (folder / "cascade.json").exists():
            raise ValueError(f"{folder} holds an evaluation by an older version; remove it")
        if path.exists():
            self._compare(_read_json(path), {"format": FORMAT, **description})
            self._compare_logits(clean, logits)
        else:
            files.write_arrays(clean, logits=logits)
            files.write_text(path, json.dumps({"format": FORMAT, **description}, indent=1) + "\n")

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differ:
            changes = "; ".join(f"{n} was {before.get(n)}, is {now.get(n)}" for n in differ)
            raise ValueError(
                f"{self.folder} holds another evaluation ({changes}); choose another folder, or "
                f"remove it"
            )

    def _compare_logits(self, path: pathlib.Path, logits: np.ndarray) -> None:
        """The same model, but for the rounding of other devices and batch sizes."""
        before = self._load(path)["logits"]
        if before.shape != logits.shape or logit_difference(before, logits) > 0.02:
            raise ValueError(
                f"{self.folder} holds an evaluation of another model (its clean logits differ); "
                f"choose another folder, or remove it"
            )

    def replay_and_run(
        self,
        stage: str,
        rows: np.ndarray,
        packs: Callable[[np.ndarray], Iterable[np.ndarray]],
        dispatch: Callable[[np.ndarray], dict[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        """What a stage's dispatches find: those in the folder, then the missing ones, run now.

        Args:
          stage: its name.
          rows: (n,) the examples that it attacks.
          packs: rows -> groups of them, each for one dispatch.
          dispatch: (rows of a group) -> arrays by name, which are written down.

        Yields:
          A dispatch's arrays, and its rows under "asked".

        Raises:
          ValueError: a damaged file.
        """
        asked = [np.zeros(0, int)]
        number = 0
        for path in self._files(stage):
            done = self._load(path)
            asked.append(done["asked"])
            number = int(path.stem[-5:]) + 1
            yield done
        for pack in packs(np.setdiff1d(rows, np.concatenate(asked))):
            done = {"asked": pack, **dispatch(pack)}
            if self.folder is not None:
                files.write_arrays(self.folder / f"{stage}-{number:05d}.npz", **done)
                number += 1
            yield done

    def _files(self, stage: str) -> list[pathlib.Path]:
        """The stage's files in their order; another's name may begin with its name."""
        if self.folder is None:
            return []
        name = re.compile(re.escape(stage) + r"-\d{5}\.npz")
        return sorted(path for path in self.folder.iterdir() if name.fullmatch(path.name))

    def _load(self, path: pathlib.Path) -> dict[str, np.ndarray]:
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                return dict(file)
        except Exception as error:  # zipfile, zlib, pickle and OSError all mean the same here
            raise ValueError(f"{path} is damaged ({error}): remove it to go on") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove its folder") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (not a mapping): remove its folder")
    return content
