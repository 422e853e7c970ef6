"""Standard training: the baseline without a defence.

    python experiments/train.py --config=standard:mnist --workdir=runs/standard-mnist
    python experiments/evaluate.py --workdir=runs/standard-mnist

Variants: digits, mnist, cifar10, each also with _debug. Expected: clean accuracy near that of the
literature (MNIST 99 %, CIFAR-10 94 % and more), and about 0 under PGD.
"""

from configs import recipes

DEFENSE = dict(name="standard", smoothing=0.0)


def get_config(variant="digits"):
    sections = dict(digits=DEFENSE, mnist=DEFENSE, cifar10=DEFENSE)
    return recipes.make("standard", variant, sections, select="clean")
