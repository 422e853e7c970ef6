"""What it would gain to fold BatchNorm into the convolutions while an attack runs in eval mode.

    python experiments/accelerators/folding.py --width=16 --record=FILE

A ResNet-18 folded by hand beside the library's own, same weights: PGD-10's CPU seconds in turn. The
rows `attack pgd10` and `attack pgd10 folded` of `experiments/accelerators` have the bytes on a TPU.
"""

import pathlib
import statistics
import sys
import time

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the scripts' folder

import cli
import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import attacks, models, threat
from jaxdefense.conv import conv
from jaxdefense.evaluation import records
from jaxdefense.models import resnet

STEPS = 10
_EPSILON = 1e-5  # of `layers.BatchNorm`


def pgd10():
    """The attack that is timed."""
    return attacks.pgd(threat.Linf(8 / 255), steps=STEPS)


def fold(params, statistics_):
    """{convolution: (kernel, bias)} of a ResNet of basic blocks, and its head.

    Args:
      params: of the network.
      statistics_: its running averages.
    """
    folded = {"head": params["head"]}
    for block, own in params.items():
        inner = {"": own} if "kernel" in own else own
        for name, values in inner.items():
            if name.startswith("bn") or name.endswith("_bn") or block in ("head", "bn1"):
                continue
            norm = name.replace("conv", "bn") if name else "bn1"
            scale, mean = (params, statistics_) if not name else (own, statistics_[block])
            scale, mean = scale[norm], mean[norm]
            factor = scale["scale"] / jnp.sqrt(mean["var"] + _EPSILON)
            bias = scale["bias"] - mean["mean"] * factor
            kernel = values["kernel"] * factor.reshape(1, 1, 1, -1)
            folded[f"{block}/{name}" if name else block] = (kernel, bias)
    return folded


def apply_folded(folded, images):
    """The logits of `resnet.ResNet` at depth 18, of convolutions with a bias."""

    def convolve(name, x, stride=1):
        kernel, bias = folded[name]
        edge = kernel.shape[0] // 2
        numbers = ("NHWC", "HWIO", "NHWC")
        pads = ((edge, edge), (edge, edge))
        y = conv(x, kernel, (stride, stride), pads, dimension_numbers=numbers)
        return y + bias.reshape(1, 1, 1, -1)

    x = jax.nn.relu(convolve("conv1", images))
    for stage, count in enumerate(resnet.DEPTHS[18][1], 1):
        for i in range(1, count + 1):
            block, stride = f"stage{stage}_block{i}", 2 if stage > 1 and i == 1 else 1
            y = jax.nn.relu(convolve(f"{block}/conv1", x, stride))
            y = convolve(f"{block}/conv2", y)
            if f"{block}/shortcut_conv" in folded:
                x = convolve(f"{block}/shortcut_conv", x, stride)
            x = jax.nn.relu(x + y)
    head = folded["head"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"].reshape(1, -1)


def problem(width, batch):
    """(plain, folded) calls of PGD-10 on the same weights and images, and their logits."""
    module = models.make("resnet", 10, depth=18, width=width)
    x = jax.random.uniform(jax.random.key(1), (batch, 32, 32, 3))
    variables = module.init(jax.random.key(0), x[:1])
    # As after training: statistics and scales that are not all one and zero.
    _, moved = module.apply(variables, x, train=True, mutable=["batch_stats"])
    variables = {"params": variables["params"], **moved}
    weights = fold(variables["params"], variables["batch_stats"])
    labels = jnp.arange(batch) % 10
    sides = {"plain": (module.apply, variables), "folded": (apply_folded, weights)}
    calls, logits = {}, {}
    for name, (apply, given) in sides.items():
        run = attacks.jitted(pgd10(), apply)
        calls[name] = lambda run=run, given=given: run(given, jax.random.key(2), x, labels)
        logits[name] = np.asarray(jax.jit(apply)(given, x))
    return calls, logits


def measure(width, batch, pairs):
    """A row: CPU seconds of both in turn, and the median of their ratios."""
    calls, logits = problem(width, batch)
    np.testing.assert_allclose(logits["folded"], logits["plain"], rtol=1e-3, atol=1e-4)
    spent = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(pairs):
        for name, call in calls.items():
            began = time.process_time()
            jax.block_until_ready(call())
            spent[name].append(round(time.process_time() - began, 3))
    ratios = [f / p for f, p in zip(spent["folded"], spent["plain"], strict=True)]
    return {"width": width, "batch": batch, **spent, "ratio": round(statistics.median(ratios), 3)}


def main(argv):
    began = time.monotonic()
    row = measure(WIDTH.value, BATCH.value, PAIRS.value)
    print(row)
    if RECORD.value:
        spent = time.monotonic() - began
        records.save(
            records.make("folding", {}, {}, seed=0, seconds=spent, rows=[row]), RECORD.value
        )


if __name__ == "__main__":
    WIDTH = flags.DEFINE_integer("width", 16, "Of the network.")
    BATCH = flags.DEFINE_integer("batch", 64, "Images.")
    PAIRS = flags.DEFINE_integer("pairs", 5, "Timed pairs, after one warm-up.")
    RECORD = flags.DEFINE_string("record", None, "Write the row to this JSON file too.")
    cli.run(main)
