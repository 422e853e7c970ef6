"""RoCL: adversarial self-supervised contrastive learning (Kim et al., arXiv 2006.07589).

    python experiments/train.py --config=rocl:cifar10 --workdir=runs/rocl-cifar10
    python experiments/evaluate.py --workdir=runs/rocl-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. `cifar10_paper` has CLAF's
schedule, 200 epochs of contrast and 100 of the head (INFERRED, also the optimiser).
Expected: the paper's ResNet-18 has 83.71 clean and 40.27 robust at 8/255 with a linear head.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import claf, recipes

_CIFAR10 = dict(name="rocl", dataset="cifar10", steps=7, step_size=2 / 255)
DEFENSE = dict(
    digits=dict(
        name="rocl", dataset="digits", steps=5, step_size=0.04, head_epochs="8e", head_lr=1e-2
    ),
    mnist=dict(name="rocl", dataset="mnist", steps=5, step_size=0.08, head_epochs="1e"),
    cifar10=dict(_CIFAR10, head_epochs="10e"),
    cifar10_paper=dict(_CIFAR10, head_epochs="100e"),
)
OVERRIDES = claf.rival("5e", reported=dict(clean=dict(value=83.71, status="FOUND")))
DEFENSE["cifar10_cpu"] = recipes.reduced(DEFENSE["cifar10"], head_epochs="1e")


def get_config(variant="digits"):
    return recipes.make("rocl", variant, DEFENSE, OVERRIDES, augment="none")
