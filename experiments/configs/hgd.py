"""HGD, the high-level representation guided denoiser (Liao et al., arXiv 1712.02976).

    python experiments/train.py --config=hgd:mnist --workdir=runs/hgd-mnist
    python experiments/evaluate.py --workdir=runs/hgd-mnist --protocol=audit

Variants: digits, mnist, cifar10, cifar10_paper (100 epochs), each also with _debug. Expected: high
accuracy on what is crafted on the classifier alone (T0, not white-box), about 0 end to end.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

FAST = dict(name="adam", lr=1e-3, b1=0.5, schedule=dict(name="one_cycle"))


def _hgd(width, depth, classifier, optimizer=FAST):
    return dict(
        name="hgd",
        generator_options=dict(width=width, depth=depth),
        lengths=dict(classifier=classifier),
        optimizer=optimizer,
        attacks=["fgsm", "pgd", "clean"],
        steps=10,
        layer="logits",
    )


DEFENSE = dict(
    digits=_hgd(8, 1, "40%"),
    mnist=_hgd(8, 2, "50%"),
    cifar10=_hgd(32, 3, "50%"),
    cifar10_paper=_hgd(32, 3, "30e", dict(name="adam", lr=1e-3)),
)
_REDUCED = _hgd(8, 2, "50%")
DEFENSE["cifar10_cpu"] = recipes.reduced(_REDUCED)

ROWS = dict(
    digits=dict(train=dict(length="24e")),
    mnist=dict(train=dict(length="2e")),
    cifar10_paper=dict(train=dict(length="130e")),
    debug=dict(defense=dict(lengths=dict(classifier="50%"))),
)


def get_config(variant="digits"):
    return recipes.make("hgd", variant, DEFENSE, ROWS)
