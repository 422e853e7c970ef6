"""One bit per example: is it classified rightly, clean and under each attack?

`Evaluator.bits` answers for attacks that stand alone; `cascade`, for AutoAttack, gives each attack
what those before it have left. Every image that an attack returns is checked again: in the box, in
the ball, finite, and really misclassified by a plain forward pass. Keys are per example (seed,
attack, example id), so what is drawn for an example does not depend on the batch size, the order or
the other examples.
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

from jaxdefense import distributed, validate
from jaxdefense.attacks import checks
from jaxdefense.attacks.method import takes_targets
from jaxdefense.attacks.outcome import success_margin
from jaxdefense.evaluation import flags, memory, records
from jaxdefense.evaluation.checks import (
    check_attack,
    check_grid,
    check_ids,
    check_targets,
)
from jaxdefense.evaluation.crafting import Apply, AttackProgram, Examples, round_to_grid
from jaxdefense.evaluation.journal import Journal
from jaxdefense.rewrite import fast_convolutions
from jaxdefense.types import Array, Attack, HostArray, Key, Logits, PyTree, Threat, partition

# On XLA:CPU a network's logits and gradients are the same to the bit in every batch of 64 or
# more, whatever its size and an example's place in it, and not in smaller ones (measured for the
# CNN and ResNet-18 here). So no device gets a smaller one, unless a smaller batch is asked for.
MIN_PER_DEVICE = 64

_AXIS = "examples"

# A win that a plain pass does not confirm is attacked again, with these multiples of the
# difference between the two passes as the lead to reach.
_KEPT = ("attack", "curve")  # dispatches that a journal keeps: the long ones
_MARGIN_FACTORS = (2.0, 8.0)


def attack_keys(seed: int, attack: str, ids: HostArray) -> Key:
    """One random key per example: fold_in(fold_in(seed, attack's name), example id).

    Args:
      seed: of the attacks, an integer in [0, 2**32).
      attack: a name.
      ids: (N,) integers, the examples' names.

    Raises:
      ValueError: another seed, which JAX would cut to 32 bits.
    """
    validate.check_seed("seed", seed)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(attack.encode()))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(ids))


class Attacked(NamedTuple):
    """What an attack on one batch of n examples found.

    Attributes:
      x_adv: (n, ...) images of the threat's set.
      fooled: (n,) whether a plain forward pass is fooled by them.
      unconfirmed: (n,) wins in the attack's own program that a plain pass did not confirm at first.
      logits: (n, K) float32, what the plain pass says of them.
    """

    x_adv: np.ndarray
    fooled: np.ndarray
    unconfirmed: np.ndarray
    logits: np.ndarray


class _Attempt(NamedTuple):
    """One run of an attack on a batch.

    Attributes:
      x_adv: (n, ...) images.
      fooled: (n,) whether a plain forward pass is fooled by them.
      logits: (n, K) of the plain pass.
      lead: (n,) of the wrong class, in logits, as the attack's own program sees it.
      disagreement: (n,) between that lead and the plain pass's.
    """

    x_adv: np.ndarray
    fooled: np.ndarray
    logits: np.ndarray
    lead: np.ndarray
    disagreement: np.ndarray


class Evaluator:
    """Judges a classifier, whatever its weights: compiles its forward pass and attacks once.

    Batches are padded to one of two shapes, `small` and `large`, so that few programs are compiled.

    Args:
      apply: (variables, images (B, H, W, C)) -> logits (B, K), eval mode, logits not
        probabilities.
      threat: every attack is one of it, and every image is checked against it. Its eps is one
        number or one for each image of a call.
      batch_size: most examples per dispatch, over all devices; a device computes at least
        `MIN_PER_DEVICE`, padded where there are fewer, unless `batch_size` leaves it less; no
        example is dropped. Default 512, on the CPU `MIN_PER_DEVICE` a device: one compiled shape,
        and more images leave a core's cache.
      devices: that share each batch; default all, those of other processes too. Every process then
        makes the same calls with the same arguments, and gets the same results.
      grid: steps over the box (255 for images of 8 bits): what an attack finds is rounded to them
        inside the ball, and the verdict is the rounded image's.
      before_dispatch: called before each batch; what it raises ends the evaluation there.
      journal: keeps what attacks give, batch by batch, for the same evaluation to go on with. It
        is for one model and its transfer sources, whose attacks have different names.

    Raises:
      ValueError: batch_size or grid is no positive integer.

    >>> import numpy as np
    >>> from jaxdefense import evaluation, threat
    >>> apply = lambda weights, x: x.reshape(len(x), -1) @ weights
    >>> evaluator = evaluation.Evaluator(apply, threat.Linf(0.1))
    >>> evaluator.logits(np.ones((4, 3)), np.zeros((5, 2, 2, 1))).shape
    (5, 3)
    """

    def __init__(
        self,
        apply: Apply,
        threat: Threat,
        *,
        batch_size: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        grid: int | None = None,
        before_dispatch: Callable[[], None] | None = None,
        journal: Journal | None = None,
    ):
        if not callable(apply):
            raise ValueError(
                f"apply must be a function (variables, images), got {type(apply).__name__}"
            )
        checks.check_threat(threat)
        devices = tuple(devices or jax.devices())
        if batch_size is None:
            batch_size = MIN_PER_DEVICE * len(devices) if devices[0].platform == "cpu" else 512
        checks.check_count("batch_size", batch_size)
        if grid is not None:
            checks.check_count("grid", grid)
        self.apply, self.fast_apply = apply, fast_convolutions(apply)
        self.threat, self.grid = threat, grid
        self.before_dispatch, self.journal = before_dispatch, journal
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
        self._whole = NamedSharding(mesh, PartitionSpec())
        least = min(MIN_PER_DEVICE, max(batch_size // len(devices), 1)) * len(devices)
        self.large = max(batch_size // least, 1) * least
        self.small = max(self.large // 4 // least, 1) * least
        self._compiled: dict[Hashable, Callable] = {}
        self._programs: dict[Hashable, Any] = {}  # the model's, by what it is given

    def with_model(self, apply: Apply) -> "Evaluator":
        """An evaluator of another model, with the same threat, devices and batch sizes.

        Args:
          apply: (variables, images) -> logits, or with a key before the images.
        """
        other = copy.copy(self)
        other.apply, other.fast_apply = apply, fast_convolutions(apply)
        other._compiled, other._programs = {}, {}
        return other

    def replicate(self, variables: PyTree) -> PyTree:
        """The weights on every device: copied once for many calls.

        Args:
          variables: any pytree; what in it is no array stays as it is.
        """
        arrays, rest = partition(variables)
        return rest.join([distributed.shard(array, self._whole) for array in arrays])

    def split_rows(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in batches that fit the two compiled shapes with little padding.

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
        """A batch's array, its last row repeated up to a static shape."""
        n = len(array)
        size = self.small if n <= self.small else self.large
        return array[np.pad(np.arange(n), (0, size - n), "edge")]

    def dispatch(self, key: Hashable, function: Callable, variables: PyTree, *arrays: Any) -> Any:
        """Runs function(variables, *arrays) on one batch, padded; compiled once for each `key`.

        Args:
          key: equal keys are equal functions.
          function: (variables, *arrays) -> arrays of as many rows.
          variables: `apply`'s first argument.
          *arrays: NumPy arrays of n rows, at most one batch.

        Returns:
          The function's result as NumPy arrays of n rows.

        Raises:
          OutOfMemory: a device's memory is full; the message names the batch size that would fit.
        """
        if self.before_dispatch is not None:
            self.before_dispatch()
        kind = key[0] if isinstance(key, tuple) else key
        if self.journal is None or kind not in _KEPT:
            return self._dispatch(key, function, variables, *arrays)

        def compute() -> list[np.ndarray]:
            return jax.tree.leaves(self._dispatch(key, function, variables, *arrays))

        found = self.journal.recall((kind.encode(), *arrays), compute)
        return found[0] if len(found) == 1 else tuple(found)

    def _dispatch(self, key: Hashable, function: Callable, variables: PyTree, *arrays: Any) -> Any:
        """`dispatch` without the journal."""
        weights, rest = partition(variables)
        if (key, rest) not in self._compiled:

            def run(weights, *arrays):
                return function(rest.join(weights), *arrays)

            # No collectives: each device's loops end when its own examples are done.
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
        padded = [self._padded(array) for array in arrays]
        compiled: Any = self._compiled[key, rest]

        def lower(batch: int) -> Any:
            shapes = [
                jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype, sharding=self._split)
                for a in padded
            ]
            return compiled.lower(weights, *shapes)

        with memory.explain_out_of_memory(
            "an evaluation",
            len(padded[0]),
            lower,
            multiple=self._split.mesh.size,
            advice="--config.evaluation.batch_size={batch}, in Python batch_size={batch}",
        ):
            batched = [distributed.shard(array, self._split) for array in padded]
            if distributed.spans_processes(self._whole):  # weights of this process fit no mesh
                weights = [distributed.shard(array, self._whole) for array in weights]
            result = compiled(weights, *batched)
            return jax.tree.map(lambda leaf: leaf[:n], distributed.gather(result))

    def map_rows(
        self, key: Hashable, function: Callable, variables: PyTree, *arrays: np.ndarray
    ) -> np.ndarray:
        """Runs function(variables, *arrays) on any number of rows, batch by batch.

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
        """The classifier's logits by a plain forward pass.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C).

        Returns:
          (N, K) float32.
        """
        return self.map_rows("logits", self.fast_apply, variables, images).astype(np.float32)

    def measure_noise(self, variables: PyTree, images: np.ndarray) -> flags.Noise:
        """Whether the same images get the same logits twice, and beside other images.

        See `flags.measure_noise`.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C), at least one.

        Raises:
          ValueError: the model is another than it was at an earlier call, in which programs with
            what it closes over were compiled.
        """

        def forward(x: np.ndarray) -> np.ndarray:
            return self.map_rows("logits", self.fast_apply, variables, x)

        return flags.measure_noise(
            forward, images, self.threat, self._traces_differ(variables, images[:1])
        )

    def _traces_differ(self, variables: PyTree, image: np.ndarray) -> bool:
        """Whether two traces are different programs; a third one later has to be the same."""
        arrays, rest = partition(variables)
        shapes = tuple((a.shape, a.dtype) for a in map(jnp.asarray, arrays))
        inputs = (rest, shapes, image.shape, image.dtype)

        def trace() -> Any:
            def program(arrays: Any, x: Array) -> Logits:
                return self.apply(rest.join(arrays), x)

            return flags.program_text(jax.make_jaxpr(program)(arrays, image))

        if inputs not in self._programs:
            self._programs[inputs] = trace()
            return trace() != self._programs[inputs]
        if trace() != self._programs[inputs]:
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
        inputs = (jax.random.key(0), images[:1]) if keyed else (images[:1],)

        def program(arrays: Any, *inputs: Any) -> Logits:
            return self.apply(rest.join(arrays), *inputs)

        return [
            *map(np.asarray, arrays),
            *flags.program_text(jax.make_jaxpr(program)(arrays, *inputs))[1],
        ]

    def check_images(self, images: HostArray) -> np.ndarray:
        """Checks images, and returns them on the host, rounding at the box's edge clipped.

        Args:
          images: (N, H, W, C) floats in the threat's bounds.

        Raises:
          ValueError: none at all, values out of bounds, an eps that does not fit them, or values
            off the grid.
        """
        if hasattr(images, "__array__"):  # JAX's, and PyTorch's on the CPU
            images = np.asarray(images)
        images = np.asarray(checks.check_images(images, self.threat.bounds))
        checks.check_eps(self.threat, images)
        if self.grid is not None:
            check_grid(images, self.threat, self.grid)
        return images

    def check_model(self, variables: PyTree, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Checks labels and logits, and that the model is deterministic; returns the clean logits.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C) of `check_images`.
          labels: (N,) integers.

        Returns:
          (N, K) float32.

        Raises:
          ValueError: bad labels, probabilities, NaN, a random model, or one whose logits of an
            image depend on its batch (BatchNorm in train mode).
        """
        checks.check_label_count(labels, len(images))
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
        examples: Examples,
        *,
        seed: int = 0,
        margin: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """An attack's images of one batch, in the threat's set, and the lead by which they win.

        Args:
          name: part of the random keys.
          attack: one of the evaluator's threat.
          variables: `apply`'s first argument.
          examples: at most one batch.
          seed: of the attacks.
          margin: what the attack has to win by, in logits.

        Returns:
          Images (n, ...), and the lead of the wrong class in logits (n,) that the attack's own
          program sees, zeros for a randomised model.

        Raises:
          ValueError: the attack left the threat's set.
        """
        program = AttackProgram(
            name, attack, self.fast_apply, self.threat, self.grid, with_margin=margin > 0
        )
        x_adv, inside, lead = self.dispatch(
            ("attack", attack, program.with_margin),
            program,
            variables,
            np.asarray(jax.random.key_data(attack_keys(seed, name, examples.ids))),
            examples.images,
            self._labels_with_padding(examples.labels, program),
            *program.values_of(examples.rows),
            np.full(len(examples), margin, np.float32),
        )
        if not inside.all():
            raise ValueError(
                f"attack {name} left the ball or the box of {self.threat}, or returned NaN, for "
                f"examples {examples.ids[~inside][:5].tolist()}"
            )
        if self.grid is not None:
            x_adv = round_to_grid(x_adv, self.threat, self.grid)
        return x_adv, lead

    def _labels_with_padding(self, labels: np.ndarray, program: AttackProgram) -> np.ndarray:
        """The labels of a padded batch: padding gets a wrong one, so it is fooled from the start.

        An attack that stops early spends nothing on it, and one of several runs takes up others'
        runs in its place. Targets and a randomised model's labels are padded as they are.
        """
        padded = self._padded(labels)
        if not program.targeted and not program.randomised:
            padded[len(labels) :] = padded[len(labels) :] == 0
        return padded

    def attack(
        self,
        name: str,
        attack: Attack,
        variables: PyTree,
        examples: Examples,
        *,
        seed: int = 0,
    ) -> Attacked:
        """Attacks one batch and checks each image again by a plain forward pass.

        A plain forward pass judges, not the attack's own: the two differ by rounding, much so in
        half precision. A win that the plain pass does not confirm is attacked again, with a lead to
        reach that rounding cannot undo.

        Args:
          name: part of the random keys.
          attack: one of the evaluator's threat.
          variables: `apply`'s first argument.
          examples: at most one batch.
          seed: of the attacks.

        Raises:
          ValueError: the attack left the threat's set.

        >>> import numpy as np
        >>> from jaxdefense import attacks, threat
        >>> from jaxdefense.evaluation import Evaluator, Examples
        >>> ball = threat.Linf(0.5)
        >>> evaluator = Evaluator(lambda _, x: x.reshape(len(x), -1)[:, :3], ball)
        >>> examples = Examples.of(np.full((4, 2, 2, 1), 0.5), np.zeros(4, int), np.arange(4))
        >>> evaluator.attack("fgsm", attacks.fgsm(ball), (), examples).fooled.tolist()
        [True, True, True, True]
        """
        attempt = functools.partial(self._attempt, name, attack, variables, seed=seed)
        first = attempt(examples, margin=0.0)
        x_adv, fooled, logits = np.array(first.x_adv), first.fooled, first.logits
        noise = float(np.nanmax(first.disagreement, initial=0))
        doubtful = ~fooled & (first.lead > (0.0 if self.grid else -noise))
        unconfirmed = doubtful.copy()
        for factor in _MARGIN_FACTORS:
            places = np.flatnonzero(doubtful)
            if len(places):
                margin = factor * max(float(first.disagreement[places].max()), 1e-6)
                again = attempt(examples.take(places), margin=margin)
                won = places[again.fooled]
                x_adv[won], logits[won] = again.x_adv[again.fooled], again.logits[again.fooled]
                fooled[won], doubtful[won] = True, False
        return Attacked(x_adv, fooled, unconfirmed, logits)

    def _attempt(
        self,
        name: str,
        attack: Attack,
        variables: PyTree,
        examples: Examples,
        *,
        seed: int,
        margin: float,
    ) -> _Attempt:
        """`craft`, and what a plain forward pass says of its images."""
        x_adv, lead = self.craft(name, attack, variables, examples, seed=seed, margin=margin)
        targeted, labels = takes_targets(attack), examples.labels
        logits = self.logits(variables, x_adv.astype(examples.images.dtype))
        plain = np.asarray(success_margin(jnp.asarray(logits), jnp.asarray(labels), targeted))
        fooled = flags.is_fooled(logits, labels, targeted)
        return _Attempt(x_adv, fooled, logits, lead, np.abs(lead - plain))

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
        keep: Callable[[np.ndarray, Attacked], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Whether each example is classified rightly, clean and under each attack.

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
          keep: called with the rows (n,) of each batch and what an attack found there.

        Returns:
          {"clean": (N,) bool, attack's name: (N,) bool}.

        Raises:
          ValueError: attacks without names, one of another threat, a targeted one without targets,
            and what `check_images`, `check_model` and `attack` raise.

        >>> import numpy as np
        >>> from jaxdefense import attacks, evaluation, threat
        >>> ball = threat.Linf(0.5)
        >>> evaluator = evaluation.Evaluator(lambda _, x: x.reshape(len(x), -1)[:, :3], ball)
        >>> images = np.random.default_rng(0).uniform(size=(8, 2, 2, 1))
        >>> labels = images.reshape(8, -1)[:, :3].argmax(-1)
        >>> bits = evaluator.bits((), images, labels, np.arange(8), {"fgsm": attacks.fgsm(ball)})
        >>> {name: int(right.sum()) for name, right in bits.items()}
        {'clean': 8, 'fgsm': 0}
        """
        if not isinstance(attacks, Mapping):
            raise ValueError(f"attacks must be a mapping {{name: attack}}, got {attacks!r}")
        images, labels = self.check_images(images), np.asarray(labels)
        ids = check_ids(ids, len(images))
        for name, attack in attacks.items():
            checks.check_attack_name(name)
            check_attack(name, attack, self.threat, len(images), targets=targets is not None)
        variables = self.replicate(variables)
        logits = self.check_model(variables, images, labels)
        clean = logits.argmax(-1) == labels
        aims = labels if targets is None else check_targets(targets, labels, logits.shape[-1])
        withstood = clean if targets is None else ~flags.is_fooled(logits, aims, targeted=True)
        result = {"clean": clean, **{name: withstood.copy() for name in attacks}}
        examples = Examples.of(images, aims, ids)
        rows = np.arange(len(clean)) if everywhere else np.flatnonzero(withstood)
        with tqdm(total=len(rows) * len(attacks), disable=not progress, unit="image") as bar:
            for name, attack in attacks.items():
                bar.set_postfix_str(name)
                for pack in self.split_rows(rows):
                    attacked = self.attack(name, attack, variables, examples.take(pack), seed=seed)
                    result[name][pack] = ~attacked.fooled
                    if keep is not None:
                        keep(pack, attacked)
                    bar.update(len(pack))
        return result


def summarize(
    bits: Mapping[str, np.ndarray], labels: np.ndarray, num_classes: int
) -> dict[str, Any]:
    """Bits as a record keeps them, with their accuracies in percent.

    Args:
      bits: {name: (N,) bool}.
      labels: (N,) integers.
      num_classes: K.

    Returns:
      {name: {"accuracy", "per_class": [K] (None for a class without examples), "per_class_n": [K],
      "n", "bits"}}.

    >>> import numpy as np
    >>> from jaxdefense import evaluation
    >>> bits = {"clean": np.array([True, True, False, True])}
    >>> summary = evaluation.summarize(bits, np.array([0, 0, 1, 1]), 2)
    >>> summary["clean"]["accuracy"], summary["clean"]["per_class"]
    (75.0, [100.0, 50.0])
    """

    def percent(right):
        return 100 * float(right.mean()) if len(right) else None

    return {
        name: {
            "accuracy": percent(right),
            "per_class": [percent(right[labels == k]) for k in range(num_classes)],
            "per_class_n": [int((labels == k).sum()) for k in range(num_classes)],
            "n": len(right),
            "bits": records.pack_bits(right),
        }
        for name, right in bits.items()
    }
