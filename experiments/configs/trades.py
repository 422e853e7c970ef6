"""TRADES (Zhang et al., arXiv 1901.08573).

    python experiments/train.py --config=trades:mnist --workdir=runs/trades-mnist
    python experiments/evaluate.py --workdir=runs/trades-mnist

Variants: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, imagenette, tiny_imagenet, and
folder and arrays for images of your own, each also with _debug. Expected: see docs/results.md; on
CIFAR-10 others' full runs reach 49.45 under AutoAttack (ResNet-18, MAIR); ours has 30 epochs.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

DEFENSE = dict(
    digits=dict(name="trades", beta=6.0, steps=7, step_size=0.04, ramp_epochs=8.0),
    mnist=dict(name="trades", beta=1.0, steps=7, step_size=0.08, ramp_epochs=3.0),
    fashion_mnist=dict(name="trades", beta=6.0, steps=7, step_size=0.025, ramp_epochs=3.0),
    cifar10=dict(name="trades", beta=6.0, steps=10, step_size=2 / 255, ramp_epochs=0.0),
    cifar100=dict(name="trades", beta=6.0, steps=10, step_size=2 / 255, ramp_epochs=0.0),
    **{row: dict(name="trades", beta=6.0, **attack) for row, attack in recipes.MORE.items()},
)
DEFENSE["cifar10_cpu"] = recipes.reduced(DEFENSE["cifar10"])
DEFENSE |= recipes.strengthened(DEFENSE["cifar10_cpu"], "cifar10_cpu")


def get_config(variant="digits"):
    return recipes.make("trades", variant, DEFENSE)
