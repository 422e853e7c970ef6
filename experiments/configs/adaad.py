"""AdaAD, adaptive adversarial distillation (Huang et al., CVPR 2023).

    python experiments/train.py --config=trades:cifar10 --workdir=runs/trades-cifar10
    python experiments/train.py --config=adaad:cifar10 --workdir=runs/adaad-cifar10
    python experiments/evaluate.py --workdir=runs/adaad-cifar10

Variants: digits, mnist, cifar10, cifar100, cifar10_paper, cifar10_paper_mobilenet, cifar100_paper,
cifar100_paper_mobilenet, each also with _debug; teachers and students as in add.py. The paper rows'
schedule, 200 epochs with drops at 100 and 150, is that of a later paper's code. Expected: no
numbers of the paper could be read. Each inner step differentiates the teacher too: with a large one
this costs several times an epoch of add.
"""

from configs import add, recipes

DEFENSE = {
    row: dict(name="adaad", teacher=add.TEACHERS[row], alpha=1.0, **attack)
    for row, attack in add.ATTACK.items()
}
OVERRIDES = add.papers(200, 100, 150)


def get_config(variant="digits"):
    return recipes.make("adaad", variant, DEFENSE, OVERRIDES)
