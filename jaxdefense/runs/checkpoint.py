"""Checkpoints, written and read by `Store` alone: what they hold and how they are checked is here.

A run has two stores, `last` to go on from and `best` to deploy. Orbax writes to a temporary name
and renames, so a killed process leaves the previous checkpoint whole. A checkpoint is named trees
of arrays and "meta", plain values in JSON. `Store.restore` refuses damaged files and other shapes;
a checksum of the arrays would be taken in `Store.save`, kept in "meta", and compared there.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdefense import distributed
from jaxdefense.types import PyTree


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

        A resumed run comes by a step again with the same bits: what stands there is kept, since
        replacing it would leave a moment without any.

        Args:
          step: of the run.
          items: {name: tree of arrays}.
          meta: plain values.
        """
        if not distributed.is_writer() or step in self._manager.all_steps():
            return
        saved = {
            name: ocp.args.StandardSave(jax.tree.map(np.asarray, tree))
            for name, tree in items.items()
        }
        meta = json.loads(json.dumps(meta))
        args = ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()

    @distributed.read_by_writer
    def meta(self) -> dict[str, Any]:
        """The newest checkpoint's metadata, and its "step".

        Raises:
          ValueError: no checkpoint.
        """
        step = self._newest()
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return {**self._manager.restore(step, args=args)["meta"], "step": step}

    @distributed.read_by_writer
    def restore(self, name: str, like: PyTree) -> PyTree:
        """The newest checkpoint's tree `name`, on the host.

        Args:
          name: as given to `save`.
          like: a tree of the same structure, shapes and dtypes.

        Raises:
          ValueError: no checkpoint, a damaged one, or one of another structure or shapes.
        """
        step = self._newest()
        like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        where = f"the checkpoint {self.folder / str(step)}"
        try:
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(like)})
            tree = self._manager.restore(step, args=args)[name]
        except Exception as error:
            raise ValueError(
                f"cannot read {where}: it is damaged or of another model "
                f"({type(error).__name__}: {error})"
            ) from error
        wanted = jax.tree_util.tree_leaves_with_path(like)
        for (path, want), got in zip(wanted, jax.tree.leaves(tree), strict=True):
            if np.shape(got) != want.shape:
                raise ValueError(
                    f"{where} is of another model: {jax.tree_util.keystr(path)} has shape "
                    f"{np.shape(got)}, not {want.shape}"
                )
        return tree

    @distributed.read_by_writer
    def restore_as_saved(self, name: str) -> PyTree:
        """The newest checkpoint's tree `name` on the host, whatever its structure.

        Args:
          name: as given to `save`.

        Raises:
          ValueError: no checkpoint, or a damaged one.
        """
        step = self._newest()
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore()})
        try:
            return jax.tree.map(np.asarray, self._manager.restore(step, args=args)[name])
        except Exception as error:
            raise ValueError(
                f"cannot read the checkpoint {self.folder / str(step)}: it is damaged "
                f"({type(error).__name__}: {error})"
            ) from error

    def close(self) -> None:
        """Releases the manager's threads."""
        if distributed.is_writer():
            self._manager.close()

    def _newest(self) -> int:
        steps = self._manager.all_steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self.folder}")
        return max(steps)
