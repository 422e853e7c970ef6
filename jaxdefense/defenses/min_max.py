"""The Min-Max regulariser alone: a part for `combine`."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util

from jaxdefense import losses, registry
from jaxdefense.defenses import base
from jaxdefense.types import Array, Images, Key, PyTree, Scalar, Threat

Penalty = Callable[[PyTree], Scalar]  # of a network's parameters


def make(
    model: nn.Module,
    threat: Threat,
    *,
    layers: Mapping[str, float] | None = None,
    kurtosis: Mapping[str, float] | None = None,
    cross_entropy: float = 0.0,
) -> base.Defense:
    """sum_layers l R(W) - sum_layers k kurtosis(W) + c mean CE(f(x), y), R(W) = ||W||_1 - ||W||_2.

    With c = 0 it is a term for other defences:
    `combine({"pgd_at": 1.0, "min_max": {"weight": 1e-3, "layers": {"conv1": 1.0}}})`.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: unused; every defence has the same signature.
      layers: {convolution: l}; default {"conv1": 1.0}.
      kurtosis: {convolution: k}, of the excess kurtosis.
      cross_entropy: c; 0 leaves the network's outputs out.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: a negative weight; when parameters are first made, a layer that is no
        convolution of the model.

    Reference: Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372.
    """
    del threat
    if not 0 <= cross_entropy < float("inf"):
        raise ValueError(f"cross_entropy must be finite and not negative, got {cross_entropy}")
    net = base.Net(model)
    term = penalty({"conv1": 1.0} if layers is None else layers, kurtosis or {})

    def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        params, carry = net.init(key, images)
        term(params[net.role])  # its layers exist
        return params, carry

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        value = term(params[net.role])
        metrics = {"penalty": (value, jnp.float32(1))}
        if cross_entropy:
            logits, carry = net.train(params, carry, batch["image"])
            natural = losses.cross_entropy(logits, base.targets(batch, logits))
            value = value + cross_entropy * jnp.mean(natural)
            metrics["accuracy"] = base.accuracy(logits, batch["label"])
        return value, (carry, metrics)

    phase = base.Phase("train", (base.Update(loss, (net.role,)),))
    return base.Defense(init, (phase,), {net.role: net.predict})


def kernels(params: PyTree) -> dict[str, Array]:
    """The kernels of a network's convolutions: {"conv1": (H, W, in, out), "block/conv": ...}."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {
        path.removesuffix("/kernel"): leaf
        for path, leaf in flat.items()
        if path.endswith("/kernel") and leaf.ndim == 4
    }


def penalty(layers: Mapping[str, float], kurtosis: Mapping[str, float]) -> Penalty:
    """params of a network -> sum l R(W) - sum k kurtosis(W), ().

    Args:
      layers: {convolution: l}.
      kurtosis: {convolution: k}.

    Raises:
      ValueError: a weight that is negative or not finite; at the call, an unknown layer.
    """
    for name, weight in [*layers.items(), *kurtosis.items()]:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight of {name} must be finite and not negative, got {weight}")

    def total(params: PyTree) -> Scalar:
        by_name = kernels(params)
        value = jnp.float32(0)
        for weights, sign, term in (
            (layers, 1, losses.min_max),
            (kurtosis, -1, losses.excess_kurtosis),
        ):
            for name, weight in weights.items():
                if name not in by_name:
                    registry.raise_unknown("convolution", name, by_name)
                value = value + sign * weight * term(by_name[name])
        return value

    return total
