"""One bit per example: is it classified rightly, clean and under each attack?

Every image that an attack returns is checked again: in the box, in the ball, finite, and really
misclassified by a plain forward pass. Keys are per example (seed, attack, example id), so what is
drawn for an example does not depend on the batch size, the order or the other examples.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxdefense.attacks import checks
from jaxdefense.evaluation import records
from jaxdefense.types import Array, Attack, HostArray, Images, Key, Logits, PyTree, Threat

Apply = Callable[[PyTree, Images], Logits]  # (variables, images) -> logits, eval mode

# On XLA:CPU a network's logits and gradients are the same to the bit in every batch of 64 or
# more, whatever its size and an example's place in it, and not in smaller ones (measured for the
# CNN and ResNet-18 here). So no device gets a smaller one.
LEAST = 64

_AXIS = "examples"

# Rounding of x + eps in float32, and of a sum over an image's pixels.
_TOLERANCE = 1e-5


def attack_keys(seed: int, attack: str, ids: HostArray) -> Key:
    """One key per example: fold_in(fold_in(seed, attack's name), example id)."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(attack.encode()))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(ids))


def check_company(forward: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> None:
    """What the network says of an image does not depend on the rest of the batch.

    Args:
      forward: images (n, H, W, C) -> logits (n, K).
      images: a batch; with one image there is nothing to compare.

    Raises:
      ValueError: it does; BatchNorm is probably in train mode.
    """
    if len(images) < 2:
        return
    other = np.roll(images, 1, 0)
    other[0] = images[0]
    whole, mixed = (np.asarray(forward(batch), np.float32) for batch in (images, other))
    difference = float(np.abs(mixed[0] - whole[0]).max() / (np.abs(whole).max() + 1e-6))
    if difference > 1e-2:
        raise ValueError(
            f"the logits of an image change with the rest of its batch (by {difference:.3g} of "
            f"their scale): BatchNorm in train mode? Evaluate with running averages"
        )


def check_some(images: np.ndarray) -> None:
    """There is something to evaluate on.

    Raises:
      ValueError: no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to evaluate on")


def valid(threat: Threat, x_adv: Images, images: Images) -> Array:
    """(B,) bool: in the box, in the ball but for rounding, and finite."""
    low, high = threat.bounds
    inside = jnp.all((x_adv >= low) & (x_adv <= high), range(1, x_adv.ndim))
    limit = threat.eps * (1 + _TOLERANCE) + _TOLERANCE
    return inside & (threat.distance(x_adv, images) <= limit)  # NaN compares false


class Evaluator:
    """A classifier's compiled forward pass and attacks, in few static shapes, for any weights.

    Args:
      apply: (variables, images (B, H, W, C)) -> logits (B, K), eval mode, logits not
        probabilities.
      threat: every attack's images are checked against it.
      batch_size: most examples per dispatch, over all devices; a device computes at least
        `LEAST`, padded where there are fewer; no example is dropped. Default 512, on the CPU
        `LEAST` a device: one compiled shape, and more images leave a core's cache.
      devices: that share each batch; default all local ones.

    Raises:
      ValueError: batch_size is no positive integer.
    """

    def __init__(
        self,
        apply: Apply,
        threat: Threat,
        *,
        batch_size: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = tuple(devices or jax.local_devices())
        if batch_size is None:
            batch_size = LEAST * len(devices) if devices[0].platform == "cpu" else 512
        checks.check_count("batch_size", batch_size)
        self.apply, self.threat = apply, threat
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        self._split = NamedSharding(mesh, PartitionSpec(_AXIS))
        self._whole = NamedSharding(mesh, PartitionSpec())
        least = LEAST * len(devices)
        self.large = max(batch_size // least, 1) * least
        self.small = max(self.large // 4 // least, 1) * least
        self._compiled: dict[str, Callable] = {}

    def place(self, variables: PyTree) -> PyTree:
        """The weights on every device, once for many calls."""
        return jax.device_put(variables, self._whole)

    def packs(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in groups that fit the two static shapes with little padding."""
        start = 0
        while start < len(rows):
            left = len(rows) - start
            size = self.large if left > self.large - self.small else self.small
            yield rows[start : start + size]
            start += size

    def _rows(self, n: int) -> np.ndarray:
        """The rows of a pack of n, the last one repeated up to a static shape."""
        size = self.small if n <= self.small else self.large
        return np.pad(np.arange(n), (0, size - n), "edge")

    def call(self, name: str, function: Callable, variables: PyTree, *arrays: np.ndarray) -> Any:
        """function(variables, *arrays), compiled under `name`; the arrays are padded."""
        if name not in self._compiled:
            # No device hears of another: each stops when its own examples are done.
            self._compiled[name] = jax.jit(
                jax.shard_map(
                    function,
                    mesh=self._split.mesh,
                    in_specs=(PartitionSpec(), *(PartitionSpec(_AXIS) for _ in arrays)),
                    out_specs=PartitionSpec(_AXIS),
                    check_vma=False,
                )
            )
        n = len(arrays[0])
        rows = self._rows(n)
        batched = [jax.device_put(array[rows], self._split) for array in arrays]
        result = self._compiled[name](variables, *batched)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:n], result)

    def logits(self, variables: PyTree, images: np.ndarray) -> np.ndarray:
        """(N, K) float32."""
        parts = [
            self.call("logits", self.apply, variables, images[rows])
            for rows in self.packs(np.arange(len(images)))
        ]
        return np.concatenate(parts).astype(np.float32)

    def check(self, variables: PyTree, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The checks that need values; returns the clean logits (N, K).

        Raises:
          ValueError: bad images or labels, probabilities, NaN, or BatchNorm in train mode.
        """
        check_some(images)
        checks.check_images(jnp.asarray(images), self.threat.bounds)
        checks.check_eps(self.threat, images)
        logits = self.logits(variables, images)
        checks.check_logits(logits, len(images))
        checks.check_labels(labels, len(images), logits.shape[-1])
        check_company(lambda x: self.logits(variables, x), images[:LEAST])
        return logits

    def attack(
        self,
        name: str,
        attack: Attack,
        variables: PyTree,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        *,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One dispatch: (x_adv, fooled (n,) bool), each image checked again.

        A plain forward pass judges, not the attack's own.

        Args:
          name: part of the random keys, and of the compiled program: one attack per name.
          images, labels, ids: (n, ...) NumPy arrays, at most one pack.

        Raises:
          ValueError: the attack left the threat's set.
        """

        def run(variables, data, x, y):
            keys = jax.random.wrap_key_data(data)
            x_adv = attack(lambda z: self.apply(variables, z), keys, x, y)
            return x_adv, valid(self.threat, x_adv, x)

        n, rows = len(ids), self._rows(len(ids))
        data = np.asarray(jax.random.key_data(attack_keys(seed, name, ids)))
        # What fills the batch up gets a wrong label: an attack that stops early spends nothing on
        # it, and one of several runs takes up others' runs in its place.
        given = np.where(np.arange(len(rows)) < n, labels[rows], labels[rows] == 0)
        x_adv, inside = (
            found[:n]
            for found in self.call(
                f"attack {name}", run, variables, data[rows], images[rows], given
            )
        )
        if not inside.all():
            raise ValueError(
                f"attack {name} left the ball or the box of {self.threat}, or returned NaN, for "
                f"examples {ids[~inside][:5].tolist()}"
            )
        wrong = self.call("logits", self.apply, variables, x_adv).argmax(-1) != labels
        return x_adv, wrong

    def bits(
        self,
        variables: PyTree,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        attacks: Mapping[str, Attack],
        *,
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
          attacks: by name; the name is part of the key.
          seed: of the attacks.
          everywhere: attack what is misclassified already, too, and count it as right where the
            attack happens to mend it, as papers' scripts do.
          progress: show a bar.

        Raises:
          ValueError: see `check` and `attack`.
        """
        images, labels, ids = (np.asarray(array) for array in (images, labels, ids))
        variables = self.place(variables)
        clean = self.check(variables, images, labels).argmax(-1) == labels
        result = {"clean": clean, **{name: clean.copy() for name in attacks}}
        rows = np.arange(len(clean)) if everywhere else np.flatnonzero(clean)
        with tqdm(total=len(rows) * len(attacks), disable=not progress, unit="image") as bar:
            for name, attack in attacks.items():
                bar.set_postfix_str(name)
                for pack in self.packs(rows):
                    given = (images[pack], labels[pack], ids[pack])
                    _, wrong = self.attack(name, attack, variables, *given, seed=seed)
                    result[name][pack] = ~wrong
                    bar.update(len(pack))
        return result


def summary(bits: Mapping[str, np.ndarray], labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """What a record keeps of bits, accuracies in percent.

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
            "bits": records.pack(right),
        }
        for name, right in bits.items()
    }
