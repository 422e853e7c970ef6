"""Standard training: the baseline without a defence.

    python experiments/train.py --config=standard:mnist --workdir=runs/standard-mnist
    python experiments/evaluate.py --workdir=runs/standard-mnist

Variants: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, imagenette, tiny_imagenet, and
folder and arrays for images of your own, each also with _debug. Expected: clean accuracy near that
of the literature (MNIST 99 %, CIFAR-10 94 % and more), and about 0 under PGD.
Rows *_paper and mnist_example are NORMAL of Shen et al., arXiv 2101.12372 (see configs/cse.py).

Rows with cifar10_cpu or cifar100_cpu are the reduced recipe: minutes on two CPU cores (recipes.py).
"""

from configs import fgsm_at, recipes

LENGTHS = dict(
    mnist_paper="10e", fashion_mnist_paper="10e", cifar10_paper="20e", mnist_example="10e"
)
_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar10_cpu", "cifar100", "cifar100_cpu")
ROWS = (*_SETS, *recipes.MORE, *LENGTHS)
DEFENSE = {row: dict(name="standard", smoothing=0.0) for row in ROWS}


def get_config(variant="digits"):
    overrides = {row: fgsm_at.paper(row, length) for row, length in LENGTHS.items()}
    return recipes.make("standard", variant, DEFENSE, overrides, select="clean")
