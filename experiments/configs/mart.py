"""MART, misclassification-aware adversarial training (Wang et al., ICLR 2020), in M2AT's recipe.

    python experiments/train.py --config=mart:cifar10 --workdir=runs/mart-cifar10
    python experiments/evaluate.py --workdir=runs/mart-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. The attack is that of the
other rows (8/255, step 2/255), not the authors' (.031, step .007); beta is that of their ResNet-18
script. Expected: see docs/results.md; no number of this recipe is known.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import m2at, recipes

DEFENSE = {row: dict(name="mart", beta=5.0, **attack) for row, attack in m2at.ATTACK.items()}
DEFENSE |= recipes.strengthened(DEFENSE["cifar10_cpu"], "cifar10_cpu")


def get_config(variant="digits"):
    return recipes.make("mart", variant, DEFENSE, m2at.OVERRIDES)
