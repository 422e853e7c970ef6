"""`Method`, an attack as a value: callable, frozen, with a name, a threat and options.

`attacks.pgd(threat.Linf(8 / 255), steps=20)` is such a value, equal to any other of the same
options. Its `repr` reads like the call that made it; compiled programs, journals and records
identify it by `description`, which holds every option.
"""

import dataclasses
import functools
import hashlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import registry, validate
from jaxdefense.attacks import checks
from jaxdefense.conv import explicit_gradients
from jaxdefense.rewrite import fast_convolutions, is_forward_mode
from jaxdefense.types import Array, Attack, Images, Key, Labels, Logits, Threat

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Method:
    """An `Attack` with its name, threat and options, made by the factories of this package.

    Two are equal where their descriptions are: the same factory, threat and options, arrays by
    their values, functions by what they are.

    Attributes:
      factory: the function that makes the pure attack from `arguments`.
      arguments: of the factory by name, defaults included.
      flatten_images: the attack gets images as rows (B, H W C), over which XLA:CPU's norms take a
        tenth of the time that they take over (B, H, W, C).

    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.pgd(threat.Linf(0.125), steps=20)
    >>> attack.name, attack.options["restarts"], attack.replace(steps=50)
    ('pgd', 1, pgd(Linf(eps=0.125, bounds=(0.0, 1.0)), steps=50))
    """

    factory: Callable[..., Attack]
    arguments: dict[str, Any]
    flatten_images: bool
    _attack: Attack = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_attack", self._make())
        object.__setattr__(self, "__doc__", self.factory.__doc__)

    @property
    def name(self) -> str:
        """The factory's name."""
        return self.factory.__name__

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        """All arguments but the threat."""
        return {name: value for name, value in self.arguments.items() if name != "threat"}

    @property
    def parts(self) -> list["Method"]:
        """The `Method`s among the attacks that this one combines."""
        return [part for part in self.combined if isinstance(part, Method)]

    @property
    def combined(self) -> list[Attack]:
        """The attacks that this one combines, bare functions too; [] if it is no combination."""
        if "threat" in self.arguments:
            return []
        attacks = self.arguments.get("attacks", ())
        return [*attacks, *([self.arguments["attack"]] if "attack" in self.arguments else [])]

    @property
    def threat(self) -> Threat | None:
        """The set that its images lie in; of a combination, the one that its parts agree on."""
        if "threat" in self.arguments:
            return self.arguments["threat"]
        found = [part.threat for part in self.parts]
        if found and len({describe(one) for one in found}) == 1:
            return found[0]
        return None

    @property
    def targeted(self) -> bool:
        """Whether `labels` are targets to be reached instead of labels to be left."""
        return (
            bool(self.arguments.get("targeted"))
            or self.arguments.get("version") == "targeted"
            or any(part.targeted for part in self.parts)
        )

    @property
    def samples(self) -> int | None:
        """Draws per step of a randomised model, (key, images) -> logits; None for other models."""
        return self.arguments.get("samples")

    @functools.cached_property
    def description(self) -> str:
        """The call with every option: equal descriptions, equal attacks, in any process."""
        given = ", ".join(f"{name}={describe(value)}" for name, value in self.arguments.items())
        return f"{self.name}({given})"

    def replace(self, **arguments: Any) -> "Method":
        """The attack with other arguments, checked by the factory; all parts get a new threat.

        Args:
          **arguments: of the factory, by name.

        Raises:
          TypeError: an option that it does not have.
        """
        _check_options(self.factory, inspect.signature(self.factory), arguments)
        if "threat" in arguments and "threat" not in self.arguments:
            ball = arguments.pop("threat")

            def leaf(value: Any) -> Any:
                return value.replace(threat=ball) if isinstance(value, Method) else value

            arguments = {**_map(leaf, self.options), **arguments}
        return dataclasses.replace(self, arguments={**self.arguments, **arguments})

    def per_example(self) -> list[Any]:
        """The arrays that hold a value for each example (eps, step sizes), in a fixed order."""
        found: list[Any] = []

        def keep(array: Any) -> Any:
            found.append(array)
            return array

        _map_per_example(keep, self.arguments)
        return found

    def with_per_example(self, arrays: Iterator[Any]) -> "Method":
        """The attack with other arrays in the places of `per_example`'s.

        Args:
          arrays: as many, in the same order.
        """
        arguments = _map_per_example(lambda _: next(arrays), self.arguments)
        return dataclasses.replace(self, arguments=arguments)

    def __repr__(self) -> str:
        words = []
        for name, parameter in inspect.signature(self.factory).parameters.items():
            value = self.arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                words += [_show(one) for one in value]
            elif parameter.kind is not parameter.KEYWORD_ONLY:
                words.append(_show(value))
            elif describe(value) != describe(parameter.default):
                words.append(f"{name}={_show(value)}")
        return f"{self.name}({', '.join(words)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and self.description == other.description

    def __hash__(self) -> int:
        return hash(self.description)

    def __call__(
        self, predict: Callable[..., Logits], key: Key, images: Images, labels: Labels
    ) -> Images:
        """Adversarial images (B, ...) inside ball and box, float32 for half-precision images.

        Args:
          predict: images (B, ...) -> logits (B, K), parameters inside, eval mode; of an attack with
            `samples`, (key, images) -> logits.
          key: one typed key, or one per example.
          images: (B, ...) floats in the threat's bounds.
          labels: (B,) integers; the targets of a targeted attack.

        Raises:
          ValueError: bad images, labels, keys or models.
        """
        predict = fast_convolutions(predict)
        threat = self.arguments.get("threat")
        if threat is None:  # a combination, whose parts check their arguments themselves
            return self._attack(predict, key, images, labels)
        images, labels = jnp.asarray(images), jnp.asarray(labels)
        images = checks.check_images(images, threat.bounds)
        checks.check_eps(threat, images)
        checks.check_keys(key, images.shape[0])
        classes = checks.count_classes(predict, images, keyed=self.samples is not None)
        checks.check_labels(labels, images.shape[0], classes)
        shape = images.shape
        if self.flatten_images:
            shape = (len(images), math.prod(images.shape[1:]))
        # In half precision a projection's rounding error would leave the ball.
        wide = images.astype(jnp.promote_types(images.dtype, jnp.float32))

        def predict_reshaped(*arguments: Array) -> Logits:
            *keys, z = arguments
            return predict(*keys, z.reshape(len(z), *images.shape[1:]).astype(images.dtype))

        x_adv = self._attack(predict_reshaped, key, wide.reshape(shape), labels)
        return x_adv.reshape(images.shape)

    def _make(self) -> Attack:
        args: list[Any] = []
        kwargs = {}
        for name, parameter in inspect.signature(self.factory).parameters.items():
            value = self.arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += value
            elif parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[name] = value
            else:
                args.append(value)
        return self.factory(*args, **kwargs)


def attack_factory(
    *, flatten_images: bool = True
) -> Callable[[Callable[P, Attack]], Callable[P, Method]]:
    """A decorator: the factory of a pure attack then returns a `Method` around that attack.

    The `Method` checks threat, images, labels, keys and model, widens images to float32, and
    flattens them to rows unless told not to; the pure attack sees only such images.

    Args:
      flatten_images: give the pure attack rows (B, H W C); False: images as they come,
        (B, H, W, C).
    """

    def decorate(factory: Callable[P, Attack]) -> Callable[P, Method]:
        signature, wanted = inspect.signature(factory), validate.declared(factory)

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> Method:
            _check_options(factory, signature, kwargs)
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                known = ", ".join(signature.parameters)
                message = f"attack {factory.__name__}: {error}; options go by name: {known}"
                raise TypeError(message) from None
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                if isinstance(value, list) and value and isinstance(value[0], int | float):
                    with np.errstate(over="ignore"):  # to infinity, which is refused
                        bound.arguments[name] = np.asarray(value, np.float32)
            if "threat" in bound.arguments:
                checks.check_threat(bound.arguments["threat"], factory.__name__)
            made = Method(factory, dict(bound.arguments), flatten_images)
            # After the factory's own checks, which say more: what it declares and did not look at.
            validate.check_types(factory.__name__, kwargs, wanted)
            return made

        return make

    return decorate


def _check_options(
    factory: Callable[..., Attack], signature: inspect.Signature, given: Mapping[str, Any]
) -> None:
    """Raises a TypeError that names the attack and its nearest option for one that it lacks."""
    known = [name for name in signature.parameters if name != "threat"]
    try:
        registry.check_known(
            f"option of attack {factory.__name__}", [n for n in given if n != "threat"], known
        )
    except ValueError as error:
        raise TypeError(str(error)) from None


def run_attack(
    attack: Attack, predict: Callable[..., Logits], key: Key, images: Images, labels: Labels
) -> Images:
    """The attack's images, for a bare function too on a model of fast convolutions (`rewrite`).

    A bare function that takes forward-mode derivatives (`jax.jvp`), which explicit gradients do not
    have, gets a model without them.

    Args:
      attack: any.
      predict: see `Method.__call__`, as all that follow.
      key: one typed key, or one per example.
      images: (B, ...).
      labels: (B,) integers.
    """
    predict = fast_convolutions(predict)
    if not isinstance(attack, Method):
        run = functools.partial(attack, predict)
        if is_forward_mode(jax.make_jaxpr(run)(key, images, labels).jaxpr):
            with explicit_gradients(False):
                return run(key, images, labels)
    return attack(predict, key, images, labels)


def takes_targets(attack: Attack) -> bool:
    """Whether an attack's `labels` are targets to be reached; never those of a bare function.

    Args:
      attack: any, also a `functools.partial` of one.
    """
    if isinstance(attack, functools.partial):
        return takes_targets(attack.func)
    return isinstance(attack, Method) and attack.targeted


def describe(value: Any) -> str:
    """A string that identifies a value: equal values give equal strings, in any process.

    Arrays give their shape, dtype and a hash of their values; attacks, threats and other
    dataclasses their fields; functions and classes the name that they are imported by. Anything
    else (a lambda, a closure, an object) gives its address, " at 0x", which no other object and no
    other process has.

    Args:
      value: of an argument.
    """
    if isinstance(value, Method):
        return value.description
    if isinstance(value, jax.core.Tracer):
        return _address(value)
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        array = np.asarray(value)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
        return f"{array.dtype}{array.shape}:{digest}"
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return repr(value.item())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {describe(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, functools.partial):
        return f"partial{describe((value.func, value.args, value.keywords))}"
    if isinstance(value, types.FunctionType | type):
        return _importable(value) or _address(value)
    if dataclasses.is_dataclass(value) and _importable(type(value)):
        name = _importable(type(value))
        fields = (f"{f.name}={describe(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{name}({', '.join(fields)})"
    return _address(value)


def _address(value: Any) -> str:
    return f"{type(value).__name__} at {id(value):#x}"


def _importable(value: Any) -> str:
    """The name that a function or class is imported by, "" where there is none."""
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    is_own = found is value and value.__module__ != "__main__"
    return f"{value.__module__}.{value.__qualname__}" if is_own else ""


def _show(value: Any) -> str:
    """As `describe`, but short: functions and classes by name."""
    if isinstance(value, types.FunctionType):
        return value.__name__
    if hasattr(value, "project") and dataclasses.is_dataclass(value):
        fields = (f"{f.name}={_show(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, Method):
        return repr(value)
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_show, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return describe(value)


def _map(leaf: Callable[[Any], Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with each leaf replaced by leaf(value); an attack is a leaf."""
    return {
        name: jax.tree.map(leaf, value, is_leaf=lambda v: isinstance(v, Method))
        for name, value in arguments.items()
    }


def _map_per_example(
    function: Callable[[Any], Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments with function(array) in place of each array of one axis.

    Such arrays are looked for in options, in the threat's eps and in the parts of a combination,
    not inside callables and other pytrees.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Method):
            inside = _map_per_example(function, value.arguments)
            return dataclasses.replace(value, arguments=inside)
        if hasattr(value, "project") and jnp.ndim(value.eps) == 1:
            return value.with_eps(function(value.eps))
        if isinstance(value, np.ndarray | jax.Array) and value.ndim == 1:
            return function(value)
        if isinstance(value, list | tuple):
            return type(value)(map(leaf, value))
        return value

    return {name: leaf(value) for name, value in arguments.items()}
