"""Why the 60.47 % of CLAF's README is no robustness at 8/255: its attack, measured and drawn.

    python experiments/train.py --config=pgd_at:cifar10 --workdir=runs/small \\
        --config.model.width=8 --config.defense.steps=1 --config.defense.step_size=0.0392 \\
        --config.train.length=3e
    python experiments/papers/claf_literal.py --workdir=runs/small

The released code perturbs images that are already normalised, by eps in units of std, and clamps
them to [0, 1] there. So every value below the mean becomes the mean, every one above mean + std
becomes that, and the rest moves by about 1.6/255. Any trained CIFAR-10 run is judged under that
attack and under PGD with the same numbers in pixels; claf:cifar10_literal is the run to reproduce
the README's number with. The literal accuracy counts, as the released code does, every image that
is right after the attack.
"""

import pathlib
import sys
import time

import jax
import numpy as np
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the scripts' folder

import cli
from configs import recipes

from jaxdefense import attacks, data, runs, threat, validate
from jaxdefense.attacks import checks
from jaxdefense.data import prepare
from jaxdefense.defenses import claf
from jaxdefense.evaluation import records
from jaxdefense.evaluation.evaluator import Evaluator, Examples, attack_keys, summarize

with cli.needed("plots"):
    from matplotlib.figure import Figure

FOLDER = pathlib.Path(__file__).parents[1] / "records" / "claf_literal"

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained CIFAR-10 run.", required=True)
KIND = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which checkpoint is judged.")
RECORD = flags.DEFINE_string(
    "record", None, f"Where to write it, with the figure beside; default {FOLDER.name}/NAME.json."
)
EXAMPLES = flags.DEFINE_integer("examples", 512, "Only the first so many test examples.")

# What most CIFAR-10 loaders subtract and divide by, for a model without its own. INFERRED for the
# released code: its eps is about 1.6/255 in pixels, as with these.
NORMALISED = recipes.NORMALISED["cifar10"]
BALL = threat.Linf(8 / 255)
STEPS, STEP_SIZE = 10, 2 / 255
SHOWN = 5


def geometry(images, mean, std):
    """(what the clamp alone leaves of the images, how much of them it leaves to the attack)."""
    n = (images - np.float32(mean)) / np.float32(std)
    clamped = np.clip(n, 0, 1) * np.float32(std) + np.float32(mean)
    low, high = n + BALL.eps <= 0, n - BALL.eps >= 1
    numbers = {
        "frozen_low_percent": 100 * low.mean(),
        "frozen_high_percent": 100 * high.mean(),
        "movable_percent": 100 * (1 - low.mean() - high.mean()),
        "mean_pixel_movement_of_the_clamp": 255 * np.abs(clamped - images).mean(),
        "eps_in_pixels": 255 * BALL.eps * np.mean(std),
    }
    return clamped, {name: round(float(value), 2) for name, value in numbers.items()}


def literal(evaluator, variables, images, labels, ids, mean, std):
    """What the released code's PGD makes of the images; the evaluator's own check would refuse."""
    attack = claf.literal_pgd(BALL, mean=mean, std=std, steps=STEPS, step_size=STEP_SIZE)

    def run(variables, keys, x, y):
        return attack(lambda z: evaluator.apply(variables, z), jax.random.wrap_key_data(keys), x, y)

    keys = np.asarray(jax.random.key_data(attack_keys(0, "literal", ids)))
    packs = evaluator.split_rows(np.arange(len(images)))
    given = ((keys[rows], images[rows], labels[rows]) for rows in packs)
    return np.concatenate([evaluator.dispatch("literal", run, variables, *some) for some in given])


def draw(columns, shares, accuracies):
    """The images, the shares of their values, the accuracies."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    cells = left.subplots(SHOWN, len(columns))
    for j, (title, images) in enumerate(columns.items()):
        cells[0, j].set_title(title, fontsize=9)
        for i in range(SHOWN):
            cells[i, j].imshow(np.clip(images[i], 0, 1), interpolation="nearest")
            cells[i, j].set_axis_off()
    above, below = right.subplots(2, 1, height_ratios=(1, 2))
    start = 0.0
    for name, color, ink in (
        ("frozen low", "0.35", "white"),
        ("movable", "C2", "white"),
        ("frozen high", "0.75", "black"),
    ):
        share = shares[name.replace(" ", "_") + "_percent"]
        above.barh(0, share, left=start, color=color)
        text = f"{name}\n{share:.0f} %"
        above.text(start + share / 2, 0, text, ha="center", va="center", size=8, color=ink)
        start += share
    above.set_title("pixel values under the literal attack", loc="left", fontsize=9)
    above.set_axis_off()
    bars = below.bar(range(len(accuracies)), list(accuracies.values()), color="C0")
    below.bar_label(bars, fmt="%.1f", fontsize=8)
    below.set_xticks(range(len(accuracies)), list(accuracies), fontsize=8)
    below.set_ylim(0, 100)
    below.set_title("accuracy, %", loc="left", fontsize=9)
    below.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    checks.check_count("--examples", EXAMPLES.value)
    if RECORD.value and validate.check_file("--record", RECORD.value).suffix != ".json":
        raise ValueError(f"--record must end in .json, got {RECORD.value}")
    folder = prepare.default_data_dir(None)
    if not prepare.is_prepared("cifar10", folder):
        print(f"skipped: CIFAR-10 is not prepared in {folder}, see experiments/prepare_data.py")
        return
    began = time.monotonic()
    run, variables, meta = runs.restore(WORKDIR.value, kind=KIND.value)
    if run.config["dataset"]["name"] != "cifar10":
        raise ValueError(f"{WORKDIR.value} is a run on {run.config['dataset']['name']}")
    mean = getattr(run.module, "mean", None) or NORMALISED["mean"]
    std = getattr(run.module, "std", None) or NORMALISED["std"]
    arrays = run.arrays("test").take(slice(EXAMPLES.value))
    images, labels, ids = data.to_float(arrays.images), arrays.labels, arrays.ids

    evaluator = Evaluator(run.apply(run.defense.primary), BALL)
    variables = evaluator.replicate(variables)
    clamped, numbers = geometry(images, mean, std)
    attacked = literal(evaluator, variables, images, labels, ids, mean, std)
    pgd = attacks.pgd(BALL, steps=STEPS, step_size=STEP_SIZE)
    bits = evaluator.bits(variables, images, labels, ids, {"pgd10": pgd})
    few = Examples(images[:SHOWN], labels[:SHOWN], ids[:SHOWN], np.arange(len(ids))[:SHOWN])
    shown = evaluator.attack("pgd10", pgd, variables, few).x_adv
    for name, some in (("clamped", clamped), ("literal_pgd10", attacked)):
        bits[name] = evaluator.logits(variables, some).argmax(-1) == labels
    results = summarize(bits, labels, arrays.num_classes)
    distance = 255 * np.abs(attacked - images)
    numbers |= {
        "mean_pixel_movement_of_literal_pgd10": round(float(distance.mean()), 2),
        "largest_pixel_movement_of_literal_pgd10": round(float(distance.max()), 2),
    }

    record = records.make(
        f"{run.config['name']} (the literal attack)",
        run.config,
        {run.defense.primary: results},
        seed=run.seed,
        seconds=time.monotonic() - began,
        protocol="literal",
        threat=dict(norm="linf", eps=BALL.eps, note="literal: of normalised images, clamped"),
        training={"checkpoint": KIND.value, **meta},
        reported=run.config.get("reported", {}),
        geometry=numbers,
        normalisation={"mean": list(mean), "std": list(std)},
    )
    path = pathlib.Path(RECORD.value or FOLDER / f"{run.config['name']}.json")
    records.save(record, path)
    columns = {
        "original": images,
        "clamped": clamped,
        "literal PGD-10": attacked,
        "PGD-10, 8/255": shown,
    }
    titles = {
        "clean": "clean",
        "clamped": "clamped,\nno attack",
        "literal_pgd10": "literal\nPGD-10",
        "pgd10": "PGD-10,\n8/255",
    }
    accuracies = {title: results[name]["accuracy"] for name, title in titles.items()}
    draw(columns, numbers, accuracies).savefig(path.with_suffix(".png"), dpi=110)
    for name, value in (*numbers.items(), *((n, r["accuracy"]) for n, r in results.items())):
        print(f"{name:42s} {value:8.2f}")
    print(f"record and figure: {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    cli.run(main)
