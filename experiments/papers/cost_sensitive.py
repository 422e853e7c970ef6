"""Judges a run by the protocol of Shen et al., arXiv 2101.12372, and tells of its Min-Max property.

    python experiments/papers/cost_sensitive.py --workdir=runs/cse
    python experiments/papers/cost_sensitive.py --workdir=runs/cse --before=runs/normal \\
        --figure=weights.svg

The attacks run in the network's normalised space (x - mean) / std, without a box: FGSM of eps .3
(CIFAR-10: .03) on the network's own training loss; DeepFool, at most 3 steps, overshoot .02, at
whatever distance; PGD from the image itself, 40 steps as long as eps, which the reference's code
clips to MNIST's range: on another data set that is no ball around the image, and the column says
invalid. As in the reference's code every image is attacked and counted, also one that the network
gets wrong without an attack, and DeepFool leaves the class that the network predicts: it may lead
a wrong image into its true class, which counts as right. This is not what an attacker can do or
has to do; see evaluate.py --protocol=autoattack.

--before names the run whose weights the Min-Max report compares with, default is the
initialisation.
"""

import math
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the scripts' folder

import cli

from jaxdefense import attacks, data, losses, runs, threat, validate
from jaxdefense.attacks import checks
from jaxdefense.defenses import cse
from jaxdefense.evaluation import records, tables
from jaxdefense.evaluation.evaluator import Evaluator, summarize
from papers import metric_i, min_max, reported

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.", required=True)
KIND = flags.DEFINE_enum("checkpoint", "last", ["best", "last"], "Which; the paper's is the last.")
RECORD = flags.DEFINE_string("record", None, "Where to write it; default WORKDIR/normalised.json.")
BEFORE = flags.DEFINE_string("before", None, "Run whose weights the Min-Max report starts from.")
FIGURE = flags.DEFINE_string("figure", None, "Draw the weights' histograms into this file.")
EPS = flags.DEFINE_float("eps", 0.3, "Of FGSM and PGD, in normalised space.")
PGD = flags.DEFINE_bool("pgd", True, "Run PGD too, which takes most of the time.")
EXAMPLES = flags.DEFINE_integer("examples", None, "Only the first so many test examples.")
PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")

# Wide enough that nothing is clipped.
WIDE = (-100.0, 100.0)
# The reference's PGD clips to MNIST's black and white, normalised.
CLIPPED = (-0.4242, 2.8214)


def reported_entries(table, name):
    """{column: {"value", "status"}} of what the notebooks report of a row, as records keep them."""
    values = reported.cost_sensitive(table, name)
    return {column: dict(value=value, status="FOUND") for column, value in values.items()}


def protocol(own_loss, eps, anywhere, inside):
    """{column: attack} in normalised space.

    Args:
      own_loss: (logits, labels) -> (B,), the network's training loss.
      eps: of FGSM and PGD.
      anywhere: a threat that leaves every image in reach.
      inside: whether the images lie in `CLIPPED`.
    """
    deepfool = attacks.deepfool(anywhere, steps=3, minimal=True)
    fgsm = attacks.fgsm(threat.Linf(eps, WIDE), loss=own_loss)

    def single(predict, key, images, labels):  # in its own ball, not the evaluator's
        return fgsm(predict, key, images, labels)

    def leaving(predict, key, images, labels):
        return deepfool(predict, key, images, predict(images).argmax(-1))

    def clipped(predict, key, images, labels):
        gradient = jax.grad(lambda z: own_loss(predict(z), labels).sum())

        def step(_, z):
            moved = z + eps * jnp.sign(gradient(z)) - images
            return jnp.clip(images + jnp.clip(moved, -eps, eps), *CLIPPED)

        return jax.lax.fori_loop(0, 40, step, images)

    return {
        "normalised fgsm": single,
        "normalised deepfool3": leaving,
        "normalised pgd40" if inside else "normalised pgd40 (invalid)": clipped,
    }


def own_losses(run):
    """{predictor: the loss it was trained on}, of logits and labels."""
    options = run.config["defense"]
    if options["name"] not in ("csa", "cse"):
        # Not `losses.cross_entropy` itself, which attacks take in a form that does not saturate:
        # the paper's code has the gradient of the plain one.
        return dict.fromkeys(run.defense.predictors, lambda z, y: losses.cross_entropy(z, y))
    given = {k: options[k] for k in ("protect", "cost", "cost_weight") if k in options}
    each = given.get("protect") == "each"
    return {
        name: cse.attack_loss(run.module.num_classes, **{**given, "protect": i} if each else given)
        for i, name in enumerate(run.defense.predictors)
    }


def judge(run, variables, *, eps, pgd=True, examples=None, progress=False):
    """{predictor: {column: as in `summarize`}} under the protocol, PGD left out on demand."""
    model = run.config["model"]
    mean, std = (
        np.float32(model.get(name) or [without]).reshape(1, 1, 1, -1)
        for name, without in (("mean", 0), ("std", 1))
    )
    arrays = run.arrays("test").take(slice(examples))
    images = (data.to_float(arrays.images) - mean) / std
    inside = bool(images.min() >= CLIPPED[0] - 1e-4 and images.max() <= CLIPPED[1] + 1e-4)
    anywhere = threat.L2(threat.L2(0.0, WIDE).diameter(images[0].size), WIDE)
    results = {}
    for predictor, own_loss in own_losses(run).items():
        apply = run.apply(predictor)
        chosen = protocol(own_loss, eps, anywhere, inside)
        evaluator = Evaluator(
            lambda variables, z, apply=apply: apply(variables, z * std + mean), anywhere
        )
        bits = evaluator.bits(
            variables,
            images,
            arrays.labels,
            arrays.ids,
            {name: attack for name, attack in chosen.items() if pgd or "pgd" not in name},
            seed=run.seed,
            everywhere=True,
            progress=progress,
        )
        results[predictor] = summarize(bits, arrays.labels, arrays.num_classes)
    return results


def weights(run, params):
    """The deployed network's parameters; of a stack, its first member's."""
    params = params["classifier"]
    if "stacked" in run.config["defense"].get("transforms", {}):
        params = jax.tree.map(lambda leaf: leaf[0], params)
    return params


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    if EXAMPLES.value is not None:
        checks.check_count("--examples", EXAMPLES.value)
    if not 0 < EPS.value < math.inf:
        raise ValueError(f"--eps must be positive and finite, got {EPS.value}")
    for name, path in (("--record", RECORD.value), ("--figure", FIGURE.value)):
        if path:
            validate.check_file(name, path)
    began = time.monotonic()
    run, variables, meta = runs.restore(WORKDIR.value, kind=KIND.value)
    if BEFORE.value:
        start, first, _ = runs.restore(BEFORE.value, kind=KIND.value)
        before = weights(start, first["params"])
    else:
        before = weights(run, run.init(data.to_float(run.arrays("validation").images[:1]))[0])
    reports = {
        "before": min_max.report(before),
        "after": min_max.report(weights(run, variables["params"])),
    }
    results = judge(
        run,
        variables,
        eps=EPS.value,
        pgd=PGD.value,
        examples=EXAMPLES.value,
        progress=PROGRESS.value,
    )
    name = run.name
    record = records.make(
        f"{name} (the paper's protocol)",
        run.config,
        results,
        seed=run.seed,
        seconds=time.monotonic() - began,
        reported=reported_entries(reported.COST_SENSITIVE, name),
        protocol="paper: normalised space, no box, own loss",
        eps=EPS.value,
        threat=dict(norm="linf", eps=EPS.value, note="normalised; DeepFool at any distance"),
        training={"checkpoint": KIND.value, **meta},
        min_max=reports,
    )
    path = pathlib.Path(RECORD.value or pathlib.Path(WORKDIR.value) / "normalised.json")
    records.save(record, path)
    if FIGURE.value:
        min_max.figure(reports).savefig(FIGURE.value)
    print(tables.accuracy_table([record]))
    options = run.config["defense"]
    if options.get("protect") == "each" or options["name"] not in ("csa", "cse"):
        found = reported_entries(reported.METRIC_I, name)
        rows = [
            (column, f"{value:.2f}", f"{found[column]['value']:.2f}" if column in found else "–")
            for column, value in metric_i.means(record).items()
        ]
        print("\n" + tables.markdown(("metric I, %", "measured", "reported"), rows))
    print(f"\n{min_max.table(reports)}\n\nrecord: {path}")


if __name__ == "__main__":
    cli.run(main, spread=True)
