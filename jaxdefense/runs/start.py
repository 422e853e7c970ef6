"""Starting points: weights of a trained run in place of random ones, and what stays as it starts.

    "train": {"init_from": {"workdir": "runs/pgd_at-mnist", "checkpoint": "best",
                            "new_head": True},
              "frozen": ["classifier/conv1"]}

In place of the workdir, {"file": ...} is a network of `models.save`. The weights are those that
the run deploys (its averages, where it keeps some). The schedule and the optimiser are the new
run's, from its first step.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdefense import distributed, registry
from jaxdefense.defenses import base
from jaxdefense.models import zoo
from jaxdefense.runs import checkpoint
from jaxdefense.types import PyTree

_KEYS = ("workdir", "checkpoint", "file", "new_head")


@dataclasses.dataclass(frozen=True)
class Start:
    """Weights to start from.

    Attributes:
      params: by role.
      carry: statistics by role.
      new_head: whether the head is left as it was initialised.
      source: where they come from, for messages.
    """

    params: Mapping[str, PyTree]
    carry: Mapping[str, PyTree]
    new_head: bool
    source: str

    def apply(self, params: base.Params, carry: base.Carry) -> tuple[base.Params, base.Carry]:
        """Initial parameters and carry with these weights wherever the roles agree.

        A classifier may start from an encoder and a head, and these from a classifier.

        Args:
          params: of the new run, freshly initialised; arrays or their shapes.
          carry: likewise.

        Raises:
          ValueError: no role in common, or arrays of other names or shapes; they are named.
        """
        found, statistics = _in_roles(self.params, self.carry, params)
        common = [role for role in params if role in found]
        if not common:
            raise ValueError(
                f"{self.source} has nothing for this run to start from: it has "
                f"{sorted(self.params)}, the run {sorted(params)}"
            )
        params, carry = dict(params), dict(carry)
        for role in common:
            params[role] = self._taken(role, found[role], params[role])
            if role in carry:
                carry[role] = self._taken(role, statistics.get(role, {}), carry[role])
        if "ema" in carry:  # the averages begin where the weights do
            carry["ema"] = {
                "params": {role: params[role] for role in carry["ema"]["params"]},
                "carry": {role: carry[role] for role in carry["ema"]["carry"]},
            }
        return params, carry

    def _taken(self, role: str, found: PyTree, own: PyTree) -> PyTree:
        if self.new_head and role == "head":
            return own
        if self.new_head and isinstance(own, Mapping) and "head" in own:
            rest = {k: v for k, v in found.items() if k != "head"}
            return {
                **self._taken(role, rest, {k: v for k, v in own.items() if k != "head"}),
                "head": own["head"],
            }
        got, wanted = _shapes(found), _shapes(own)
        if got != wanted:
            paths = sorted(p for p in {**got, **wanted} if got.get(p) != wanted.get(p))
            told = f"{role}/{paths[0]} is {got.get(paths[0], 'absent')} there"
            way = ""
            if all("head" in f"{role}/{path}" for path in paths):
                way = "; train.init_from.new_head=true starts with a new head"
            raise ValueError(
                f"{self.source} does not fit this run: {told}, here "
                f"{wanted.get(paths[0], 'absent')} ({len(paths)} arrays differ){way}"
            )
        return jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(found))


def load_start(spec: Mapping[str, Any]) -> Start:
    """The starting point that `train.init_from` names.

    Args:
      spec: {"workdir": ..., "checkpoint": "best" or "last"} or {"file": ...}, and
        "new_head": False.

    Raises:
      ValueError: an unknown key, no run there, no checkpoint, a damaged one, or weights that are
        not finite.
    """
    registry.check_known("key of train.init_from", spec, _KEYS)
    if ("workdir" in spec) == ("file" in spec):
        raise ValueError(f"train.init_from needs a workdir or a file, got {dict(spec)}")
    new_head = bool(spec.get("new_head", False))
    if "file" in spec:
        variables = zoo.load(spec["file"]).variables
        params, carry = (variables.get(name, {}) for name in ("params", "batch_stats"))
        _check_finite(variables, spec["file"])
        return Start({"classifier": params}, {"classifier": carry}, new_head, str(spec["file"]))
    kind = spec.get("checkpoint", "best")
    if kind not in ("best", "last"):
        registry.raise_unknown("train.init_from.checkpoint", kind, ("best", "last"))
    folder = pathlib.Path(os.fspath(spec["workdir"])) / kind
    if not distributed.from_writer(folder.is_dir):
        raise ValueError(f"train.init_from: {spec['workdir']} has no checkpoint {kind!r}")
    store = checkpoint.Store(folder)
    try:
        model = store.restore_as_saved("model")
    except checkpoint.Damaged as error:
        other = checkpoint.find_other(folder.parent, kind)
        way = f"; the checkpoint of step {other[1]} is whole: {other[0]!r}" if other else ""
        raise ValueError(f"train.init_from.checkpoint={kind!r}: {error}{way}") from error
    finally:
        store.close()
    _check_finite(model, spec["workdir"])
    saved, carry = model["params"], dict(model["carry"])
    ema = carry.pop("ema", {"params": {}, "carry": {}})
    return Start(
        {**saved, **ema["params"]},
        {**carry, **ema["carry"]},
        new_head,
        str(folder),
    )


def is_frozen(frozen: Sequence[str], role: str, path: Sequence[Any]) -> bool:
    """Whether an array stays as it starts.

    Args:
      frozen: roles, or parts of them, "classifier/conv1".
      role: of the array.
      path: its path inside the role, of `jax.tree_util`.
    """
    whole = f"{role}/{jax.tree_util.keystr(tuple(path), simple=True, separator='/')}/"
    return any(whole.startswith(f"{name}/") for name in frozen)


def check_frozen(frozen: Sequence[str], params: base.Params) -> None:
    """Refuses names of `train.frozen` that no parameter has, and all parameters together.

    Args:
      frozen: roles, or parts of them.
      params: of the run; arrays or their shapes.

    Raises:
      ValueError: such a name, or nothing left to train.
    """
    for name in frozen:
        role = str(name).split("/")[0]
        registry.check_known("role in train.frozen", [role], params)
        leaves = jax.tree_util.tree_leaves_with_path(params[role])
        if not any(is_frozen([name], role, path) for path, _ in leaves):
            parts = sorted(f"{role}/{part}" for part in params[role])
            registry.raise_unknown("part in train.frozen", name, parts)
    paths = [
        (role, path)
        for role, tree in params.items()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if frozen and all(is_frozen(frozen, role, path) for role, path in paths):
        raise ValueError(f"train.frozen leaves nothing to train: {', '.join(map(str, frozen))}")


def _in_roles(
    params: Mapping[str, PyTree], carry: Mapping[str, PyTree], roles: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Weights with the classifier in one role, or in encoder and head, as `roles` has it."""
    params, carry = dict(params), dict(carry)
    if "encoder" in roles and "encoder" not in params and "classifier" in params:
        encoder = dict(params.pop("classifier"))
        head = encoder.pop("head", {})
        params |= {"encoder": encoder, "head": head}
        carry |= {"encoder": carry.pop("classifier", {}), "head": {}}
    elif "classifier" in roles and "classifier" not in params and "encoder" in params:
        params["classifier"] = {**params.pop("encoder"), "head": params.pop("head")}
        carry["classifier"] = carry.pop("encoder", {})
    return params, carry


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(np.shape(leaf)) for name, leaf in zoo.leaves_by_path(tree).items()}


def _check_finite(tree: PyTree, source: Any) -> None:
    """Refuses weights that are NaN or infinite, which no training mends."""
    for name, leaf in zoo.leaves_by_path(tree).items():
        if not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise ValueError(f"train.init_from: {source} holds values that are not finite: {name}")
