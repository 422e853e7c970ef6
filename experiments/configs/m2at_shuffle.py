"""M2AT in reading R2: the second image comes from elsewhere in the batch, as in mixup.

    python experiments/train.py --config=m2at_shuffle:cifar10 --workdir=runs/m2at_shuffle-cifar10
    python experiments/evaluate.py --workdir=runs/m2at_shuffle-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. Everything else is as in
m2at. Expected: no number is known; the paper's keyword Mixup speaks for this reading, its abstract
for the other one.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import m2at, recipes

_MIX = dict(name="m2at", pairing="shuffle", gamma=1.0, labels="area", l1=1.0, l2=0.55)
DEFENSE = {row: dict(_MIX, **attack) for row, attack in m2at.ATTACK.items()}
DEFENSE |= recipes.strengthened(DEFENSE["cifar10_cpu"], "cifar10_cpu")


def get_config(variant="digits"):
    return recipes.make("m2at_shuffle", variant, DEFENSE, m2at.OVERRIDES)
