"""Several members of a defence in one program: the transform `stacked`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense.defenses import base
from jaxdefense.types import Array, HostArray, Images, Key, PyTree

Built = TypeVar("Built")


def stacked(
    defense: base.Defense, *, members: int = 2, prefix: str = "member", same_keys: bool = False
) -> base.Defense:
    """Several members of a defence trained in one program, on the same batches.

    Parameters, carry and optimiser states get a leading axis of members, and the loss is the
    members' sum, so that each moves by its own gradient. Members are mapped one after the other
    on the CPU (a convolution vmapped over kernels is slower there) and vmapped elsewhere.

    Members differ in their keys (initialisation, what is drawn in crafts and losses) and, where
    the defence asks for it, in a constant: a defence whose carry holds "member", a one-hot vector
    over its variants (one for each class to protect, say), finds its own number there, and must
    be stacked as often as it has variants. The batches, with their order and augmentation, are the
    same for all: members are not quite as different as runs of several seeds.

    Optimisers act on each entry, so they serve the stack as they would each member; two options
    do not: "clip_norm" takes the norm of the whole stack, and "decay_kernels_only" takes stacked
    biases for kernels. `defenses.make` stacks last, behind weight perturbation and EMA.

    Args:
      defense: any.
      members: how many.
      prefix: the predictors are `<prefix>0`, `<prefix>1`, ... and, of others than the deployed
        one, `<prefix>0_<name>`, ... Validation and selection look at the first alone; where that
        will not do, train for a fixed length and take the checkpoint `last`.
      same_keys: all members draw from the same keys: with a constant of their own each is then
        what the unstacked defence would be with that constant and the same seed. A phase that
        does not ask for the constant (`Phase.shared_by_variants`: a warm start) is computed once
        for all.

    Returns:
      A `Defense` of the same phases. Where variant i of the defence protects one class
      (`Defense.variant_classes`), `<prefix>i` is judged on that class.

    Raises:
      ValueError: no members; when parameters are first made, not as many as variants.
    """
    if members < 1:
        raise ValueError(f"stacked needs at least one member, got {members}")
    return _Stack(defense, members, prefix, same_keys).stack()


@dataclasses.dataclass(frozen=True, eq=False)
class _Stack:
    """A defence and how it is stacked; see `stacked` for the attributes."""

    defense: base.Defense
    members: int
    prefix: str
    same_keys: bool

    @functools.cached_property
    def numbers(self) -> HostArray:
        """The members' numbers (members,)."""
        return np.arange(self.members, dtype=np.int32)

    def each(self, function: Callable[..., Any], *stacks: PyTree) -> Any:
        """function(number, *member's slices) of every member, stacked."""
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda slices: function(*slices), (self.numbers, *stacks))
        return jax.vmap(function)(self.numbers, *stacks)

    def member_key(self, key: Key, number: Array) -> Key:
        """The key that a member draws from."""
        return key if self.same_keys else jax.random.fold_in(key, number)

    def init(self, key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        """(params, carry) with a leading axis of members."""
        params, carry = self.each(lambda i: self.defense.init(self.member_key(key, i), images))
        if "member" in carry:
            variants = carry["member"].shape[-1]
            if variants != self.members:
                raise ValueError(f"the defence has {variants} variants, and {self.members} members")
            carry = {**carry, "member": jnp.eye(self.members)}
        return params, carry

    def update(self, update: base.Update) -> base.Update:
        """Every member's update."""

        def craft(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.Batch:
            def one(number: Array, params: base.Params, carry: base.Carry) -> base.Batch:
                crafted = update.craft(params, carry, batch, self.member_key(key, number))
                return {name: v for name, v in crafted.items() if batch.get(name) is not v}

            return {**batch, "members": self.each(one, params, carry)}

        def loss(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.LossValue:
            shared = {name: v for name, v in batch.items() if name != "members"}

            def one(
                number: Array, params: base.Params, carry: base.Carry, crafted: base.Batch
            ) -> base.LossValue:
                key_of_member = self.member_key(key, number)
                return update.loss(params, carry, {**shared, **crafted}, key_of_member)

            values, (carry, metrics) = self.each(one, params, carry, batch.get("members", {}))
            metrics = {"loss": (values, jnp.ones(self.members)), **metrics}
            return jnp.sum(values), (carry, jax.tree.map(lambda v: jnp.sum(v, 0), metrics))

        return base.Update(loss, update.roles, craft)

    def common_update(self, update: base.Update) -> base.Update:
        """The first member's update, for all: they are still equal."""

        def craft(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.Batch:
            return update.craft(_member(params, 0), _member(carry, 0), batch, key)

        def loss(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.LossValue:
            value, (new, metrics) = update.loss(_any_member(params), _member(carry, 0), batch, key)
            new = jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, old.shape), new, carry)
            if "member" in carry:
                new = {**new, "member": carry["member"]}
            return value, (new, metrics)

        return base.Update(loss, update.roles, craft)

    def after(self, after: base.After) -> base.After:
        """What every member does after a batch."""

        def follow(params: base.Params, carry: base.Carry, batch: base.Batch) -> base.Carry:
            return self.each(lambda _, params, carry: after(params, carry, batch), params, carry)

        return follow

    def phase(self, phase: base.Phase) -> base.Phase:
        """The phase of the whole stack."""
        change = self.common_update if phase.shared_by_variants and self.same_keys else self.update
        updates = tuple(map(change, phase.updates))
        return dataclasses.replace(
            phase, updates=updates, after=tuple(map(self.after, phase.after))
        )

    def name(self, member: int, predictor: str) -> str:
        """The name of a member's predictor."""
        name = f"{self.prefix}{member}"
        return name if predictor == self.defense.primary else f"{name}_{predictor}"

    def purifier(self, member: int, purifier: base.Purifier) -> base.Purifier:
        """A member's purifier."""
        detours = {name: _of_member(member, p) for name, p in purifier.detours.items()}
        purify = _of_member(member, purifier.purify)
        return base.Purifier(self.name(member, purifier.base), purify, detours)

    def stack(self) -> base.Defense:
        """The defence of all members."""
        single = self.defense
        predictors: dict[str, base.Predictor] = {}
        purifiers: dict[str, base.Purifier] = {}
        for i in range(self.members):
            for name, predictor in single.predictors.items():
                predictors[self.name(i, name)] = _of_member(i, predictor)
            for name, purifier in single.purifiers.items():
                purifiers[self.name(i, name)] = self.purifier(i, purifier)
        return base.Defense(
            self.init,
            single.map_phases(self.phase),
            predictors,
            purifiers,
            single.pretrained,
            judged={self.name(i, single.primary): k for i, k in enumerate(single.variant_classes)},
            deployed=_of_member(0, single.deployed),
        )


def _member(stack: PyTree, number: int) -> PyTree:
    """A member of a stack."""
    return jax.tree.map(lambda leaf: leaf[number], stack)


def _of_member(
    number: int, function: Callable[[base.Params, base.Carry], Built]
) -> Callable[[base.Params, base.Carry], Built]:
    """The function of a defence's params and carry, of a stack's."""

    def of_stack(params: base.Params, carry: base.Carry) -> Built:
        return function(_member(params, number), _member(carry, number))

    return of_stack


def _any_member(stack: PyTree) -> PyTree:
    """One of the equal members of a stack; each of them gets its gradient."""

    def one(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf[0]
        held = jax.lax.stop_gradient(leaf)
        return held[0] + jnp.sum(leaf - held, 0)

    return jax.tree.map(one, stack)
