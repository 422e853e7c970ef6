"""Margin cost of Zhang and Evans (arXiv 1810.09225), PGD's margins in place of certified ones.

    python experiments/train.py --config=zhang_evans:mnist --workdir=runs/zhang_evans
    python experiments/evaluate.py --workdir=runs/zhang_evans

Variants: digits, mnist, fashion_mnist, cifar10, each also with _debug; all protect class 0.
Expected: class 0 robust as by PGD adversarial training, the other classes about as without a
defence (experiments/tables.py --per_class=pgd20).

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

DEFENSE = dict(
    digits=dict(name="zhang_evans", steps=7, step_size=0.04, ramp_epochs=8.0),
    mnist=dict(name="zhang_evans", steps=7, step_size=0.08, ramp_epochs=3.0),
    fashion_mnist=dict(name="zhang_evans", steps=7, step_size=0.025, ramp_epochs=3.0),
    cifar10=dict(name="zhang_evans", steps=10, step_size=2 / 255),
)
DEFENSE["cifar10_cpu"] = recipes.reduced(DEFENSE["cifar10"])


def get_config(variant="digits"):
    return recipes.make("zhang_evans", variant, DEFENSE)
