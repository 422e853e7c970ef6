"""A device's memory: the most that was used, and the batch size that would fit where it is full."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_KEPT_FREE = 0.05  # of the memory: an allocator cannot use the last bit of it
_GIB = 2**30


class OutOfMemory(RuntimeError):
    """A device's memory is full; the message names the batch size that would fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA says that a device's memory is full, when it compiles or when it runs.

    Args:
      error: of a call that compiles or runs a program.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def fitting_batch(
    asked: int, needs: Mapping[int, int | None], limit: int | None, *, multiple: int = 1
) -> int:
    """The batch size that would fit a device, linear between the two that were measured.

    Args:
      asked: the batch size that did not fit.
      needs: {batch size: bytes that it needs on a device, None where they are not known}.
      limit: bytes of the device, None where they are not known.
      multiple: the batch size is one of it.

    Returns:
      A multiple of `multiple` below `asked`; half of `asked` where the numbers do not say, or say
      that it fits (then something else is in the memory too); 0 where not even one fits.

    >>> from jaxdefense.evaluation import memory
    >>> memory.fitting_batch(512, {512: 21_000, 256: 11_000}, 16_000, multiple=8)
    360
    >>> memory.fitting_batch(512, {512: None, 256: None}, None)
    256
    """
    half = asked // 2
    known = sorted((size, need) for size, need in needs.items() if need is not None)
    if limit is not None and len(known) > 1:
        (size, need), (larger, more) = known[-2:]
        slope = (more - need) / (larger - size)
        if slope > 0:
            free = (1 - _KEPT_FREE) * limit - (need - slope * size)
            fits = max(math.floor(free / slope), 0)
            half = fits if fits < asked else half
    return half // multiple * multiple


def bytes_needed(lower: Callable[[int], Any], batch: int) -> int | None:
    """The bytes that a program needs on each device, None where XLA cannot compile or tell.

    Args:
      lower: batch size -> the lowered program, with a method `compile`.
      batch: the size.
    """
    try:
        found = lower(batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None  # it does not fit even as a plan
    if found is None:
        return None
    shared = found.alias_size_in_bytes  # results that lie in the arguments' memory
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
        - shared
    )


def bytes_limit(device: jax.Device) -> int | None:
    """The bytes that a device has for arrays, None where it does not say.

    Args:
      device: of this process.
    """
    return (device.memory_stats() or {}).get("bytes_limit")


def peak_memory() -> int | None:
    """The most bytes that one of this process's devices has held since the process began.

    For devices that do not count, as the CPU, the most that the process has; None where neither is
    known.
    """
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    if held := [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]:
        return max(held)
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@contextlib.contextmanager
def explain_out_of_memory(
    what: str,
    asked: int,
    lower: Callable[[int], Any],
    *,
    multiple: int,
    advice: str,
) -> Iterator[None]:
    """A context in which a full device raises `OutOfMemory`, which names a batch size that fits.

    The program is then compiled for the batch that was asked for, and for halves of it, to see what
    each needs; nothing is done where all goes well.

    Args:
      what: the device was asked for, "a step of training".
      asked: the batch size over all devices, which did not fit.
      lower: batch size -> the lowered program.
      multiple: which batch sizes are possible.
      advice: how to set it, with {batch} where the size belongs.

    Raises:
      OutOfMemory: a device's memory is full.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        needs: dict[int, int | None] = {}
        for batch in (asked, asked // 2, asked // 4):
            if batch >= multiple and sum(need is not None for need in needs.values()) < 2:
                batch = batch // multiple * multiple
                needs[batch] = bytes_needed(lower, batch)
        device = jax.local_devices()[0]
        limit = bytes_limit(device)
        fits = fitting_batch(asked, needs, limit, multiple=multiple)
        need = needs.get(asked)
        told = f"{what} with a batch of {asked}"
        told += f" needs {need / _GIB:.3g} GiB" if need is not None else " does not fit"
        told += f" on {device.device_kind}"
        told += f", which has {limit / _GIB:.3g} GiB" if limit is not None else ""
        way = f"{fits} would fit: {advice.format(batch=fits)}"
        if not fits:
            way = "not even the smallest batch would fit: take a smaller network, or more devices"
        raise OutOfMemory(f"out of memory: {told}; {way}") from error
