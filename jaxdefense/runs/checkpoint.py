"""Checkpoints, written and read by `Store` alone: what they hold and how they are checked is here.

A run has two stores, `last` to go on from and `best` to deploy. Orbax writes to a temporary name
and renames, so a killed process leaves the previous checkpoint whole. A checkpoint is named trees
of arrays and a JSON object that holds

    {"step": 12, "meta": {plain values}, "arrays": {tree: {path: "DTYPE SHAPE SHA-256"}},
     "sha256": of all that}

which is compared with what is read: one flipped bit is an error. Checkpoints of older versions
hold the plain values alone, and are read without.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdefense import checksums, distributed, files
from jaxdefense.models import zoo
from jaxdefense.types import PyTree

_KEYS = {"step", "meta", "arrays", checksums.KEY}


class Damaged(ValueError):
    """A checkpoint that is not there any more, cannot be read, or holds other bits than saved."""


class _Header(NamedTuple):
    """What a checkpoint says of itself; `arrays` is None in those of older versions."""

    meta: dict[str, Any]
    arrays: dict[str, dict[str, str]] | None


class Store:
    """The newest checkpoints of one kind in a folder.

    Of several processes the writer alone reads and writes them, and tells the others; all must make
    the same calls.

    Args:
      folder: made if it is not there.
      keep: how many are kept.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 1):
        self.folder = folder.resolve()
        if not distributed.is_writer():
            return
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        if distributed.several():  # or orbax waits for all processes
            self.folder.mkdir(parents=True, exist_ok=True)
            options.create = False
            options.multiprocessing_options = ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix=str(self.folder)
            )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @distributed.read_by_writer
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: Mapping[str, PyTree], meta: Mapping[str, Any]) -> None:
        """Writes named trees of arrays, and metadata, under `step`.

        A resumed run comes by a step again with the same bits: what stands there is kept if it is
        whole, since replacing it would leave a moment without any; not if its bits are others, of a
        run that went on with another number of devices. Later steps than this one, which
        the run had reached before it was killed, are removed.

        Args:
          step: of the run.
          items: {name: tree of arrays}.
          meta: plain values.
        """
        if not distributed.is_writer():
            return
        trees = {name: jax.tree.map(np.asarray, tree) for name, tree in items.items()}
        arrays = {name: _describe(tree) for name, tree in trees.items()}
        if step in self._manager.all_steps():
            if self.is_whole(step) and self._header(step).arrays in (arrays, None):
                return
            self._manager.delete(step)
        header = _seal(step, meta, arrays)
        saved = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**saved, meta=ocp.args.JsonSave(header))
        with _naming(self.folder / str(step)):
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
        for later in [other for other in self._manager.all_steps() if other > step]:
            self._manager.delete(later)

    def replace_meta(self, meta: Mapping[str, Any]) -> None:
        """Gives the newest checkpoint other metadata, whole or not at all; its arrays stay.

        Args:
          meta: plain values.

        Raises:
          ValueError: no checkpoint.
        """
        if not distributed.is_writer():
            return
        step = self._newest()
        text = json.dumps(_seal(step, meta, self._header(step).arrays or {}))
        files.write_text(self.folder / str(step) / "meta" / "metadata", text)

    @distributed.read_by_writer
    def meta(self) -> dict[str, Any]:
        """The newest checkpoint's metadata, and its "step".

        Raises:
          Damaged: no checkpoint, or metadata that are not those that were saved.
        """
        step = self._newest()
        return {**self._header(step).meta, "step": step}

    @distributed.read_by_writer
    def restore(self, name: str, like: PyTree) -> PyTree:
        """The newest checkpoint's tree `name`, on the host.

        Args:
          name: as given to `save`.
          like: a tree of the same structure, shapes and dtypes.

        Raises:
          ValueError: one of another structure, shapes or dtypes.
          Damaged: no checkpoint, or arrays that are not those that were saved.
        """
        step = self._newest()
        like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        where = f"the checkpoint {self.folder / str(step)}"
        arrays = self._header(step).arrays
        if arrays is not None:
            _check_model(arrays.get(name, {}), like, f"{where} is of another model: {name}")
        return self._read(step, name, like)

    @distributed.read_by_writer
    def restore_as_saved(self, name: str) -> PyTree:
        """The newest checkpoint's tree `name` on the host, whatever its structure.

        Args:
          name: as given to `save`.

        Raises:
          Damaged: no checkpoint, or arrays that are not those that were saved.
        """
        return self._read(self._newest(), name, None)

    @distributed.read_by_writer
    def check(self) -> int:
        """The newest checkpoint's step, when all of its arrays have been read and compared.

        Raises:
          Damaged: no checkpoint, or one whose bits are not those that were saved.
        """
        step = self._newest()
        self._check(step)
        return step

    def is_whole(self, step: int) -> bool:
        """Whether all arrays of a checkpoint are those that were saved; for the writer alone.

        Args:
          step: of the checkpoint.
        """
        try:
            self._check(step)
        except Damaged:
            return False
        return True

    def _header(self, step: int) -> _Header:
        where = self.folder / str(step)
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            content = self._manager.restore(step, args=args)["meta"]
            if not isinstance(content, dict):
                raise ValueError(f"it is {content!r}, no object")
            if _KEYS.isdisjoint(content):
                return _Header(content, None)
            if set(content) != _KEYS:
                raise ValueError(f"it has the keys {', '.join(content)}")
            header = checksums.unseal(content)
        except Exception as error:  # whatever reader meets the damage
            raise Damaged(f"{where / 'meta'} is damaged ({checksums.shorten(error)})") from error
        if header["step"] != step:
            raise Damaged(
                f"{where} is the checkpoint of step {header['step']} under another name: rename it"
            )
        return _Header(header["meta"], header["arrays"])

    def _read(self, step: int, name: str, like: PyTree | None) -> PyTree:
        """A tree, in the structure of `like` where there is one; compared with its checksums."""
        where = f"the checkpoint {self.folder / str(step)}"
        header = self._header(step)
        if header.arrays is not None and name not in header.arrays:
            raise ValueError(f"{where} holds no {name!r}, only {', '.join(header.arrays)}")
        args = ocp.args.StandardRestore() if like is None else ocp.args.StandardRestore(like)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]
            tree = jax.tree.map(np.asarray, found)
        except Exception as error:  # whatever reader meets the damage
            foreign = " or of another model" if header.arrays is None and like is not None else ""
            raise Damaged(f"{where} is damaged{foreign} ({checksums.shorten(error)})") from error
        if header.arrays is None:
            return _check_shapes(tree, like, where)
        saved, read = header.arrays[name], _describe(tree)
        if differ := [path for path in {**saved, **read} if saved.get(path) != read.get(path)]:
            raise Damaged(
                f"{where} is damaged: the checksum of {name}/{differ[0]} differs "
                f"({len(differ)} of {len(saved)} arrays)"
            )
        return tree

    def close(self) -> None:
        """Releases the manager's threads."""
        if distributed.is_writer():
            self._manager.close()

    def _newest(self) -> int:
        steps = self._manager.all_steps()
        if not steps:
            raise Damaged(f"there is no checkpoint in {self.folder}")
        return max(steps)

    def _check(self, step: int) -> None:
        for name in self._header(step).arrays or ("model",):
            self._read(step, name, None)


def whole_steps(folder: pathlib.Path) -> list[int]:
    """The steps of a folder's checkpoints that are whole, in order.

    Args:
      folder: of a store; it is there.
    """
    store = Store(folder)
    try:
        return [
            step
            for step in store.steps()
            if distributed.from_writer(functools.partial(store.is_whole, step))
        ]
    finally:
        store.close()


def find_other(workdir: pathlib.Path, kind: str) -> tuple[str, int] | None:
    """The other checkpoint of a workdir, and its step, if there is one and it is whole.

    Args:
      workdir: of a run.
      kind: "best" or "last", the one that is damaged.
    """
    other = {"best": "last", "last": "best"}[kind]
    if not distributed.from_writer((workdir / other).is_dir):
        return None
    store = Store(workdir / other)
    try:
        return other, store.check()
    except Damaged:
        return None
    finally:
        store.close()


def _describe(tree: PyTree) -> dict[str, str]:
    """Each array of a tree by its path, see `checksums.describe_array`."""
    leaves = zoo.leaves_by_path(tree).items()
    return {path: checksums.describe_array(np.asarray(leaf)) for path, leaf in leaves}


def _check_model(saved: Mapping[str, str], like: PyTree, where: str) -> None:
    """Refuses arrays of other names, shapes or dtypes than those of `like`."""
    there = {path: text.rpartition(" ")[0] for path, text in saved.items()}
    here = {path: f"{x.dtype} {x.shape}" for path, x in zoo.leaves_by_path(like).items()}
    differ = [path for path in {**here, **there} if there.get(path) != here.get(path)]
    if differ:
        told, asked = (arrays.get(differ[0], "absent") for arrays in (there, here))
        raise ValueError(
            f"{where}/{differ[0]} is {told} there, here {asked} ({len(differ)} arrays differ)"
        )


def _check_shapes(tree: PyTree, like: PyTree | None, where: str) -> PyTree:
    """The tree, if its shapes are those of `like`: all that is known of older checkpoints."""
    wanted = jax.tree_util.tree_leaves_with_path(tree if like is None else like)
    for (path, want), got in zip(wanted, jax.tree.leaves(tree), strict=True):
        if np.shape(got) != want.shape:
            raise ValueError(
                f"{where} is of another model: {jax.tree_util.keystr(path)} has shape "
                f"{np.shape(got)}, not {want.shape}"
            )
    return tree


def _seal(step: int, meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the arrays, with its checksum."""
    return checksums.seal({"step": step, "meta": json.loads(json.dumps(meta)), "arrays": arrays})


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what a process left that ended while it saved; readers never look at it.

    Args:
      folder: of a store that no other process writes to.
    """
    for path in folder.glob("*.orbax-checkpoint-tmp*") if distributed.is_writer() else ():
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """A disk that takes no more is an OSError that names the checkpoint; its half is removed.

    Raises:
      OSError: whichever of its exceptions orbax or the writer of its arrays has made of it.
    """
    orbax = logging.getLogger("absl")
    orbax.addFilter(_without_traceback)  # of a thread; what it tells is raised here too
    try:
        yield
    except Exception as error:
        remove_leftovers(path.parent)
        cause: BaseException | None = error
        while cause is not None:
            told = re.search(r"os_error_code='(\d+)'", str(cause))
            number = cause.errno if isinstance(cause, OSError) else told and int(told[1])
            if number:
                raise OSError(number, os.strerror(number), str(path)) from error
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        orbax.removeFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info
