"""Trained networks as files: arrays in safetensors, all else as JSON in its header; no pickle.

The header's metadata holds one text, "jaxdefense": a JSON object behind its own SHA-256.

    {"format": 1,
     "holds": "classifier",                                  # or "system", see `jaxdefense.runs`
     "model": {"name": "cnn", "num_classes": 10, "width": 1.0, ...},
     "meta": {"image_shape": [28, 28, 1], ...},              # what the one who saved it adds
     "sha256": {"params/conv1/kernel": "...", ...}}          # of each array's bytes

A classifier's arrays are called params/... and batch_stats/..., as in its Flax variables. The
networks that come with the package lie in jaxdefense/zoo, each with its record beside it; their
SHA-256 are in SHA256SUMS there (experiments/export.py writes it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import checksums, extras, files, models, registry
from jaxdefense.types import Images, Logits, PyTree

if TYPE_CHECKING:
    import flax.linen as nn

FORMAT = 1
FOLDER = pathlib.Path(__file__).parents[1] / "zoo"
_KEYS = ("format", "holds", "model", "meta", "sha256")


class Loaded(NamedTuple):
    """A trained network.

    Attributes:
      module: the network; `module.apply(variables, images)` gives logits.
      variables: {"params": ..., "batch_stats": ...}, on the host.
      meta: plain values: "image_shape" (H, W, C), and what is known of its training.
    """

    module: nn.Module
    variables: dict[str, PyTree]
    meta: dict[str, Any]

    def predict(self, images: Images) -> Logits:
        """Logits (B, K) of images (B, H, W, C) in [0, 1], in eval mode."""
        logits: Any = self.module.apply(self.variables, images)
        return logits


def save(
    path: str | os.PathLike, module: nn.Module, variables: PyTree, meta: Mapping[str, Any]
) -> None:
    """Writes a registered network and its weights to one file, whole or not at all.

    Args:
      path: of the file, by custom *.safetensors; one that is there is replaced.
      module: what `models.make` returned.
      variables: {"params": ..., "batch_stats": ...} of it, in any floating dtype.
      meta: plain values; "image_shape" (H, W, C) is needed, all else is yours: data set, threat,
        how it was trained.

    Raises:
      ValueError: a module of no registered class, variables that do not fit it, no "image_shape",
        or values that JSON cannot hold.

    >>> import tempfile, jax, numpy as np
    >>> from jaxdefense import models
    >>> module = models.make("cnn", 10, width=0.25)
    >>> variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = f"{folder}/mine.safetensors"
    ...     models.save(path, module, variables, {"image_shape": (8, 8, 1)})
    ...     loaded = models.load(path)
    >>> loaded.module.width, loaded.meta, loaded.predict(np.zeros((3, 8, 8, 1), np.float32)).shape
    (0.25, {'image_shape': [8, 8, 1]}, (3, 10))
    """
    like = _shapes(module, meta, "the metadata")
    kept = {name: variables[name] for name in like if name in variables}
    arrays = flatten(kept)
    unflatten(arrays, like, f"the variables of {type(module).__name__}")
    write(path, arrays, {"holds": "classifier", "model": describe(module), "meta": dict(meta)})


def load(path: str | os.PathLike) -> Loaded:
    """Reads a file of `save`; see there for an example.

    Args:
      path: of the file.

    Returns:
      The module, its variables and the metadata.

    Raises:
      ValueError: no such file, a damaged one, one of another format, of an unknown network, or of
        a system of several networks.
    """
    arrays, header = read(path)
    if header["holds"] != "classifier":
        raise ValueError(
            f"{path} holds a system of several networks, not one classifier; "
            "jaxdefense.runs.restore reads it"
        )
    module = build(path, header)
    like = _shapes(module, header["meta"], str(path))
    return Loaded(module, unflatten(arrays, like, str(path)), header["meta"])


def pretrained() -> list[str]:
    """The names of the networks and systems that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def pretrained_path(name: str) -> pathlib.Path:
    """The file of a network that comes with the package.

    Args:
      name: one of `pretrained()`.

    Raises:
      ValueError: unknown name, the nearest are named; or a damaged file.
    """
    registry.check_known("pretrained network", [name], pretrained())
    path = FOLDER / f"{name}.safetensors"
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise ValueError(f"{file} is missing; install jaxdefense again")
        checksums.check_file(file, FOLDER / checksums.LISTING, "install jaxdefense again")
    return path


def load_pretrained(name: str) -> Loaded:
    """A trained network that comes with the package, with the record of its evaluation.

    Args:
      name: one of `pretrained()`.

    Returns:
      The module, its variables and the metadata: "image_shape", the run's "config", its "training"
      and under "record" the whole record, as `jaxdefense.evaluation.records` reads it.

    Raises:
      ValueError: unknown name, or a name of a system of several networks.

    >>> import numpy as np
    >>> from jaxdefense import models
    >>> net = models.load_pretrained("pgd_at-mnist-linf")
    >>> net.predict(np.zeros((1, 28, 28, 1), np.float32)).shape
    (1, 10)
    >>> sorted(net.meta["record"]["results"]["classifier"])
    ['clean', 'fgsm', 'pgd10', 'pgd40']
    """
    path = pretrained_path(name)
    module, variables, meta = load(path)
    record = checksums.unseal(checksums.read_object(path.with_suffix(".json")))
    return Loaded(module, variables, {**meta, "record": record})


def describe(module: nn.Module) -> dict[str, Any]:
    """The registered name of a module's network and all its fields, as plain values.

    Args:
      module: what `models.make` returned.

    Raises:
      ValueError: its class is not that of a registered network.
    """
    package, _, name = type(module).__module__.rpartition(".")
    if package != models.__name__ or name not in models.names():
        raise ValueError(
            f"{type(module).__name__} is no registered network; known: {', '.join(models.names())}"
        )
    fields = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    return {"name": name, **{field: getattr(module, field) for field in fields}}


def build(path: str | os.PathLike, header: Mapping[str, Any]) -> nn.Module:
    """The module that a file's header describes.

    Args:
      path: of the file, for messages.
      header: of `read`.

    Raises:
      ValueError: an unknown network or field.
    """
    fields = dict(header["model"])
    try:
        return models.make(fields.pop("name", None), fields.pop("num_classes", None), **fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _shapes(module: nn.Module, meta: Mapping[str, Any], where: str) -> dict[str, PyTree]:
    """The module's variables as shapes, for images of meta["image_shape"]."""
    shape = meta.get("image_shape")
    if not (isinstance(shape, list | tuple) and len(shape) == 3):
        raise ValueError(f"{where} needs 'image_shape', (H, W, C), got {shape!r}")
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return dict(jax.eval_shape(module.init, jax.random.key(0), image))


def flatten(tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a tree on the host, by their paths: {"params/conv1/kernel": ...}.

    Args:
      tree: of arrays.
    """
    return {name: np.asarray(leaf) for name, leaf in leaves_by_path(tree).items()}


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree, of shapes say, by their paths as in `flatten`.

    Args:
      tree: any.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(arrays: Mapping[str, np.ndarray], like: PyTree, where: str) -> PyTree:
    """The tree of `flatten`.

    Args:
      arrays: by path.
      like: a tree of the same structure and shapes; dtypes are those of `arrays`.
      where: what the arrays are of, for messages.

    Raises:
      ValueError: missing arrays, ones too many, or other shapes; all are named.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves_by_path(like).items()}
    complaints = compare(shapes, {name: array.shape for name, array in arrays.items()})
    if complaints:
        raise ValueError(f"{where}: {complaints}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in shapes])


def compare(wanted: Mapping[str, tuple], got: Mapping[str, tuple]) -> str:
    """What is missing, too many or of another shape, in words; empty where nothing is.

    Args:
      wanted: {name: shape}.
      got: likewise.
    """
    wrong = [
        f"{name} has shape {got[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in got and tuple(got[name]) != tuple(shape)
    ]
    lists = {
        "missing": [name for name in wanted if name not in got],
        "left over": [name for name in got if name not in wanted],
        "of another shape": wrong,
    }
    return "; ".join(f"{what}: {shorten(names)}" for what, names in lists.items() if names)


def shorten(names: list[str], most: int = 8) -> str:
    """Names as text, only the first so many of a long list.

    Args:
      names: any texts.
      most: how many are written out.
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def write(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]
) -> None:
    """Writes arrays and a header in this module's format, whole or not at all.

    Args:
      path: of the file.
      arrays: by name.
      header: "holds", "model" and "meta", plain values.

    Raises:
      ValueError: values that JSON cannot hold.
    """
    with extras.required("train", __name__):
        import safetensors.numpy
    # `ascontiguousarray` makes a scalar a vector.
    dense = {name: np.ascontiguousarray(a).reshape(np.shape(a)) for name, a in arrays.items()}
    digests = {name: _digest(array.tobytes()) for name, array in dense.items()}
    try:
        text = json.dumps({"format": FORMAT, **header, "sha256": digests})
    except TypeError as error:
        raise ValueError(f"{path}: the metadata must be plain values: {error}") from error
    metadata = {"jaxdefense": f"{_digest(text.encode())} {text}"}
    files.write_bytes(path, safetensors.numpy.save(dense, metadata))


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the header of a file of `write`.

    Args:
      path: of the file.

    Raises:
      ValueError: no such file, a damaged one, or one of another format.
    """
    arrays, metadata = read_arrays(path)
    if "jaxdefense" not in metadata:
        raise ValueError(
            f"{path} was not written by jaxdefense.models.save; "
            "models.from_torch reads a PyTorch state dict"
        )
    digest, _, text = metadata["jaxdefense"].partition(" ")
    if _digest(text.encode()) != digest:
        raise ValueError(f"{path} is damaged: the checksum of its header differs")
    header = json.loads(text)
    if header.get("format") != FORMAT or sorted(header) != sorted(_KEYS):
        raise ValueError(
            f"{path} has format {header.get('format')} and the keys {sorted(header)}; "
            f"this version reads format {FORMAT} with {sorted(_KEYS)}"
        )
    found = {name: _digest(array.tobytes()) for name, array in arrays.items()}
    if found != header["sha256"]:
        names = {*found, *header["sha256"]}
        bad = sorted(name for name in names if found.get(name) != header["sha256"].get(name))
        raise ValueError(f"{path} is damaged: the checksum differs of {shorten(bad)}")
    return arrays, header


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of any safetensors file.

    Args:
      path: of the file.

    Raises:
      ValueError: no such file, or a damaged one.
    """
    with extras.required("train", __name__):
        import safetensors
    if not pathlib.Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
