"""RoCL: adversarial self-supervised contrastive learning (Kim et al., arXiv 2006.07589).

    python experiments/train.py --config=rocl:cifar10 --workdir=runs/rocl-cifar10
    python experiments/evaluate.py --workdir=runs/rocl-cifar10

Variants: digits, mnist, cifar10, cifar10_paper, each also with _debug. `cifar10_paper` has CLAF's
schedule, 200 epochs of contrast and 100 of the head (INFERRED, also the optimiser).
Expected: the paper's ResNet-18 has 83.71 clean and 40.27 robust at 8/255 with a linear head.
"""

from configs import recipes

_CIFAR10 = dict(name="rocl", dataset="cifar10", steps=7, step_size=2 / 255)
DEFENSE = dict(
    digits=dict(
        name="rocl", dataset="digits", steps=5, step_size=0.04, head_epochs="8e", head_lr=1e-2
    ),
    mnist=dict(name="rocl", dataset="mnist", steps=5, step_size=0.08, head_epochs="1e"),
    cifar10=dict(_CIFAR10, head_epochs="10e"),
    cifar10_paper=dict(_CIFAR10, head_epochs="100e"),
)
_OPTIMIZER = dict(
    name="sgd",
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    schedule=dict(name="cosine", final=1e-3),
)
OVERRIDES = dict(
    digits=dict(train=dict(length="40e")),
    mnist=dict(train=dict(length="5e")),
    cifar10=dict(train=dict(length="40e", batch_size=256, optimizer=_OPTIMIZER)),
    cifar10_paper=dict(
        reported=dict(clean=dict(value=83.71, status="FOUND")),
        train=dict(
            length="300e",
            batch_size=256,
            optimizer=_OPTIMIZER,
            validate_every="10e",
            checkpoint_every="10e",
        ),
    ),
    debug=dict(defense=dict(head_epochs="1s")),
)


def get_config(variant="digits"):
    return recipes.make("rocl", variant, DEFENSE, OVERRIDES, augment="none")
