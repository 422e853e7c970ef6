"""IAD-I, introspective adversarial distillation (Zhu et al., arXiv 2106.04928).

    python experiments/train.py --config=trades:cifar10 --workdir=runs/trades-cifar10
    python experiments/train.py --config=iad:cifar10 --workdir=runs/iad-cifar10
    python experiments/evaluate.py --workdir=runs/iad-cifar10

Variants: digits, mnist, cifar10, cifar100, cifar10_paper, cifar10_paper_mobilenet, cifar100_paper,
cifar100_paper_mobilenet, each also with _debug; teachers and students as in add.py. The student
begins to listen to itself after three tenths of its training, the authors' 60 of 200 epochs.
Expected: no numbers of the paper could be read.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import add, recipes

_BEGIN = dict(
    digits=52.0,
    mnist=3.6,
    cifar10=9.0,
    cifar10_cpu=0.3 * recipes.REDUCED_EPOCHS,
    cifar100=9.0,
)

DEFENSE = {
    row: dict(
        name="iad",
        teacher=add.TEACHERS[row],
        temperature=1.0,
        beta=0.1,
        begin_epochs=_BEGIN.get(row, 60.0),
        **attack,
    )
    for row, attack in add.ATTACK.items()
}
OVERRIDES = add.papers(200, 100, 150)


def get_config(variant="digits"):
    return recipes.make("iad", variant, DEFENSE, OVERRIDES)
