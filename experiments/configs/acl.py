"""ACL(DS): adversarial contrastive pre-training, dual stream (Jiang et al., arXiv 2010.13337).

    python experiments/train.py --config=acl:cifar10 --workdir=runs/acl-cifar10
    python experiments/evaluate.py --workdir=runs/acl-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. `cifar10_paper` has CLAF's
schedule, 200 epochs of contrast and 100 of the head (INFERRED, also the optimiser and 5 steps).
Expected: the paper gains 2.14 clean and 2.99 robust over earlier robust pre-training after
fine-tuning the whole network; here the head alone is trained, so less.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import claf, recipes

_CIFAR10 = dict(name="acl", dataset="cifar10", steps=5, step_size=2 / 255)
DEFENSE = dict(
    digits=dict(
        name="acl", dataset="digits", steps=5, step_size=0.04, head_epochs="8e", head_lr=1e-2
    ),
    mnist=dict(name="acl", dataset="mnist", steps=5, step_size=0.08, head_epochs="1e"),
    cifar10=dict(_CIFAR10, head_epochs="10e"),
    cifar10_paper=dict(_CIFAR10, head_epochs="100e"),
)
OVERRIDES = claf.rival("5e")
DEFENSE["cifar10_cpu"] = recipes.reduced(DEFENSE["cifar10"], head_epochs="1e")


def get_config(variant="digits"):
    return recipes.make("acl", variant, DEFENSE, OVERRIDES, augment="none")
