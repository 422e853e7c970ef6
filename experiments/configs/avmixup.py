"""AVmixup, adversarial vertex mixup (Lee et al., arXiv 2003.02484), in M2AT's recipe.

    python experiments/train.py --config=avmixup:cifar10 --workdir=runs/avmixup-cifar10
    python experiments/evaluate.py --workdir=runs/avmixup-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. Expected on CIFAR-10 with
WRN-34-10: 93.24 clean, 78.25 FGSM, 62.67 PGD-10, 58.23 PGD-20, 53.63 CW-20 by its paper; 94.97,
83.69, 62.63, 57.54 and 40.50 in a rerun by M2AT's first author. Compare cw20 and AutoAttack: soft
labels flatter PGD on the cross-entropy.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import m2at, recipes

_MIX = dict(name="avmixup", gamma=2.0, l1=1.0, l2=0.1)
DEFENSE = {row: dict(_MIX, **attack) for row, attack in m2at.ATTACK.items()}
_FOUND = dict(clean=93.24, fgsm=78.25, pgd10=62.67, pgd20=58.23, cw20=53.63)
_REPORTED = {name: dict(value=value, status="FOUND") for name, value in _FOUND.items()}
OVERRIDES = dict(
    m2at.OVERRIDES, cifar10_paper=dict(m2at.OVERRIDES["cifar10_paper"], reported=_REPORTED)
)
DEFENSE |= recipes.strengthened(DEFENSE["cifar10_cpu"], "cifar10_cpu")


def get_config(variant="digits"):
    return recipes.make("avmixup", variant, DEFENSE, OVERRIDES)
