"""Standard training with GSSL's budget: what the `gssl` rows are to be compared with.

    python experiments/train.py --config=gssl_baseline:mnist_small --workdir=runs/gssl_baseline
    python experiments/evaluate.py --workdir=runs/gssl_baseline --checkpoint=last

Variants: digits, mnist, mnist_small, cifar10, cifar100, mnist_paper, cifar10_paper,
cifar100_paper, each also with _debug. Same network (one BatchNorm set), optimiser and schedule.

How the budget is matched. GSSL makes one optimiser step per batch in every stage; through a network
in training mode go B images a step in the stages `self_supervised` (the generator) and `standard`,
2B (clean and screened) in `screening` and `joint`. The baseline makes as many steps as all four
stages together, each with B (1 + the share of the last two stages) images, rounded up to a multiple
of 4 so that devices can share them. Not counted are the forward passes of the inner PGD and the
generator's in the last two stages: GSSL takes more time. The baseline's learning rate is not raised
with its batch. Compare the checkpoints `last`: `best` is chosen over GSSL's joint stage only, but
over the whole of the baseline.

Expected: clean accuracy as the paper's standard training, MNIST 99.64, CIFAR-10 83.00, CIFAR-100
62.76 (found; whether that had GSSL's budget is not known), and about 0 under PGD.

Rows with cifar10_cpu or cifar100_cpu are the reduced recipe: minutes on two CPU cores (recipes.py).
"""

import math

from configs import gssl, recipes

# Training images after the recipes' validation split.
IMAGES = dict(digits=1097, mnist=59000, cifar10=49000, cifar100=49000)
_KINDS = ("_small", "_paper", "_cpu")
ROWS = tuple(row for row in gssl.DEFENSE if row in IMAGES or row.endswith(_KINDS))
DEFENSE = {row: dict(name="standard", smoothing=0.0) for row in ROWS}


def budget(row):
    """(steps, images per step) of GSSL's row, the images in the mean over its stages."""
    config = gssl.get_config(row)
    per_epoch = IMAGES[row.partition("_")[0]] // config.train.batch_size
    steps = round(float(config.train.length.removesuffix("e")) * per_epoch)
    shares = [config.defense.stages[name] for name in ("self_supervised", "standard")]
    single = sum(float(share.removesuffix("%")) for share in shares) / 100
    return steps, config.train.batch_size * (2 - single)


def _override(row):
    steps, images = budget(row)
    changes = {s: v for s, v in gssl.OVERRIDES.get(row, {}).items() if s != "reported"}
    train = dict(changes.get("train", {}), length=f"{steps}s", batch_size=4 * math.ceil(images / 4))
    return dict(changes, train=train)


OVERRIDES = {row: _override(row) for row in ROWS}


def get_config(variant="digits"):
    config = recipes.make("gssl_baseline", variant, DEFENSE, OVERRIDES, select="clean")
    return gssl.cheap(config)
