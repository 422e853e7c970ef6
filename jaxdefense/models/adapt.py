"""A user's own network with the call that this package's networks have.

    adapt(model, images, num_classes) -> module
    module.init(key, images)          -> {"params": ..., "batch_stats": ...}, dicts of dicts
    module.apply(variables, x, *, train=False, features=False, bn_set=0, mutable=()) -> ...

The last linear layer, if logits are what it returns, is found by tracing the network once: its
parameters become `params["head"]` and its input the features, wherever it lies in the network.
"""

import contextlib
import contextvars
import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.errors
import flax.linen as nn
import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdefense.types import Images, Key, PyTree

Path = tuple[str, ...]
# The first of these that a network's call takes says whether it trains, the others the opposite.
_TRAINS = ("train", "training", "is_training")
_EVALUATES = ("deterministic", "use_running_average", "inference")

HEAD = "head"
_KINDS = "a linen module, an NNX module, a function of rngs that makes one, or a pair (init, apply)"


class _Network(Protocol):
    """A network of one library.

    Attributes:
      head: path of the last linear layer in the parameters, or None where there is none.
    """

    head: Path | None

    def init(self, key: Key, images: Images) -> tuple[PyTree, PyTree]:
        """(parameters, statistics)."""

    def run(
        self, params: PyTree, stats: PyTree, x: Images, *, train: bool, features: bool
    ) -> tuple[Any, Any, PyTree]:
        """(logits, the head's input or None, statistics)."""


class Adapted:
    """A network of any library behind the call of this package's networks.

    Args:
      network: what is adapted.
      name: for messages.
      num_classes: K.
      bn: whether it has BatchNorm statistics.

    Attributes:
      bn_sets: number of BatchNorm sets, as in `layers.NormedClassifier`. The scales, biases and
        statistics of set k > 0 are copies under "bn_set{k}", made at initialisation.
    """

    def __init__(self, network: _Network, name: str, num_classes: int, *, bn: bool):
        self._network, self.name, self.num_classes, self.bn = network, name, num_classes, bn
        self.bn_sets = 1

    def clone(self, *, bn_sets: int) -> "Adapted":
        """The same network with another number of BatchNorm sets.

        Args:
          bn_sets: their number.
        """
        cloned = copy.copy(self)
        cloned.bn_sets = bn_sets
        return cloned

    def init(self, key: Key, images: Images) -> dict[str, PyTree]:
        """{"params", "batch_stats"}.

        Args:
          key: of the initialisation; a network that was given with its weights starts from these.
          images: (1, H, W, C), for their shape.
        """
        params, stats = self._network.init(key, images)
        if self._network.head:
            params = _move(params, self._network.head, (HEAD,))
        for k in range(1, self.bn_sets):
            params = {**params, f"bn_set{k}": _norms(params, stats)}
        sets = {f"bn_set{k}": stats for k in range(1, self.bn_sets)}
        return {"params": params, "batch_stats": {**stats, **sets} if sets else stats}

    def apply(
        self,
        variables: Mapping[str, PyTree],
        x: Images,
        *,
        train: bool = False,
        features: bool = False,
        bn_set: int = 0,
        mutable: Collection[str] = (),
    ) -> Any:
        """Logits (B, K), or (logits, features); with `mutable` also {"batch_stats": new ones}.

        Args:
          variables: of `init`.
          x: (B, H, W, C) in [0, 1].
          train: whether BatchNorm uses and follows the batch's statistics.
          features: whether to return the head's input too.
          bn_set: which BatchNorm set is used.
          mutable: not empty: the new statistics are returned too.

        Raises:
          ValueError: features of a network whose last operation is no linear layer.
        """
        if features and self._network.head is None:
            raise ValueError(
                f"{self.name} has no features: what it returns does not come from a linear layer"
            )
        params, stats = dict(variables["params"]), variables.get("batch_stats", {})
        sets = {f"bn_set{k}" for k in range(1, self.bn_sets)}
        others = {name: params.pop(name) for name in sets}
        own = {name: tree for name, tree in stats.items() if name not in sets} if sets else stats
        used = own
        if bn_set:
            params, used = _merged(params, others[f"bn_set{bn_set}"]), stats[f"bn_set{bn_set}"]
        if self._network.head:
            params = _move(params, (HEAD,), self._network.head)
        logits, inputs, new = self._network.run(params, used, x, train=train, features=features)
        out = (logits, inputs) if features else logits
        if not mutable:
            return out
        changed = {**stats, f"bn_set{bn_set}": new} if bn_set else {**stats, **new} if sets else new
        return out, {"batch_stats": changed}


def adapt(model: Any, images: Any, num_classes: int) -> Any:
    """The network `model` with the call that defences make of this package's own networks.

    Args:
      model: one of
        a Flax linen module, whose call may take `train` (or `training`, `is_training`, or one of
          `deterministic`, `use_running_average`, `inference`), as it must with BatchNorm;
        a Flax NNX module, which starts from its own weights, or a function of `rngs` that makes
          one, e.g. its class: then the run's seed initialises it;
        a pair (init, apply) of functions for everything else: init(key, images) -> params and
          apply(params, x) -> logits. With statistics: init -> {"params", "batch_stats"},
          apply({"params", "batch_stats"}, x, train=...) -> logits, and in training
          (logits, batch_stats).
      images: (N, H, W, C) of the data; only their shape is used.
      num_classes: K.

    Returns:
      The module itself where it has this package's call already, else an `Adapted`.

    Raises:
      ValueError: no such model, functions of other arguments, one that draws random numbers in
        training (dropout), or one that does not return (N, K) logits.

    >>> import flax.linen as nn, jax, numpy as np
    >>> from jaxdefense.models.adapt import adapt
    >>> images = np.zeros((2, 4, 4, 1), np.float32)
    >>> net = adapt(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(3)]), images, 3)
    >>> variables = net.init(jax.random.key(0), images)
    >>> logits, features = net.apply(variables, images, features=True)
    >>> logits.shape, features.shape, list(variables["params"])
    ((2, 3), (2, 16), ['head'])
    """
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), "float32")
    name = describe(model)
    if isinstance(model, nn.Module) and _has_call_of_package(model):
        module: Any = model
    else:
        network = _network(model, name, example)
        try:
            params, stats = jax.eval_shape(network.init, jax.random.key(0), example)
        except Exception as error:  # whatever apply raises of a key in place of its parameters
            if isinstance(network, _Pair) and network.is_swapped(example):
                raise ValueError(f"{name} must be (init, apply), in this order") from error
            raise
        module = Adapted(network, name, num_classes, bn=bool(stats))
        if network.head and network.head != (HEAD,) and HEAD in params:
            raise ValueError(f"{name} calls {HEAD!r} what is not its last linear layer; rename it")
    variables = jax.eval_shape(module.init, jax.random.key(0), example)
    logits = jax.eval_shape(module.apply, variables, example)
    shape = getattr(logits, "shape", None)
    if shape != (1, num_classes):
        got = f"{shape}" if shape else type(logits).__name__
        raise ValueError(f"{name} must give (1, {num_classes}) logits for one image, gives {got}")
    return module


def describe(model: Any) -> str:
    """What a run's config.json and messages call a user's model.

    Args:
      model: as in `adapt`.
    """
    if isinstance(model, nn.Module):
        return " ".join(repr(model).split())
    if isinstance(model, tuple):
        return f"({', '.join(getattr(part, '__qualname__', repr(part)) for part in model)})"
    kind = model if inspect.isclass(model) or inspect.isfunction(model) else type(model)
    return kind.__qualname__


def _has_call_of_package(module: nn.Module) -> bool:
    known = inspect.signature(type(module).__call__).parameters
    return "train" in known and "features" in known


def _network(model: Any, name: str, example: Any) -> _Network:
    if isinstance(model, nn.Module):
        return _Linen(model, name, example)
    if inspect.isclass(model) and issubclass(model, nn.Module):
        raise ValueError(f"{name} is a Flax linen class: give an instance of it, {name}()")
    if isinstance(model, nnx.Module) or (callable(model) and not isinstance(model, tuple)):
        return _NNX(model, name, example)
    if isinstance(model, tuple) and len(model) == 2 and all(map(callable, model)):
        return _Pair(*model)
    raise ValueError(f"model must be {_KINDS}, got {type(model).__name__}")


def _check_takes(function: Callable, call: str, *args: str, **kwargs: None) -> None:
    """Refuses a function that the call, which a message shows, does not fit."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(f"{name} does not take {call}: {error}; model must be {_KINDS}") from error


class _Linen:
    """A linen module."""

    def __init__(self, module: nn.Module, name: str, example: Any):
        self._module, self._name = module, name
        known = inspect.signature(type(module).__call__).parameters
        self._mode = next((n for n in (*_TRAINS, *_EVALUATES) if n in known), None)
        self.head: Path | None = None
        jax.eval_shape(self._find_head, example)

    def _find_head(self, x: Images) -> None:
        params, stats = self.init(jax.random.key(0), x)
        if stats and self._mode is None:
            raise ValueError(f"{self._name} has BatchNorm: its call needs an argument 'train'")
        logits, calls, _ = self._apply(params, stats, x, train=False)
        self.head = next((path for path, _, out in calls if out is logits), None)
        try:
            self._apply(params, stats, x, train=True)
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                f"{self._name} draws random numbers in training (dropout?), which the train step "
                f"does not give it"
            ) from error

    def _mode_argument(self, train: bool) -> dict[str, Any]:
        if self._mode is None:
            return {}
        return {self._mode: train if self._mode in _TRAINS else not train}

    def init(self, key: Key, images: Images) -> tuple[PyTree, PyTree]:
        variables = dict(self._module.init(key, images, **self._mode_argument(False)))
        params, stats = variables.pop("params", {}), variables.pop("batch_stats", {})
        if variables:
            raise ValueError(
                f"{self._name} has variables that are neither parameters nor BatchNorm's "
                f"statistics: {', '.join(variables)}"
            )
        return params, stats

    def _apply(
        self, params: PyTree, stats: PyTree, x: Images, *, train: bool
    ) -> tuple[Any, list[tuple[Path, Any, Any]], PyTree]:
        """(logits, each linear layer's (path, input, output), statistics)."""
        calls: list[tuple[Path, Any, Any]] = []

        def keep(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            out = call(*args, **kwargs)
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                given = args[0] if args else kwargs["inputs"]
                calls.append((tuple(context.module.path), given, out))
            return out

        variables = {"params": params, **({"batch_stats": stats} if stats else {})}
        with nn.intercept_methods(keep):
            out, new = self._module.apply(
                variables,
                x,
                **self._mode_argument(train),
                mutable=["batch_stats"] if train and stats else [],
            )
        return out, calls, new.get("batch_stats", stats)

    def run(
        self, params: PyTree, stats: PyTree, x: Images, *, train: bool, features: bool
    ) -> tuple[Any, Any, PyTree]:
        logits, calls, new = self._apply(params, stats, x, train=train)
        return logits, _input_of(logits, calls), new


class _NNX:
    """An NNX module, or a function of rngs that makes one."""

    def __init__(self, model: Any, name: str, example: Any):
        self._make = model
        if isinstance(model, nnx.Module):
            module = copy.deepcopy(model)
        else:
            if inspect.isclass(model):  # NNX's metaclass hides the arguments of a class
                _check_takes(model.__init__, "(rngs=...)", "self", rngs=None)
            else:
                _check_takes(model, "(rngs=...)", rngs=None)
            module = model(rngs=nnx.Rngs(0))
        if not isinstance(module, nnx.Module):
            raise ValueError(f"{name} must make an NNX module, made {type(module).__name__}")
        for path, part in nnx.iter_modules(module):
            if isinstance(part, nnx.Dropout) and part.rate > 0:
                where = ".".join(map(str, path))
                raise ValueError(
                    f"{name} draws random numbers in training (dropout {where!r}), which the "
                    f"train step does not give it"
                )
        module.eval()
        graph, self._params, self._stats, self._rest = _split(module)
        module.train()
        self._graphs = {False: graph, True: _split(module)[0]}
        self.head: Path | None = None
        params, stats = _strings(self._params), _strings(self._stats)
        jax.eval_shape(self._find_head, params, stats, example)

    def _find_head(self, params: PyTree, stats: PyTree, x: Images) -> None:
        logits, calls, _ = self._apply(params, stats, x, train=False)
        self.head = next((path for path, _, out in calls if out is logits), None)

    def init(self, key: Key, images: Images) -> tuple[PyTree, PyTree]:
        if isinstance(self._make, nnx.Module):
            return _strings(self._params), _strings(self._stats)
        module = self._make(rngs=nnx.Rngs(key))
        _, params, stats, _ = _split(module)
        return _strings(params), _strings(stats)

    def _apply(
        self, params: PyTree, stats: PyTree, x: Images, *, train: bool
    ) -> tuple[Any, list[tuple[Path, Any, Any]], PyTree]:
        """(logits, each linear layer's (path, input, output), statistics)."""
        states = (_restored(self._params, params), _restored(self._stats, stats), self._rest)
        module = nnx.merge(self._graphs[train], *states)
        with _recorded(module) as calls:
            logits = module(x)
        return logits, calls, _strings(_split(module)[2])

    def run(
        self, params: PyTree, stats: PyTree, x: Images, *, train: bool, features: bool
    ) -> tuple[Any, Any, PyTree]:
        logits, calls, new = self._apply(params, stats, x, train=train)
        return logits, _input_of(logits, calls), new


def _split(module: nnx.Module) -> Any:
    """(graph, parameters, BatchNorm's statistics, the rest)."""
    return nnx.split(module, nnx.Param, nnx.BatchStat, ...)


def _input_of(logits: Any, calls: Sequence[tuple[Path, Any, Any]]) -> Any:
    """The input of the call that returned the logits; None where no linear layer did."""
    return next((given for _, given, out in calls if out is logits), None)


# The (layer, input, output) of the linear layers of NNX modules that are recorded now.
_RECORD: contextvars.ContextVar[list | None] = contextvars.ContextVar("record", default=None)


@functools.cache
def _recording(kind: type) -> type:
    """The class of linear layers `kind`, whose calls are recorded."""

    class Recording(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = kind.__call__(self, *args, **kwargs)  # type: ignore[operator]
            if (record := _RECORD.get()) is not None:
                record.append((self, args[0] if args else kwargs["inputs"], out))
            return out

    Recording.__name__, Recording.__qualname__ = kind.__name__, kind.__qualname__
    return Recording


@contextlib.contextmanager
def _recorded(module: nnx.Module) -> Iterator[list[tuple[Path, Any, Any]]]:
    """A list that receives the (path, input, output) of each linear layer's call at the end."""
    modules = list(nnx.iter_modules(module))
    layers = [(tuple(map(str, path)), m) for path, m in modules if isinstance(m, nnx.Linear)]
    kinds = [type(layer) for _, layer in layers]
    calls: list[tuple[Path, Any, Any]] = []
    record: list[tuple[Any, Any, Any]] = []
    token = _RECORD.set(record)
    for (_, layer), kind in zip(layers, kinds, strict=True):
        layer.__class__ = _recording(kind)
    try:
        yield calls
    finally:
        _RECORD.reset(token)
        for (_, layer), kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
    paths = {id(layer): path for path, layer in layers}
    calls += [(paths[id(m)], given, out) for m, given, out in record if id(m) in paths]


def _strings(state: Any) -> PyTree:
    """An NNX state as dicts of arrays with strings for keys, as checkpoints need them."""
    flat = flatten_dict(nnx.to_pure_dict(state))
    return unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})


def _restored(like: Any, tree: PyTree) -> Any:
    """The NNX state of `_strings`; `like` has its structure."""
    flat = flatten_dict(tree)
    pure = {path: flat[tuple(map(str, path))] for path in flatten_dict(nnx.to_pure_dict(like))}
    state = jax.tree.map(lambda leaf: leaf, like)  # a copy: the next line changes it in place
    nnx.replace_by_pure_dict(state, unflatten_dict(pure))
    return state


class _Pair:
    """Two functions, init and apply."""

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any]):
        self._init, self._function = init, apply
        known = inspect.signature(apply).parameters
        self._trains, self._features = "train" in known, "features" in known
        _check_takes(init, "(key, images)", "key", "images")
        options = {"train": None} if self._trains else {}
        _check_takes(apply, "(params, images)", "params", "images", **options)
        self.head: Path | None = (HEAD,) if self._features else None
        self._stateful = False

    def is_swapped(self, example: Any) -> bool:
        """Whether the two are right the other way round."""
        try:
            jax.eval_shape(
                lambda key, x: self._init(self._function(key, x), x), jax.random.key(0), example
            )
        except Exception:  # a user's functions raise what they like
            return False
        return True

    def init(self, key: Key, images: Images) -> tuple[PyTree, PyTree]:
        variables = self._init(key, images)
        if isinstance(variables, Mapping) and set(variables) == {"params", "batch_stats"}:
            self._stateful = True
            return variables["params"], variables["batch_stats"]
        return variables, {}

    def run(
        self, params: PyTree, stats: PyTree, x: Images, *, train: bool, features: bool
    ) -> tuple[Any, Any, PyTree]:
        options = {"train": train} if self._trains else {}
        options |= {"features": True} if features else {}
        variables = {"params": params, "batch_stats": stats} if self._stateful else params
        out = self._function(variables, x, **options)
        if self._stateful and train:
            out, stats = out
        logits, inputs = out if features else (out, None)
        return logits, inputs, stats


def _move(tree: PyTree, old: Path, new: Path) -> PyTree:
    """A tree of dicts with the subtree at `old` at `new`."""
    if old == new:
        return tree
    flat = flatten_dict(tree, keep_empty_nodes=True)
    n = len(old)
    return unflatten_dict({(new + p[n:] if p[:n] == old else p): leaf for p, leaf in flat.items()})


def _norms(params: PyTree, stats: PyTree) -> PyTree:
    """The parameters of the layers that have statistics."""
    layers = {path[:-1] for path in flatten_dict(stats)}
    flat = flatten_dict(params)
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path[:-1] in layers})


def _merged(params: PyTree, others: PyTree) -> PyTree:
    """The parameters with those of another BatchNorm set in place of set 0's."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(others))
