"""SupCon: supervised contrastive training, no adversary (Khosla et al., arXiv 2004.11362).

    python experiments/train.py --config=supcon:cifar10 --workdir=runs/supcon-cifar10
    python experiments/evaluate.py --workdir=runs/supcon-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. `cifar10_paper` has CLAF's
schedule, 200 epochs of contrast and 100 of the head (which is INFERRED for this rival).
Expected: clean accuracy near that of standard training, and about 0 under PGD.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import claf, recipes

_CIFAR10 = dict(name="supcon", dataset="cifar10", temperature=0.07)
DEFENSE = dict(
    digits=dict(name="supcon", dataset="digits", head_epochs="8e", head_lr=1e-2),
    mnist=dict(name="supcon", dataset="mnist", head_epochs="1e"),
    cifar10=dict(_CIFAR10, head_epochs="10e"),
    cifar10_paper=dict(_CIFAR10, head_epochs="100e"),
)
OVERRIDES = claf.rival("4e")
DEFENSE["cifar10_cpu"] = recipes.reduced(DEFENSE["cifar10"], head_epochs="1e")


def get_config(variant="digits"):
    return recipes.make("supcon", variant, DEFENSE, OVERRIDES, augment="none", select="clean")
