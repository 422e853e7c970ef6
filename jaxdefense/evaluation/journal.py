"""What an evaluation has found so far, on disk: a killed one goes on where it was.

FOLDER/journal.json tells what is judged, by whom; FOLDER/clean.npz holds the clean logits, and
FOLDER/STAGE-00000.npz what one dispatch found. Each file is written whole or not at all. Nothing
depends on how many images a dispatch has, so a journal may be gone on with on other devices.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxdefense import files
from jaxdefense.evaluation.flags import logit_difference

FORMAT = 2


def hash_arrays(*arrays: np.ndarray | bytes) -> str:
    """A short hash of the arrays' values, shapes and dtypes.

    Args:
      *arrays: arrays, or bytes.
    """
    found = hashlib.sha256()
    for array in arrays:
        if isinstance(array, bytes):
            found.update(array)
            continue
        found.update(f"{array.shape}{array.dtype}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


class Journal:
    """A folder of finished dispatches, or nothing.

    Args:
      folder: where; None keeps nothing.
      told: what is judged, plain values by name; a folder with others is refused.
      logits: (N, K) the model's clean logits; a folder of another model is refused.

    Raises:
      ValueError: the folder holds an evaluation of something else (what differs is named), or
        `told` cannot tell one attack from another.
    """

    def __init__(self, folder: pathlib.Path | None, told: Mapping[str, Any], logits: np.ndarray):
        self.folder = folder
        if folder is None:
            return
        for name, text in told.items():
            if " at 0x" in str(text):
                raise ValueError(
                    f"{name} cannot be told from another in a later process, so {folder} could not "
                    f"be gone on with: leave the folder out, or use attacks and losses that are "
                    f"functions with a name ({text})"
                )
        folder.mkdir(parents=True, exist_ok=True)
        path, clean = folder / "journal.json", folder / "clean.npz"
        if (folder / "cascade.json").exists():
            raise ValueError(f"{folder} holds an evaluation by an older version; remove it")
        if path.exists():
            self._compare(_read_json(path), {"format": FORMAT, **told})
            self._compare_logits(clean, logits)
        else:
            files.write_arrays(clean, logits=logits)
            files.write_text(path, json.dumps({"format": FORMAT, **told}, indent=1) + "\n")

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differ:
            told = "; ".join(f"{n} was {before.get(n)}, is {now.get(n)}" for n in differ)
            raise ValueError(
                f"{self.folder} holds another evaluation ({told}); choose another folder, or "
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

    def finish(
        self,
        stage: str,
        rows: np.ndarray,
        packs: Callable[[np.ndarray], Iterable[np.ndarray]],
        dispatch: Callable[[np.ndarray], dict[str, Any]],
    ) -> Iterator[dict[str, Any]]:
        """What a stage's dispatches find: those of the folder first, then what is still missing.

        Args:
          stage: its name.
          rows: (n,) the examples that it is asked about.
          packs: rows -> groups of them, each for one dispatch.
          dispatch: (rows of a group) -> arrays, which are written down.

        Yields:
          A dispatch's arrays, and under "asked" its rows.

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
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove its folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (not a mapping): remove its folder")
    return found
