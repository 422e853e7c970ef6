"""The Min-Max report: how the weights of each convolution are spread, before and after training.

The claim (Shen et al., arXiv 2101.12372): cost-sensitive training drives most of a convolution's
weights to zero and lets a few grow large.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxdefense import losses
from jaxdefense.defenses import min_max
from jaxdefense.evaluation import tables
from jaxdefense.types import PyTree

Report = dict[str, dict[str, Any]]  # by convolution

BINS = 41
# A weight is small below this share of the layer's largest.
SMALL = 1e-3


def report(params: PyTree) -> Report:
    """Of every convolution's kernel W, all entries taken as one vector.

    Args:
      params: of one network (not of a stack).

    Returns:
      {layer: {"size", "max" (of |w|), "small" (share of |w| < 1e-3 max, percent), "kurtosis"
      (excess, Fisher's, biased; 0 for a Gaussian), "min_max" (R(W) = ||W||_1 - ||W||_2),
      "histogram": {"counts" [41], "edges" [42], from -max to max}}}.

    Raises:
      ValueError: a network without convolutions.
    """
    found = min_max.kernels(params)
    if not found:
        raise ValueError("the network has no convolution")
    told = {}
    for name, kernel in found.items():
        weights = np.asarray(kernel, np.float32).ravel()
        largest = float(np.abs(weights).max())
        reach = largest or 1.0
        counts, edges = np.histogram(weights, BINS, (-reach, reach))
        told[name] = {
            "size": weights.size,
            "max": largest,
            "small": 100 * float(np.mean(np.abs(weights) < SMALL * largest)),
            "kurtosis": float(losses.excess_kurtosis(jnp.asarray(weights))),
            "min_max": float(losses.min_max(jnp.asarray(weights))),
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        }
    return told


def table(reports: Mapping[str, Report]) -> str:
    """A Markdown row per layer and report: `{"before": report(p), "after": report(q)}`."""
    keys = {
        "kurtosis": "excess kurtosis",
        "small": f"|w| < {SMALL:g} max, %",
        "max": "max |w|",
        "min_max": "R(W)",
    }
    layers = dict.fromkeys(layer for r in reports.values() for layer in r)
    rows = [
        [f"{layer}, {when}", *(f"{told[layer][key]:.3g}" for key in keys)]
        for layer in layers
        for when, told in reports.items()
    ]
    return tables.markdown(["weights", *keys.values()], rows)


def figure(reports: Mapping[str, Report]) -> Figure:
    """Histograms, a panel per layer and a line per report, shares of weights on a log scale."""
    layers = list(dict.fromkeys(layer for r in reports.values() for layer in r))
    drawn = Figure(figsize=(3.4 * len(layers), 3.0), layout="constrained")
    for axes, layer in zip(drawn.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for when, told in reports.items():
            counts = np.asarray(told[layer]["histogram"]["counts"])
            label = f"{when}, kurtosis {told[layer]['kurtosis']:.1f}"
            axes.stairs(counts / counts.sum(), told[layer]["histogram"]["edges"], label=label)
        axes.set_title(layer, loc="left", fontsize=10)
        axes.set_xlabel("weight")
        axes.set_ylabel("share")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return drawn
