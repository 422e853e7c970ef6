"""APE-GAN, adversarial perturbation elimination with a GAN (Shen et al., arXiv 1707.05474).

    python experiments/train.py --config=ape_gan:mnist --workdir=runs/ape_gan-mnist
    python experiments/evaluate.py --workdir=runs/ape_gan-mnist --protocol=audit

Variants: digits, mnist, mnist_paper (full width, 2 epochs of the GAN as in the PyTorch port),
cifar10, cifar10_paper, each also with _debug. Expected: others' CIFAR-10 error under FGSM falls
from 77.8 to 26.4 %, crafted on the classifier alone (T0, not white-box); about 0 end to end.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes


def _ape_gan(width, classifier, lr=2e-4, generator_updates=2):
    return dict(
        name="ape_gan",
        generator_options=dict(width=width),
        lengths=dict(classifier=classifier),
        optimizer=dict(name="adam", lr=lr, b1=0.5),
        attacks=["fgsm"],
        pixel_weight=0.7,
        adversarial_weight=0.3,
        root=False,
        generator_updates=generator_updates,
    )


DEFENSE = dict(
    digits=_ape_gan(0.25, "40%", lr=1e-3, generator_updates=1),
    mnist=_ape_gan(0.25, "50%", lr=1e-3, generator_updates=1),
    mnist_paper=_ape_gan(1.0, "12e"),
    cifar10=_ape_gan(1.0, "50%"),
    cifar10_paper=_ape_gan(1.0, "30e"),
)
DEFENSE["cifar10_cpu"] = _ape_gan(0.25, "50%", lr=1e-3, generator_updates=1)

ROWS = dict(
    digits=dict(train=dict(length="24e")),
    mnist=dict(train=dict(length="2e")),
    mnist_paper=dict(train=dict(length="14e", batch_size=128)),
    cifar10_paper=dict(train=dict(length="60e")),
    debug=dict(defense=dict(lengths=dict(classifier="50%"))),
)


def get_config(variant="digits"):
    return recipes.make("ape_gan", variant, DEFENSE, ROWS)
