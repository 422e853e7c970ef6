"""One bit per example: is it classified rightly, clean and under each attack?

Every image that an attack returns is checked again: in the box, in the ball, finite, and really
misclassified by a plain forward pass. Keys are per example (seed, attack, example id), so what is
drawn for an example does not depend on the batch size, the order or the other examples.
"""

import copy
import functools
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxdefense.attacks import checks
from jaxdefense.attacks.method import Method, takes_targets
from jaxdefense.attacks.outcome import require_margin, success_margin
from jaxdefense.evaluation import flags, records
from jaxdefense.types import (
    Array,
    Attack,
    HostArray,
    Images,
    Key,
    Logits,
    Predict,
    PyTree,
    Threat,
    partition,
)

Apply = Callable[..., Logits]  # (variables, images) -> logits, eval mode

# On XLA:CPU a network's logits and gradients are the same to the bit in every batch of 64 or
# more, whatever its size and an example's place in it, and not in smaller ones (measured for the
# CNN and ResNet-18 here). So no device gets a smaller one, unless a smaller batch is asked for.
LEAST = 64

_AXIS = "examples"

# Rounding of x + eps in float32, and of a sum over an image's pixels.
_TOLERANCE = 1e-5

# A win that a plain pass does not confirm is attacked again, with a lead to reach of so many times
# the difference between the two passes.
_MARGINS = (2.0, 8.0)


def attack_keys(seed: int, attack: str, ids: HostArray) -> Key:
    """One key per example: fold_in(fold_in(seed, attack's name), example id).

    Args:
      seed: of the attacks, an integer in [0, 2**32).
      attack: a name.
      ids: (N,) integers, the examples' names.

    Raises:
      ValueError: another seed, which JAX would cut to 32 bits.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(attack.encode()))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(ids))


def check_not_empty(images: np.ndarray) -> None:
    """There is something to evaluate on.

    Raises:
      ValueError: no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to evaluate on")


def check_ids(ids: HostArray | None, examples: int) -> np.ndarray:
    """(N,) integers, the examples' names in the random keys; by default their positions.

    Args:
      ids: (N,) integers or None.
      examples: N.

    Raises:
      ValueError: another length, or no integers.
    """
    if ids is None:
        return np.arange(examples)
    ids = np.asarray(ids)
    if ids.shape != (examples,) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids must be ({examples},) integers, got {ids.shape} of {ids.dtype}")
    return ids


def has_unknown_threat(attack: Attack) -> bool:
    """Whether an attack, or a part of it, is a bare function, of which no threat is known.

    Args:
      attack: any.
    """
    if isinstance(attack, functools.partial):
        return has_unknown_threat(attack.func)
    if not isinstance(attack, Method):
        return True
    if "threat" in attack.arguments:
        return False
    return any(has_unknown_threat(part) for part in attack.combined)


def check_attack(
    name: str,
    attack: Attack,
    threat: Threat,
    examples: int,
    *,
    targets: bool = False,
    minimal: bool = False,
) -> None:
    """The attack is one of this threat, and takes what it will be given.

    Args:
      name: under which it will be reported.
      attack: any `Attack`; of a bare function nothing is known.
      threat: of the evaluation.
      examples: how many there are.
      targets: whether it will be given targets instead of labels.
      minimal: whether it may leave the ball, as with `minimal=True`.

    Raises:
      ValueError: another threat (both are named), labels that would be taken for targets or the
        other way round, an option with a value for each of another number of examples, or one that
        leaves the ball.
    """
    if isinstance(attack, functools.partial):
        return check_attack(name, attack.func, threat, examples, targets=targets, minimal=minimal)
    if not isinstance(attack, Method):
        if jnp.ndim(threat.eps):
            raise ValueError(
                f"attack {name} is a bare function, which cannot be given each example's eps: use "
                f"one of jaxdefense.attacks"
            )
        return None
    if attack.targeted and not targets:
        raise ValueError(
            f"attack {name} is targeted and would take the labels for targets: give targets=, one "
            f"class for each image"
        )
    if targets and not attack.targeted:
        raise ValueError(f"attack {name} is not targeted: make it with targeted=True")
    if "threat" not in attack.arguments:
        for part in attack.combined:
            check_attack(name, part, threat, examples, targets=targets, minimal=minimal)
        return None
    if not _same(attack.arguments["threat"], threat):
        raise ValueError(
            f"attack {name} was made for {attack.threat}, and this evaluation is of {threat}"
        )
    if attack.arguments.get("minimal") and not minimal:
        raise ValueError(
            f"attack {name} has minimal=True and returns images outside the ball: leave that out, "
            f"or measure distances by evaluation.curves.distances"
        )
    for array in attack.per_example():
        if len(array) != examples:
            raise ValueError(
                f"attack {name} has an option of {len(array)} values for {examples} images"
            )
    return None


def _same(first: Threat, second: Threat) -> bool:
    """Equal norms and boxes, and eps equal to the rounding of float32."""
    if (first.norm, tuple(first.bounds)) != (second.norm, tuple(second.bounds)):
        return False
    one, other = np.asarray(first.eps, np.float64), np.asarray(second.eps, np.float64)
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-6, atol=0)


def check_targets(targets: HostArray, labels: HostArray, num_classes: int) -> np.ndarray:
    """(N,) classes to be reached, none of them the label.

    Args:
      targets: (N,) integers.
      labels: (N,) integers.
      num_classes: K.

    Raises:
      ValueError: another shape, out of range, or a target that is the label.
    """
    targets = np.asarray(targets)
    try:
        checks.check_labels(targets, len(labels), num_classes)
    except ValueError as error:
        raise ValueError(str(error).replace("labels", "targets")) from error
    equal = np.flatnonzero(targets == labels)
    if len(equal):
        raise ValueError(
            f"targets are the labels at {equal[:5].tolist()} ({len(equal)} of {len(targets)}): "
            f"give other classes"
        )
    return targets


def check_grid(images: np.ndarray, threat: Threat, levels: int) -> None:
    """Each value is low + k / levels of the box's width, as in images of 8 bits with levels = 255.

    Args:
      images: (N, ...).
      threat: its bounds are the box.
      levels: steps over the box.

    Raises:
      ValueError: a value off the grid.
    """
    checks.check_count("grid", levels)
    low, high = threat.bounds
    steps = (images.astype(np.float64) - low) / (high - low) * levels
    off = np.abs(steps - np.rint(steps)).max(initial=0)
    if off > 0.01:
        raise ValueError(
            f"grid={levels} needs images in steps of 1/{levels} of {threat.bounds}, as images of "
            f"8 bits are with 255; a value lies {off:.2g} of a step beside"
        )


def _exactly(images: np.ndarray, threat: Threat, levels: int) -> np.ndarray:
    """Images on the grid to the bit, as a file of 8 bits gives them: XLA divides by reciprocals."""
    low, high = threat.bounds
    steps = np.rint((images - low) / (high - low) * levels).astype(np.float32)
    return low + steps / np.float32(levels) * np.float32(high - low)


def in_threat_set(threat: Threat, x_adv: Images, images: Images) -> Array:
    """(B,) bool: in the box, in the ball but for rounding, and finite.

    Args:
      threat: its ball and box.
      x_adv: (B, ...).
      images: (B, ...), the centres.
    """
    low, high = threat.bounds
    inside = jnp.all((x_adv >= low) & (x_adv <= high), range(1, x_adv.ndim))
    slack = _TOLERANCE * (high - low)
    limit = threat.eps * (1 + _TOLERANCE) + slack
    return inside & (threat.distance(x_adv, images) <= limit)  # NaN compares false


def with_margin_to_beat(predict: Predict, lead: Array | float) -> Predict:
    """A model whose logits are cut to the largest one less `lead`: what is nearer to it ties.

    A tie fools nobody, so an attack on it has won only where it wins on `predict` by more than
    `lead`. Gradients stay.

    Args:
      predict: images -> logits.
      lead: in logits, ().
    """

    def less(x: Images) -> Logits:
        logits = _wide(predict(x))
        over = jnp.maximum(logits - (jnp.max(logits, -1, keepdims=True) - lead), 0)
        return logits - jax.lax.stop_gradient(over)

    return less


def _wide(x: Array) -> Array:
    """In float32, or in what it is if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_images_of(name: str, x_adv: Any, images: Images) -> None:
    """What an attack returns are images of the shape that it was given."""
    told = type(x_adv).__name__
    if hasattr(x_adv, "shape") and hasattr(x_adv, "dtype"):
        if x_adv.shape == images.shape and jnp.issubdtype(x_adv.dtype, jnp.floating):
            return
        told = f"{x_adv.shape} of {x_adv.dtype}"
    raise ValueError(f"attack {name} must return floating images {images.shape}, got {told}")


class Attacked(NamedTuple):
    """What one dispatch found, (n,) each.

    Attributes:
      x_adv: (n, ...) images of the threat's set.
      fooled: whether a plain forward pass is fooled by them.
      unconfirmed: wins in the attack's own program that a plain pass did not confirm at first.
      logits: (n, K) float32, what the plain pass says of them.
    """

    x_adv: np.ndarray
    fooled: np.ndarray
    unconfirmed: np.ndarray
    logits: np.ndarray


class Evaluator:
    """A classifier's compiled forward pass and attacks, in few static shapes, for any weights.

    Args:
      apply: (variables, images (B, H, W, C)) -> logits (B, K), eval mode, logits not
        probabilities.
      threat: every attack is one of it, and every image is checked against it. Its eps is one
        number or one for each image of a call.
      batch_size: most examples per dispatch, over all devices; a device computes at least
        `LEAST`, padded where there are fewer, unless `batch_size` leaves it less; no example is
        dropped. Default 512, on the CPU `LEAST` a device: one compiled shape, and more images leave
        a core's cache.
      devices: that share each batch; default all local ones.
      grid: steps over the box (255 for images of 8 bits): what an attack finds is rounded to them
        inside the ball, and the verdict is the rounded image's.

    Raises:
      ValueError: batch_size or grid is no positive integer.
    """

    def __init__(
        self,
        apply: Apply,
        threat: Threat,
        *,
        batch_size: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        grid: int | None = None,
    ):
        checks.check_threat("Evaluator", threat)
        devices = tuple(devices or jax.local_devices())
        if batch_size is None:
            batch_size = LEAST * len(devices) if devices[0].platform == "cpu" else 512
        checks.check_count("batch_size", batch_size)
        if grid is not None:
            checks.check_count("grid", grid)
        self.apply, self.threat, self.grid = apply, threat, grid
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
        self._whole = NamedSharding(mesh, PartitionSpec())
        least = min(LEAST, max(batch_size // len(devices), 1)) * len(devices)
        self.large = max(batch_size // least, 1) * least
        self.small = max(self.large // 4 // least, 1) * least
        self._compiled: dict[Hashable, Callable] = {}
        self._programs: dict[Hashable, Any] = {}  # the model's, by what it is given

    def with_model(self, apply: Apply) -> "Evaluator":
        """An evaluator of another model, of the same threat, devices and batches.

        Args:
          apply: (variables, images) -> logits.
        """
        other = copy.copy(self)
        other.apply, other._compiled, other._programs = apply, {}, {}
        return other

    def replicate(self, variables: PyTree) -> PyTree:
        """The weights on every device, once for many calls.

        Args:
          variables: any pytree; what in it is no array stays as it is.
        """
        arrays, rest = partition(variables)
        return rest.join(jax.device_put(arrays, self._whole))

    def split_rows(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in groups that fit the two static shapes with little padding.

        Args:
          rows: (n,) integers.
        """
        start = 0
        while start < len(rows):
            left = len(rows) - start
            size = self.large if left > self.large - self.small else self.small
            yield rows[start : start + size]
            start += size

    def _padded(self, array: np.ndarray) -> np.ndarray:
        """A pack's array, its last row repeated up to a static shape."""
        n = len(array)
        size = self.small if n <= self.small else self.large
        return array[np.pad(np.arange(n), (0, size - n), "edge")]

    def dispatch(self, key: Hashable, function: Callable, variables: PyTree, *arrays: Any) -> Any:
        """function(variables, *arrays), compiled under `key`; the arrays are padded.

        Args:
          key: equal keys are equal functions.
          function: (variables, *arrays) -> arrays of as many rows.
          variables: `apply`'s first argument.
          *arrays: NumPy arrays of n rows, at most one pack.

        Returns:
          The function's result as NumPy arrays of n rows.
        """
        weights, rest = partition(variables)
        if (key, rest) not in self._compiled:

            def run(weights, *arrays):
                return function(rest.join(weights), *arrays)

            # No device hears of another: each stops when its own examples are done.
            self._compiled[key, rest] = jax.jit(
                jax.shard_map(
                    run,
                    mesh=self._split.mesh,
                    in_specs=(PartitionSpec(), *(PartitionSpec(_AXIS) for _ in arrays)),
                    out_specs=PartitionSpec(_AXIS),
                    check_vma=False,
                )
            )
        n = len(arrays[0])
        batched = [jax.device_put(self._padded(array), self._split) for array in arrays]
        result = self._compiled[key, rest](weights, *batched)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:n], result)

    def map_rows(
        self, key: Hashable, function: Callable, variables: PyTree, *arrays: np.ndarray
    ) -> np.ndarray:
        """As `dispatch`, for any number of rows.

        Args:
          key: see `dispatch`.
          function: see `dispatch`; it returns one array.
          variables: see `dispatch`.
          *arrays: NumPy arrays of N rows.
        """
        parts = [
            self.dispatch(key, function, variables, *(array[rows] for array in arrays))
            for rows in self.split_rows(np.arange(len(arrays[0])))
        ]
        return np.concatenate(parts)

    def logits(self, variables: PyTree, images: np.ndarray) -> np.ndarray:
        """(N, K) float32.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C).
        """
        return self.map_rows("logits", self.apply, variables, images).astype(np.float32)

    def measure_noise(self, variables: PyTree, images: np.ndarray) -> flags.Noise:
        """Whether the model answers alike twice, and in other company; see `flags.measure_noise`.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C), at least one.

        Raises:
          ValueError: the model is another than it was at an earlier call, in which programs with
            what it closes over were compiled.
        """

        def forward(x: np.ndarray) -> np.ndarray:
            return self.map_rows("logits", self.apply, variables, x)

        return flags.measure_noise(
            forward, images, self.threat, self._traces_differ(variables, images[:1])
        )

    def _traces_differ(self, variables: PyTree, image: np.ndarray) -> bool:
        """Whether two traces are different programs; a third one later has to be the same."""
        arrays, rest = partition(variables)
        given = (rest, tuple((a.shape, a.dtype) for a in map(jnp.asarray, arrays)), image.shape)

        def trace() -> Any:
            def program(arrays: Any, x: Array) -> Logits:
                return self.apply(rest.join(arrays), x)

            return flags.program_text(jax.make_jaxpr(program)(arrays, image))

        if given not in self._programs:
            self._programs[given] = trace()
            return trace() != self._programs[given]
        if trace() != self._programs[given]:
            raise ValueError(
                "the model is not the one that this Evaluator compiled: what it closes over has "
                "changed (trained meanwhile?). Give the weights as variables, or a new Evaluator"
            )
        return False

    def model_arrays(
        self, variables: PyTree, images: np.ndarray, *, keyed: bool = False
    ) -> list[Any]:
        """The model's numbers: its weights, and the arrays that it closes over.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C), whose shape counts.
          keyed: whether `apply` takes a key before the images.
        """
        arrays, rest = partition(variables)
        given = (jax.random.key(0), images[:1]) if keyed else (images[:1],)

        def program(arrays: Any, *given: Any) -> Logits:
            return self.apply(rest.join(arrays), *given)

        return [
            *map(np.asarray, arrays),
            *flags.program_text(jax.make_jaxpr(program)(arrays, *given))[1],
        ]

    def check_images(self, images: HostArray) -> np.ndarray:
        """The images on the host, checked; rounding at the box's edge is clipped.

        Args:
          images: (N, H, W, C) floats in the threat's bounds.

        Raises:
          ValueError: none at all, values out of bounds, an eps that does not fit them, or values
            off the grid.
        """
        if isinstance(images, jax.Array):
            images = np.asarray(images)
        check_not_empty(images)
        images = np.asarray(checks.check_images(images, self.threat.bounds))
        checks.check_eps(self.threat, images)
        if self.grid is not None:
            check_grid(images, self.threat, self.grid)
        return images

    def check_model(self, variables: PyTree, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The checks that need values; returns the clean logits (N, K).

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C) of `check_images`.
          labels: (N,) integers.

        Raises:
          ValueError: bad labels, probabilities, NaN, a random model, or one whose logits of an
            image depend on its batch (BatchNorm in train mode).
        """
        checks.count_classes(lambda x: self.apply(variables, x), images[:1])
        logits = self.logits(variables, images)
        checks.check_logits(logits, len(images))
        checks.check_labels(labels, len(images), logits.shape[-1])
        self.measure_noise(variables, images).check()
        return logits

    def craft(
        self,
        name: str,
        attack: Attack,
        variables: PyTree,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        seed: int = 0,
        margin: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One dispatch: (x_adv, the lead that the attack's own program sees).

        Args:
          name: part of the random keys.
          attack: one of the evaluator's threat.
          variables: `apply`'s first argument.
          images: (n, ...), at most one pack.
          labels: (n,), or targets.
          ids: (n,) integers.
          rows: (n,) places of these examples in values that are one per example (eps); default 0
            to n - 1.
          seed: of the attacks.
          margin: what the attack has to win by, in logits.

        Raises:
          ValueError: the attack left the threat's set.
        """
        rows = np.arange(len(ids)) if rows is None else rows
        own = attack.per_example() if isinstance(attack, Method) else []
        many = [np.asarray(array)[rows] for array in own]
        eps = [np.asarray(self.threat.eps, np.float32)[rows]] if jnp.ndim(self.threat.eps) else []
        targeted = takes_targets(attack)
        keyed = isinstance(attack, Method) and attack.samples is not None
        grid = self.grid

        def run(variables, data, x, y, *given):
            *given, margin = given
            ball = self.threat.with_eps(given[0]) if eps else self.threat
            made = attack
            if isinstance(attack, Method) and own:
                made = attack.with_per_example(iter(given[len(eps) :]))
            predict = functools.partial(self.apply, variables)
            keys = jax.random.wrap_key_data(data)
            if not strict:
                x_adv = made(predict, keys, x, y)
            elif has_unknown_threat(attack):
                x_adv = made(with_margin_to_beat(predict, margin[0]), keys, x, y)
            else:
                with require_margin(margin[0]):
                    x_adv = made(predict, keys, x, y)
            _check_images_of(name, x_adv, x)
            wide = _wide(x)
            if x_adv.dtype != wide.dtype:  # half precision leaves the ball by its rounding
                x_adv = ball.project(x_adv.astype(wide.dtype), wide)
            seen = jnp.zeros(len(x))
            if not keyed:
                seen = success_margin(_wide(predict(x_adv.astype(x.dtype))), y, targeted)
            if grid is not None:
                x_adv = ball.rounded(x_adv, wide, grid)
            return x_adv, in_threat_set(ball, x_adv, wide), seen

        strict = margin > 0
        data = np.asarray(jax.random.key_data(attack_keys(seed, name, ids)))
        margins = np.full(len(ids), margin, np.float32)
        key = ("attack", attack, strict)
        # Padding gets a wrong label: an attack that stops early spends nothing on it, and one of
        # several runs takes up others' runs in its place.
        padded = self._padded(labels)
        if not targeted and not keyed:
            padded[len(ids) :] = padded[len(ids) :] == 0
        x_adv, inside, seen = self.dispatch(
            key, run, variables, data, images, padded, *eps, *many, margins
        )
        if not inside.all():
            raise ValueError(
                f"attack {name} left the ball or the box of {self.threat}, or returned NaN, for "
                f"examples {ids[~inside][:5].tolist()}"
            )
        if grid is not None:
            x_adv = _exactly(x_adv, self.threat, grid)
        return x_adv, seen

    def attack(
        self,
        name: str,
        attack: Attack,
        variables: PyTree,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        *,
        rows: np.ndarray | None = None,
        seed: int = 0,
    ) -> Attacked:
        """One dispatch, each image checked again.

        A plain forward pass judges, not the attack's own: the two differ by rounding, much so in
        half precision. A win that the plain pass does not confirm is attacked again, with a lead to
        reach that rounding cannot undo.

        Args:
          name: part of the random keys.
          attack: one of the evaluator's threat.
          variables: `apply`'s first argument.
          images: (n, ...), at most one pack.
          labels: (n,), or targets.
          ids: (n,) integers.
          rows: see `craft`.
          seed: of the attacks.

        Raises:
          ValueError: the attack left the threat's set.
        """
        rows = np.arange(len(ids)) if rows is None else rows
        targeted = takes_targets(attack)

        def tried(some: np.ndarray, margin: float) -> tuple[np.ndarray, ...]:
            given = (images[some], labels[some], ids[some])
            found, seen = self.craft(
                name, attack, variables, *given, rows=rows[some], seed=seed, margin=margin
            )
            logits = self.logits(variables, found.astype(images.dtype))
            plain = np.asarray(
                success_margin(jnp.asarray(logits), jnp.asarray(labels[some]), targeted)
            )
            won = flags.is_fooled(logits, labels[some], targeted)
            return found, won, logits, np.abs(seen - plain), seen

        found, fooled, logits, lost, seen = tried(np.arange(len(ids)), 0.0)
        x_adv = np.array(found)
        noise = float(np.nanmax(lost, initial=0))
        doubtful = ~fooled & (seen > (0.0 if self.grid else -noise))
        unconfirmed = doubtful.copy()
        for times in _MARGINS:
            again = np.flatnonzero(doubtful)
            if len(again):
                found, won, answers, *_ = tried(again, times * max(float(lost[again].max()), 1e-6))
                x_adv[again[won]], logits[again[won]] = found[won], answers[won]
                fooled[again[won]], doubtful[again[won]] = True, False
        return Attacked(x_adv, fooled, unconfirmed, logits)

    def bits(
        self,
        variables: PyTree,
        images: HostArray,
        labels: HostArray,
        ids: HostArray,
        attacks: Mapping[str, Attack],
        *,
        targets: HostArray | None = None,
        seed: int = 0,
        everywhere: bool = False,
        progress: bool = False,
    ) -> dict[str, np.ndarray]:
        """Whether each example is classified rightly: {"clean": (N,) bool, attack: (N,) bool}.

        Each attack stands alone; an example that is wrong without one is wrong under all, unless
        `everywhere`.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C) floats in the threat's bounds.
          labels: (N,) integers.
          ids: (N,) integers, the examples' names in the random keys.
          attacks: by name, each of the evaluator's threat; the name is part of the key.
          targets: (N,) integers, for targeted attacks, whose bits then say whether the target was
            not reached.
          seed: of the attacks.
          everywhere: attack what is misclassified already, too, and count it as right where the
            attack happens to mend it, as papers' scripts do.
          progress: show a bar.

        Raises:
          ValueError: an attack of another threat, a targeted one without targets, and what
            `check_images`, `check_model` and `attack` raise.
        """
        images, labels = self.check_images(images), np.asarray(labels)
        ids = check_ids(ids, len(images))
        for name, attack in attacks.items():
            check_attack(name, attack, self.threat, len(images), targets=targets is not None)
        variables = self.replicate(variables)
        logits = self.check_model(variables, images, labels)
        clean = logits.argmax(-1) == labels
        aims = labels if targets is None else check_targets(targets, labels, logits.shape[-1])
        withstood = clean if targets is None else ~flags.is_fooled(logits, aims, targeted=True)
        result = {"clean": clean, **{name: withstood.copy() for name in attacks}}
        rows = np.arange(len(clean)) if everywhere else np.flatnonzero(withstood)
        with tqdm(total=len(rows) * len(attacks), disable=not progress, unit="image") as bar:
            for name, attack in attacks.items():
                bar.set_postfix_str(name)
                for pack in self.split_rows(rows):
                    given = (images[pack], aims[pack], ids[pack])
                    found = self.attack(name, attack, variables, *given, rows=pack, seed=seed)
                    result[name][pack] = ~found.fooled
                    bar.update(len(pack))
        return result


def summarize(
    bits: Mapping[str, np.ndarray], labels: np.ndarray, num_classes: int
) -> dict[str, Any]:
    """What a record keeps of bits, accuracies in percent.

    Args:
      bits: {name: (N,) bool}.
      labels: (N,) integers.
      num_classes: K.

    Returns:
      {name: {"accuracy", "per_class": [K] (None for a class without examples), "n", "bits"}}.
    """

    def percent(right):
        return 100 * float(right.mean()) if len(right) else None

    return {
        name: {
            "accuracy": percent(right),
            "per_class": [percent(right[labels == k]) for k in range(num_classes)],
            "n": len(right),
            "bits": records.pack_bits(right),
        }
        for name, right in bits.items()
    }
