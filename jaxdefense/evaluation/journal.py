"""How a verdict is resumed: a `Journal` keeps each finished dispatch, and gives it back.

FOLDER/journal.json tells what is judged, and by what attacks; FOLDER/clean.npz holds the clean
logits, by which other weights are noticed, and FOLDER/STAGE-00000.npz what one dispatch found: its
examples under "asked", those that it fooled under "rows". An evaluation without stages keeps each
dispatch under the hash of what it was given. Each file is written whole or not at all. A folder of
another evaluation is refused. Nothing depends on how many images a dispatch has, so a killed
evaluation may go on with other devices and in other batches. Of several processes the writer alone
reads and writes the folder, and tells the others what it read.

Each file tells whose it is, and has a checksum. What is damaged is said, removed and computed
again: that gives the same bits, and costs a dispatch.
"""

import functools
import hashlib
import json
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from tqdm import tqdm

from jaxdefense import checksums, distributed, files, validate
from jaxdefense.attacks.ensemble import Stage
from jaxdefense.attacks.method import describe
from jaxdefense.evaluation.flags import logit_difference
from jaxdefense.types import Threat

FORMAT = 2
LOG = logging.getLogger(__name__)  # a line of information for each stage that is finished
_OWNER = "of"  # the array of a file that tells whose it is

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def keeps_folder(
    evaluate: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """A function of `folder=` that has the folder for itself, rid of what a killed one left there.

    Args:
      evaluate: an evaluation; without a folder it stays as it is.

    Returns:
      It, with a ValueError at once where another process evaluates in that folder.
    """

    @functools.wraps(evaluate)
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        folder: Any = options.get("folder")
        if folder is None:
            return evaluate(*args, **options)
        folder = validate.check_folder("folder", folder)
        with distributed.claimed(folder / "evaluation.lock", "evaluation", folder):
            return evaluate(*args, **options)

    return run


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
        "seed": int(seed),
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
        description cannot tell one attack from another, an attack's name cannot name a file, or
        another process evaluates something else.
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
        distributed.check_same_values("evaluation", description)
        distributed.from_writer(lambda: self._open(folder, description, logits))
        distributed.tell(f"finished dispatches are in {folder}: the same command goes on with them")

    def _open(
        self, folder: pathlib.Path, description: Mapping[str, Any], logits: np.ndarray
    ) -> None:
        """Makes the folder, or refuses one of another evaluation."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "journal.json"
        if (folder / "cascade.json").exists():
            raise ValueError(f"{folder} holds an evaluation by an older version; remove it")
        now = {"format": FORMAT, **description}
        self._own = hash_arrays(json.dumps(now, sort_keys=True).encode())
        before = self._read_json(path) if path.exists() else None
        if before is not None:
            self._compare(before, now)
        self._is_known = before is not None  # else only files that tell whose they are count
        self._compare_logits(folder / "clean.npz", logits)
        if before is None:
            files.write_text(path, json.dumps(checksums.seal(now), indent=1) + "\n")

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
        before = self._load(path) if path.exists() else None
        if before is None:
            self._write(path, logits=logits)
            return
        old = before["logits"]
        if old.shape != logits.shape or logit_difference(old, logits) > 0.02:
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
        """
        asked = [np.zeros(0, int)]
        number = 0
        for path in distributed.from_writer(lambda: self._files(stage)):
            number = int(path.stem[-5:]) + 1
            done = distributed.from_writer(functools.partial(self._load, path))
            if done is None:
                continue
            asked.append(done["asked"])
            yield done
        for pack in packs(np.setdiff1d(rows, np.concatenate(asked))):
            done = {"asked": pack, **dispatch(pack)}
            if self.folder is not None and distributed.is_writer():
                self._write(self.folder / f"{stage}-{number:05d}.npz", **done)
            number += 1
            yield done

    def recall(
        self, given: Sequence[np.ndarray | bytes], compute: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """What one dispatch gives: as the folder has it, or computed now and written down.

        Args:
          given: what the dispatch is given, by which it is found again.
          compute: -> its arrays.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{hash_arrays(*given)}.npz"
        kept = distributed.from_writer(lambda: self._load(path) if path.exists() else None)
        if kept is not None:
            return [kept[str(i)] for i in range(len(kept))]
        arrays = compute()
        if distributed.is_writer():
            self._write(path, **{str(i): array for i, array in enumerate(arrays)})
        return arrays

    def _files(self, stage: str) -> list[pathlib.Path]:
        """The stage's files in their order; another's name may begin with its name."""
        if self.folder is None:
            return []
        name = re.compile(re.escape(stage) + r"-\d{5}\.npz")
        return sorted(path for path in self.folder.iterdir() if name.fullmatch(path.name))

    def _write(self, path: pathlib.Path, **arrays: np.ndarray) -> None:
        files.write_arrays(path, **arrays, **{_OWNER: np.array(self._own)})

    def _load(self, path: pathlib.Path) -> dict[str, np.ndarray] | None:
        """A file's arrays; None where they have to be computed again, and the file is removed."""
        try:
            # zip compares a CRC-32 of each array that is read.
            with path.open("rb") as raw, np.load(raw) as file:
                found = dict(file)
        except Exception as error:  # zipfile, zlib, pickle and OSError all mean the same here
            self._discard(path, f"is damaged ({checksums.shorten(error)})")
            return None
        owner = found.pop(_OWNER, None)
        if owner is None and self._is_known:  # of an older version, in a folder of this evaluation
            return found
        if owner is None or str(owner) != self._own:
            self._discard(path, "is of another evaluation")
            return None
        return found

    def _read_json(self, path: pathlib.Path) -> dict[str, Any] | None:
        try:
            return checksums.unseal(checksums.read_object(path))
        except ValueError as error:
            self._discard(path, f"is damaged ({error})")
            return None

    def _discard(self, path: pathlib.Path, why: str) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where an evaluation has a file: remove it")
        tqdm.write(f"note: {path} {why}: computed again", file=sys.stderr)
        path.unlink(missing_ok=True)
