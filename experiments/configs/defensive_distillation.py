"""Defensive distillation (Papernot et al., arXiv 1511.04508): the control that is known to break.

    python experiments/train.py --config=defensive_distillation:mnist --workdir=runs/dd-mnist
    python experiments/evaluate.py --workdir=runs/dd-mnist
    python experiments/evaluate.py --workdir=runs/dd-mnist --protocol=autoattack

Variants: digits, mnist, cifar10, cifar100, cifar10_paper, cifar100_paper, each also with _debug.
The first half of a run trains the teacher, a network of the student's kind, at the temperature. The
paper rows have temperature 100 and 200 epochs of ResNet-18, a recipe of ours.

Expected: clean accuracy near standard training's. Under PGD on the cross-entropy it may look
robust, because a saturated softmax has no gradient; `margin20`, PGD on logits, and AutoAttack show
about 0.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import add, recipes

ROWS = ("digits", "mnist", "cifar10", "cifar10_cpu", "cifar100", "cifar10_paper", "cifar100_paper")
DEFENSE = {
    row: dict(name="defensive_distillation", temperature=100.0 if "paper" in row else 20.0)
    for row in ROWS
}


def _margin20(step_size):
    attack = dict(name="pgd", steps=20, step_size=step_size, loss="margin")
    return dict(evaluation=dict(attacks=dict(margin20=attack)))


_LONG = dict(train=dict(length="400e", optimizer=add.sgd(100, 150)))
OVERRIDES = dict(
    digits=_margin20(0.02),
    mnist=_margin20(0.02),
    cifar10=_margin20(2 / 255),
    cifar10_cpu=_margin20(2 / 255),
    cifar100=_margin20(2 / 255),
    cifar10_paper=dict(_LONG, **_margin20(2 / 255)),
    cifar100_paper=dict(_LONG, **_margin20(2 / 255)),
)


def get_config(variant="digits"):
    return recipes.make("defensive_distillation", variant, DEFENSE, OVERRIDES, select="clean")
