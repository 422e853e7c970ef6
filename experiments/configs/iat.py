"""IAT, interpolated adversarial training (Lamb et al., arXiv 1906.06784), in M2AT's recipe.

    python experiments/train.py --config=iat:cifar10 --workdir=runs/iat-cifar10
    python experiments/evaluate.py --workdir=runs/iat-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. Expected on CIFAR-10: 89.88
clean and 44.57 under PGD by its paper; 91.86 and 44.76 (ResNet-18) in a rerun that has 83.53 and
46.07 for PGD adversarial training.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import m2at, recipes

_MIX = dict(name="iat", alpha=1.0, lam_per_sample=False)
DEFENSE = {row: dict(_MIX, **attack) for row, attack in m2at.ATTACK.items()}
DEFENSE |= recipes.strengthened(DEFENSE["cifar10_cpu"], "cifar10_cpu")


def get_config(variant="digits"):
    return recipes.make("iat", variant, DEFENSE, m2at.OVERRIDES)
