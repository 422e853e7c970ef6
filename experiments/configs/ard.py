"""ARD, adversarially robust distillation (Goldblum et al., arXiv 1905.09747).

    python experiments/train.py --config=trades:cifar10 --workdir=runs/trades-cifar10
    python experiments/train.py --config=ard:cifar10 --workdir=runs/ard-cifar10
    python experiments/evaluate.py --workdir=runs/ard-cifar10

Variants: digits, mnist, cifar10, cifar100, cifar10_paper, cifar10_paper_mobilenet, cifar100_paper,
cifar100_paper_mobilenet, each also with _debug; teachers and students as in add.py. The paper rows
are the authors' code: temperature 30, 200 epochs, and a KL averaged over the classes too (scale .1
on ten classes, .01 on a hundred). Expected: no numbers of the paper could be read. The digits have
temperature 1: at 30 a teacher of so few steps says little.
"""

from configs import add, recipes

DEFENSE = {
    row: dict(
        name="ard",
        teacher=add.TEACHERS[row],
        temperature=1.0 if row == "digits" else 30.0,
        alpha=1.0,
        scale=(0.01 if "cifar100" in row else 0.1) if "paper" in row else 1.0,
        **attack,
    )
    for row, attack in add.ATTACK.items()
}
OVERRIDES = add.papers(200, 100, 150)


def get_config(variant="digits"):
    return recipes.make("ard", variant, DEFENSE, OVERRIDES)
