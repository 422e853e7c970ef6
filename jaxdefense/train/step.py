"""The train step: written once, mapped over the devices in exactly one place."""

import contextlib
import importlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdefense.defenses.base import AXIS, Batch, Carry, Metrics, Params, Phase, Update, View
from jaxdefense.runs import start
from jaxdefense.types import Array, Key, PyTree


class State(NamedTuple):
    """All that a run changes. On devices, each array has a leading local-device axis.

    Attributes:
      step: () int32, batches seen.
      params: by role.
      carry: what losses pass on: BatchNorm statistics, running averages, frozen networks.
      opt: the optimisers' states by role.
    """

    step: Array
    params: Params
    carry: Carry
    opt: dict[str, PyTree]


def replicate(state: State) -> State:
    """One copy per local device, laid out as the step returns it, or pmap would compile twice.

    Args:
      state: on the host.
    """
    return flax.jax_utils.replicate(state, axis_name=AXIS)


def unreplicate(state: State) -> State:
    """The first local device's copy, on the host.

    Args:
      state: replicated.
    """
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data)[0], state)


class RunSteps:
    """Several steps in one compiled dispatch, mapped over the local devices, the state donated.

    JAX keeps what `pmap` has traced as long as the process lives: the entry of its cache refers to
    the function that is its key. So what is mapped here is a small function that only looks up the
    steps. Both are taken out again by `release`; the steps also when this object is no longer used.

    Args:
      run: (state, resident data, items (n, ...), how many of them, metric sums so far) -> (state,
        metric sums, first bad step or -1), of one device.
      devices: of `compile_steps`.
    """

    def __init__(
        self,
        run: Callable[..., tuple[State, Metrics, Array]],
        devices: Sequence[jax.Device] | None = None,
    ):
        steps = {"run": run}

        def look_up(*args: Any) -> Any:
            return steps["run"](*args)

        self._mapped: Any = jax.pmap(
            look_up,
            axis_name=AXIS,
            in_axes=(0, 0, 0, None, 0),
            devices=devices,
            donate_argnums=0,
        )
        self._look_up = look_up
        # Where nobody calls `release`, the garbage collector may run this in the middle of another
        # trace, in which JAX's caches must stay as they are: the small function stays in them.
        self._free = weakref.finalize(self, steps.clear)

    def __call__(
        self, state: State, resident: PyTree, items: PyTree, count: Array, sums: Metrics
    ) -> tuple[State, Metrics, Array]:
        """Runs the first `count` of the items.

        Args:
          state: replicated; its arrays are taken for the result.
          resident: of `data.Batches`.
          items: of `data.Batches.chunk`.
          count: () int32, how many steps.
          sums: the metrics' so far, see `zero_sums`.

        Returns:
          The state, the metrics' sums, and the first step whose loss was not finite, or -1.
        """
        return self._mapped(state, resident, items, count, sums)

    def lower(
        self,
        state: State,
        resident: PyTree,
        items: PyTree,
        count: Array,
        sums: Metrics,
        batch: int | None = None,
    ) -> Any:
        """The program, not compiled: `compile()` tells what memory it takes.

        Args:
          state: as of a call; shapes count, so that its arrays may be gone.
          resident: likewise.
          items: likewise.
          count: likewise.
          sums: likewise.
          batch: images of a step on one device, where it is for another number than in `items`.
        """
        inputs = (state, resident, items, count, sums)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
        if batch is None:
            return self._mapped.lower(*shapes)
        resized = jax.tree.map(
            lambda leaf: leaf.update(shape=(*leaf.shape[:2], batch, *leaf.shape[3:])), shapes[2]
        )
        return self._mapped.lower(*shapes[:2], resized, *shapes[3:])

    def release(self) -> None:
        """Frees the compiled program and all that the steps refer to; it cannot be called again."""
        self._free()
        _evict(self._look_up)


def _evict(mapped: Callable[..., Any]) -> None:
    """Takes out JAX's entry of what was mapped."""
    # JAX has no public call for one function's entry. Where a version has it under another name,
    # the program stays until the process ends, but nothing else of the run does.
    with contextlib.suppress(ImportError, AttributeError):
        cache: Any = importlib.import_module("jax._src.pmap")
        cache._cached_shard_map.evict_function(mapped)


def _average(old: PyTree, new: PyTree) -> PyTree:
    """The devices' mean of what a loss changed; what it passed on as it was (a teacher) stays."""

    def one(was, now):
        return now if now is was or not jnp.issubdtype(now.dtype, jnp.inexact) else _pmean(now)

    if jax.tree.structure(old) != jax.tree.structure(new):  # type: ignore[operator]
        return _pmean(new)
    return jax.tree.map(one, old, new)


def _pmean(tree: PyTree) -> PyTree:
    """The devices' mean.

    On the CPU more than two devices are added in their order, as gloo, which joins processes, would
    not: a run's bits hang on the number of devices alone.
    """
    if jax.lax.axis_size(AXIS) <= 2:
        return jax.lax.pmean(tree, AXIS)

    def in_order(leaf: Array) -> Array:
        return jax.lax.all_gather(leaf, AXIS).mean(0)

    def one(leaf: Array) -> Array:
        return jax.lax.platform_dependent(
            leaf, cpu=in_order, default=lambda leaf: jax.lax.pmean(leaf, AXIS)
        )

    return jax.tree.map(one, tree)


def _apply(
    update: Update,
    txs: Mapping[str, optax.GradientTransformation],
    state: State,
    batch: Batch,
    key: Key,
) -> tuple[State, Metrics]:
    """One optimiser step: craft, gradient, mean over devices, optax."""
    k_craft, k_loss = jax.random.split(key)
    batch = jax.lax.stop_gradient(update.craft(state.params, state.carry, batch, k_craft))

    def objective(trained):
        return update.loss({**state.params, **trained}, state.carry, batch, k_loss)

    trained = {role: state.params[role] for role in update.roles}
    (value, (carry, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(trained)
    metrics = {"loss": (value, jnp.ones(())), **metrics}
    grads, metrics = _pmean((grads, metrics))
    params, opt = dict(state.params), dict(state.opt)
    for role in update.roles:
        change, opt[role] = txs[role].update(grads[role], opt[role], params[role])
        params[role] = optax.apply_updates(params[role], change)
    return State(state.step, params, _average(state.carry, carry), opt), metrics


def make_step(
    phase: Phase,
    txs: Mapping[str, optax.GradientTransformation],
    view: View,
    *,
    seed: int,
    per_epoch: int,
    frozen: Sequence[str] = (),
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The pure step of one device: (state, batch of images in [0, 1]) -> (state, metrics).

    Its key is fold_in(fold_in(seed, step), axis_index), so what is drawn depends on nothing else.

    Args:
      phase: whose updates are applied in order to each batch.
      txs: optimisers by role.
      view: (key, images) -> {"image": ...}, the augmentation.
      seed: of the run.
      per_epoch: steps in an epoch.
      frozen: roles, or parts of them, whose parameters and statistics stay as they are.
    """

    def keep_frozen(old: dict[str, PyTree], new: dict[str, PyTree]) -> dict[str, PyTree]:
        def one(role: str) -> PyTree:
            def choose(path, was, now):
                return was if start.is_frozen(frozen, role, path) else now

            return jax.tree_util.tree_map_with_path(choose, old[role], new[role])

        touched = {name.split("/")[0] for name in frozen}
        return {**new, **{role: one(role) for role in touched if role in new}}

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        k_view, key = jax.random.split(key)
        epoch = state.step.astype(jnp.float32) / per_epoch
        batch = {**batch, "step": state.step, "epoch": epoch}
        batch = {**batch, **view(k_view, batch["image"])}
        metrics: Metrics = {}
        before = state
        for i, update in enumerate(phase.updates):
            state, new = _apply(update, txs, state, batch, jax.random.fold_in(key, i))
            prefix = f"update{i}_" if len(phase.updates) > 1 else ""
            metrics |= {prefix + name: metric for name, metric in new.items()}
            if frozen:
                params = keep_frozen(before.params, state.params)
                state = state._replace(params=params, carry=keep_frozen(before.carry, state.carry))
        carry = state.carry
        for follow in phase.after:
            carry = follow(state.params, carry, batch)
        return State(state.step + 1, state.params, carry, state.opt), metrics

    return step


def compile_steps(
    step: Callable[[State, Batch], tuple[State, Metrics]],
    gather: Callable[[PyTree, PyTree], Batch],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> RunSteps:
    """Several steps in one dispatch, mapped over the local devices, the state donated.

    The number of steps is an argument, not a shape: one compilation serves chunks of any length.
    The loop ends early at a loss that is not finite; the third result is that step, or -1. The
    metrics are added to those of the steps before, so that two dispatches give the sums of one,
    bit for bit; see `zero_sums`.

    Args:
      step: of `make_step`.
      gather: (resident data, item) -> batch, see `data.Batches`.
      devices: local ones, or those of a topology that is only compiled for; default all.
    """

    def run(state, resident, items, count, sums):
        def take(i):
            return gather(resident, jax.tree.map(lambda leaf: leaf[i], items))

        def go_on(carry):
            i, _, _, bad = carry
            return (i < count) & (bad < 0)

        def body(carry):
            i, state, sums, bad = carry
            at = state.step
            state, metrics = step(state, take(i))
            finite = jnp.all(jnp.stack([jnp.isfinite(s) for s, _ in metrics.values()]))
            sums = jax.tree.map(jnp.add, sums, metrics)
            return i + 1, state, sums, jnp.where(finite, bad, at)

        start = (jnp.int32(0), state, sums, jnp.int32(-1))
        _, state, sums, bad = jax.lax.while_loop(go_on, body, start)
        return state, sums, bad

    return RunSteps(run, devices)


def metric_shapes(
    step: Callable[[State, Batch], tuple[State, Metrics]],
    gather: Callable[[PyTree, PyTree], Batch],
    state: State,
    resident: PyTree,
    items: PyTree,
) -> Metrics:
    """The shapes of the metric sums that `compile_steps` takes.

    Args:
      step: of `make_step`.
      gather: see `compile_steps`.
      state: replicated, or its shapes.
      resident: the data on the devices, or their shapes.
      items: of at least one step, or their shapes.
    """

    def metrics(state, resident, items):
        first = jax.tree.map(lambda leaf: leaf[0], items)
        return step(state, gather(resident, first))[1]

    # vmap knows the axis too, and JAX forgets what it has traced of it.
    return jax.eval_shape(jax.vmap(metrics, axis_name=AXIS), state, resident, items)


def zero_sums(shapes: Metrics, leaf: Array) -> Metrics:
    """The metric sums of no step, replicated as `compile_steps` takes them.

    Args:
      shapes: of `metric_shapes`.
      leaf: of a `replicate`d state.
    """
    zeros = jax.tree.map(lambda shape: np.zeros(shape.shape[1:], shape.dtype), shapes)
    return replicate_like(zeros, leaf)


def replicate_like(tree: PyTree, leaf: Array) -> PyTree:
    """A tree of the host on the devices of a replicated leaf, laid out as it is.

    Args:
      tree: of arrays.
      leaf: of a `replicate`d state.
    """
    devices = [shard.device for shard in leaf.addressable_shards]
    return flax.jax_utils.replicate(tree, devices, axis_name=AXIS)
