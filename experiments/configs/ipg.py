"""IPG, the inverse-perturbation generator (X. W. Zhang, master thesis 2023, abstract only).

    python experiments/train.py --config=ipg:mnist --workdir=runs/ipg-mnist
    python experiments/evaluate.py --workdir=runs/ipg-mnist --protocol=audit

Variants: digits, mnist (an epoch of each phase), mnist_phase1 (the paper-like phase I
alone), mnist_paper (30 epochs of each phase), cifar10, cifar10_paper (100), each also with _debug.
The settings are INFERRED (see defenses/ipg.py). Expected: no accuracy could be read in the paper.
The records in experiments/records/purifiers (one seed): phase I keeps 96.5 % under attacks
that do not know of the purifier (T0, not white-box) and nothing end to end; after phase II 99 %
clean, T0 69 %, and at most 31.5 % in the worst case per example.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

FAST = dict(name="adam", lr=1e-3, b1=0.5, schedule=dict(name="one_cycle"))


def _ipg(width, lengths, **more):
    return dict(
        name="ipg",
        generator_options=dict(width=width, depth=2),
        reach=1.0,
        phases=["oblivious", "end_to_end"],
        lengths=lengths,
        optimizer=FAST,
        attacks=["fgsm", "pgd", "clean"],
        steps=10,
        clean_weight=1.0,
        feature_weight=0.1,
        pixel_weight=1.0,
        adversarial_weight=0.0,
        layer="features",
        **more,
    )


_PAPER = dict(optimizer=dict(name="adam", lr=2e-4, b1=0.5))
_MNIST = _ipg(8, dict(classifier="1e", oblivious="1e"))
_DIGITS = _ipg(8, dict(classifier="30%", oblivious="30%"))
_DIGITS["generator_options"] = dict(width=8, depth=1)
_CIFAR = {**_ipg(32, dict(classifier="50%", oblivious="20%")), **_PAPER}
_CIFAR["generator_options"] = dict(width=32, depth=3)

DEFENSE = dict(
    digits=_DIGITS,
    mnist=_MNIST,
    mnist_phase1=dict(_MNIST, phases=["oblivious"]),
    mnist_paper=dict(_MNIST, **_PAPER, lengths=dict(classifier="12e", oblivious="30e")),
    cifar10=_CIFAR,
    cifar10_paper=dict(_CIFAR, lengths=dict(classifier="30e", oblivious="100e")),
)
_REDUCED = recipes.reduced(_CIFAR, optimizer=FAST, generator_options=dict(width=8, depth=2))
DEFENSE["cifar10_cpu"] = _REDUCED
DEFENSE["cifar10_cpu_phase1"] = dict(_REDUCED, phases=["oblivious"])

ROWS = dict(
    digits=dict(train=dict(length="24e")),
    mnist=dict(train=dict(length="3e")),
    mnist_phase1=dict(train=dict(length="2e")),
    mnist_paper=dict(train=dict(length="72e", batch_size=128)),
    cifar10_paper=dict(train=dict(length="230e")),
    debug=dict(defense=dict(lengths=dict(classifier="30%", oblivious="30%"))),
)


def get_config(variant="digits"):
    return recipes.make("ipg", variant, DEFENSE, ROWS)
