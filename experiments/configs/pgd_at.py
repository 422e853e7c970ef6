"""PGD adversarial training (Madry et al., arXiv 1706.06083).

    python experiments/train.py --config=pgd_at:mnist --workdir=runs/pgd_at-mnist
    python experiments/evaluate.py --workdir=runs/pgd_at-mnist

Variants: digits, mnist, fashion_mnist, cifar10, cifar100, svhn, imagenette, tiny_imagenet, and
folder and arrays for images of your own, each also with _debug. Expected: see docs/results.md; on
CIFAR-10 others' full runs reach 82.92 clean and 53.49 under PGD-10 (PreActResNet-18, best epoch,
Rice et al.'s logs) and 48.67 under AutoAttack (ResNet-18, MAIR); ours has 30 epochs.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

DEFENSE = dict(
    digits=dict(name="pgd_at", steps=7, step_size=0.04, ramp_epochs=8.0),
    mnist=dict(name="pgd_at", steps=7, step_size=0.08, ramp_epochs=3.0),
    fashion_mnist=dict(name="pgd_at", steps=7, step_size=0.025, ramp_epochs=3.0),
    cifar10=dict(name="pgd_at", steps=10, step_size=2 / 255, ramp_epochs=0.0),
    cifar100=dict(name="pgd_at", steps=10, step_size=2 / 255, ramp_epochs=0.0),
    **{row: dict(name="pgd_at", **attack) for row, attack in recipes.MORE.items()},
)
DEFENSE["cifar10_cpu"] = recipes.reduced(DEFENSE["cifar10"])
DEFENSE |= recipes.strengthened(DEFENSE["cifar10_cpu"], "cifar10_cpu")


def get_config(variant="digits"):
    return recipes.make("pgd_at", variant, DEFENSE)
