"""Standard training: the baseline without a defence.

    python experiments/train.py --config=standard:mnist --workdir=runs/standard-mnist
    python experiments/evaluate.py --workdir=runs/standard-mnist

Variants: digits, mnist, fashion_mnist, cifar10, cifar100, each also with _debug. Expected: clean
accuracy near that of the literature (MNIST 99 %, CIFAR-10 94 % and more), and about 0 under PGD.
"""

from configs import recipes

ROWS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
DEFENSE = {row: dict(name="standard", smoothing=0.0) for row in ROWS}


def get_config(variant="digits"):
    return recipes.make("standard", variant, DEFENSE, select="clean")
