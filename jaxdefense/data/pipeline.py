"""Training batches for the pmapped step, and test batches in equal shapes.

A `Batches` is a pure function of (seed, step): any step may be asked for at any time, so a resumed
run sees what the uninterrupted one would have seen. `OnDevice` keeps the set on every device and
hands out indices; `Streaming` reads ahead with grain and hands out images. For equal arguments the
batches are equal bit for bit:

    def body(carry, item):  # one step on one device
        batch = batches.gather(resident, item)  # images (b, H, W, C) in [0, 1]
        ...
    step = jax.pmap(lambda state, resident, chunk: jax.lax.scan(body, state, chunk), "batch")
    state, metrics = step(state, batches.resident, batches.chunk(first_step, n))
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, overload

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import registry
from jaxdefense.data import order
from jaxdefense.data.arrays import Arrays, Encoded
from jaxdefense.types import Array, PyTree

Batch = dict[str, Any]


class Batches(Protocol):
    """Training data as the loop sees them; `OnDevice` and `Streaming` are such.

    Attributes:
      steps_per_epoch: batches in one pass over the data.
      batch_size: examples in a batch, over all devices of all processes.
      num_classes: K.
      resident: what the step needs on every device, leading axis: local devices; () if nothing.
    """

    steps_per_epoch: int
    batch_size: int
    num_classes: int
    resident: PyTree

    def chunk(self, step: int, n: int) -> PyTree:
        """The data of n steps, as leaves (local devices, n, ...).

        Args:
          step: the first one, counted over the whole run.
          n: how many.
        """
        ...

    def gather(self, resident: PyTree, item: PyTree) -> Batch:
        """One device's batch of one step: 'image' in [0, 1], 'label' and 'id'; for use in jit.

        Args:
          resident: the device's part of `resident`.
          item: the device's part of one step of `chunk`.
        """
        ...


@overload
def to_float(images: np.ndarray | Encoded) -> np.ndarray: ...
@overload
def to_float(images: Array) -> Array: ...
def to_float(images: np.ndarray | Encoded | Array) -> np.ndarray | Array:
    """images / 255, correctly rounded to float32: equal in numpy and in jit on every backend.

    Args:
      images: uint8, any shape; images on disk are read.

    Raises:
      ValueError: another dtype.

    >>> import numpy as np
    >>> from jaxdefense import data
    >>> data.to_float(np.array([0, 255], np.uint8)).tolist()
    [0.0, 1.0]
    """
    if images.dtype != np.uint8:
        raise ValueError(f"need uint8 images, got {images.dtype}")
    if isinstance(images, Encoded):
        images = images[:]
    if isinstance(images, np.ndarray):
        return images / np.float32(255)
    # XLA turns a division by 255 into a product that is off by one bit for half the values. But
    # x/255 = 0.010101... x in base 256: three digits are exact in float32, and the rest only
    # decides how they are rounded.
    digits = (images.astype(jnp.int32) * 0x010101).astype(jnp.float32) * np.float32(2**-24)
    return digits + images.astype(jnp.float32) * np.float32(2**-24 / 255)


class _Schedule:
    """Which rows each local device sees at each step; see `OnDevice` for the arguments."""

    def __init__(
        self,
        arrays: Arrays,
        batch_size: int,
        seed: int,
        devices: Sequence[jax.Device] | None,
        remainder: str,
    ) -> None:
        self.devices = tuple(devices or jax.local_devices())
        count = len(self.devices) * jax.process_count()
        rows = len(arrays)
        if remainder not in ("drop", "fill"):
            registry.raise_unknown("remainder", remainder, ("drop", "fill"))
        if rows == 0:
            raise ValueError(f"{arrays.name}: there are no examples to train on")
        if not 0 < batch_size <= rows:
            raise ValueError(f"batch_size must be in 1..{rows} (all examples), got {batch_size}")
        if batch_size % count:
            raise ValueError(f"batch_size {batch_size} does not divide over {count} devices")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.batch_size = batch_size
        self.steps_per_epoch = rows // batch_size if remainder == "drop" else -(-rows // batch_size)
        self._rows, self._seed = rows, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, batch_size) rows; a last batch that lacks rows repeats the first."""
        shuffled = order.permutation(self._rows, self._seed, epoch)
        return np.resize(shuffled, (self.steps_per_epoch, self.batch_size))

    def local(self, step: int) -> np.ndarray:
        """This process's rows at a step: (local devices, examples per device) int32.

        Args:
          step: counted over the whole run.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        rows = self._epoch(epoch)[position].reshape(jax.process_count(), len(self.devices), -1)
        return rows[jax.process_index()]


def _check_range(step: int, n: int) -> None:
    if step < 0 or n < 1:
        raise ValueError(f"need a step of at least 0 and at least one of them, got {step}, {n}")


class OnDevice:
    """Batches of a set that fits on every device: uint8 images stay there, indices travel.

    Each epoch is a permutation of all rows, drawn from (seed, epoch).

    Args:
      arrays: the training set, in memory.
      batch_size: over all devices of all processes.
      seed: of the shuffling.
      devices: local devices to use, in pmap's order; default all.
      remainder: 'drop' leaves out what does not fill a batch (others in each epoch), 'fill'
        completes the last batch with the epoch's first rows.

    Raises:
      ValueError: an empty set, a batch that exceeds it or does not divide over the devices, or a
        negative seed.
    """

    def __init__(
        self,
        arrays: Arrays,
        *,
        batch_size: int,
        seed: int,
        devices: Sequence[jax.Device] | None = None,
        remainder: Literal["drop", "fill"] = "drop",
    ) -> None:
        self._schedule = _Schedule(arrays, batch_size, seed, devices, remainder)
        self.batch_size = batch_size
        self.steps_per_epoch = self._schedule.steps_per_epoch
        self.num_classes = arrays.num_classes
        resident = {"image": arrays.images[:], "label": arrays.labels, "id": arrays.ids}
        self.resident = jax.tree.map(
            functools.partial(_replicate, devices=self._schedule.devices), resident
        )

    def chunk(self, step: int, n: int) -> np.ndarray:
        """Row indices of n steps: (local devices, n, b) int32.

        Args:
          step: the first one.
          n: how many.
        """
        _check_range(step, n)
        return np.stack([self._schedule.local(step + i) for i in range(n)], axis=1)

    def gather(self, resident: PyTree, item: Array) -> Batch:
        """One device's batch: image (b, H, W, C) float32 in [0, 1], label and id (b,) int32.

        Args:
          resident: the device's copy of the set.
          item: (b,) rows.
        """
        batch = jax.tree.map(lambda x: x.at[item].get(mode="promise_in_bounds"), resident)
        return batch | {"image": to_float(batch["image"])}


def _replicate(x: np.ndarray, devices: Sequence[jax.Device]) -> Array:
    """One copy of `x` per local device, as pmap takes it: leading axis, one row on each device."""
    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    copies = [jax.device_put(x[None], device) for device in devices]
    shape = (len(devices), *x.shape)
    return jax.make_array_from_single_device_arrays(shape, sharding, copies)


class Streaming:
    """Batches of a set that does not fit on the device: grain reads ahead in threads.

    Args:
      arrays: the training set, in memory or on disk (`load(..., in_memory=False)`).
      batch_size: over all devices of all processes.
      seed: of the shuffling; the batches are those of `OnDevice`.
      devices: local devices to use, in pmap's order; default all.
      remainder: 'drop' or 'fill', see `OnDevice`.
      prefetch: steps read ahead.
      threads: that read and decode.

    Raises:
      ValueError: as `OnDevice`.
    """

    resident = ()

    def __init__(
        self,
        arrays: Arrays,
        *,
        batch_size: int,
        seed: int,
        devices: Sequence[jax.Device] | None = None,
        remainder: Literal["drop", "fill"] = "drop",
        prefetch: int = 8,
        threads: int = 4,
    ) -> None:
        self._schedule = _Schedule(arrays, batch_size, seed, devices, remainder)
        self.batch_size = batch_size
        self.steps_per_epoch = self._schedule.steps_per_epoch
        self.num_classes = arrays.num_classes
        self._arrays = arrays
        # An element is a step, so grain's position is the step and its shuffles are ours.
        self._iterator = iter(
            grain.MapDataset.range(2**31)
            .map(self._read)
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
        )
        self._next = 0

    def _read(self, step: int) -> Batch:
        """This process's part of a step, leaves (local devices, b, ...)."""
        rows = self._schedule.local(int(step))
        images = self._arrays.images[rows.reshape(-1)]
        return {
            "image": images.reshape(*rows.shape, *images.shape[1:]),
            "label": self._arrays.labels[rows],
            "id": self._arrays.ids[rows],
        }

    def chunk(self, step: int, n: int) -> Batch:
        """The batches of n steps: leaves (local devices, n, b, ...), images uint8.

        Args:
          step: the first one.
          n: how many.
        """
        _check_range(step, n)
        if step != self._next:
            self._iterator.set_state({"next_index": step})
        steps = [next(self._iterator) for _ in range(n)]
        self._next = step + n
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *steps)

    def gather(self, resident: PyTree, item: Batch) -> Batch:
        """One device's batch: image (b, H, W, C) float32 in [0, 1], label and id (b,) int32.

        Args:
          resident: not used.
          item: the batch, images uint8.
        """
        del resident
        return item | {"image": to_float(item["image"])}


def test_batches(arrays: Arrays, batch_size: int) -> Iterator[Batch]:
    """All examples in order, in batches of equal shapes; the padding of the last one is masked.

    Args:
      arrays: a non-empty set.
      batch_size: of every batch, in this process.

    Returns:
      Batches of 'image' (B, H, W, C) float32 in [0, 1], 'label' and 'id' (B,) int32, 'mask' (B,)
      bool, False for padding, which repeats the last row.

    Raises:
      ValueError: an empty set, or a batch size below 1.
    """
    if not len(arrays) or batch_size < 1:
        raise ValueError(
            f"need examples and a positive batch size, got {len(arrays)} and {batch_size}"
        )
    starts = range(0, len(arrays), batch_size)
    return (_test_batch(arrays, start, batch_size) for start in starts)


def _test_batch(arrays: Arrays, start: int, batch_size: int) -> Batch:
    rows = np.arange(start, start + batch_size)
    kept = np.minimum(rows, len(arrays) - 1)
    return {
        "image": to_float(arrays.images[kept]),
        "label": arrays.labels[kept],
        "id": arrays.ids[kept],
        "mask": rows < len(arrays),
    }


test_batches.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect
