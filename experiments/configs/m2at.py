"""M2AT, masking and mixing adversarial training (Adachi et al., arXiv 2302.08066), reading R1.

    python experiments/train.py --config=m2at:cifar10 --workdir=runs/m2at-cifar10
    python experiments/evaluate.py --workdir=runs/m2at-cifar10
    python experiments/evaluate.py --workdir=runs/m2at-cifar10 --protocol=autoattack

Variants: digits, mnist, cifar10, cifar10_onehot, cifar10_gamma2, cifar10_paper, svhn, imagenette,
tiny_imagenet, and folder and arrays for images of your own, each also with _debug. The paper's body
was not available: R1 mixes an image under a mask with the same image under its complement
(m2at_shuffle is the other reading), and `cifar10_paper`, WRN-34-10 for 200 epochs, is the recipe of
its authors' other code (INFERRED for M2AT). `cifar10_onehot` has hard labels, `cifar10_gamma2`
AVmixup's length and labels; --config.defense.l2=.7 sweeps what lies between. ATTACK and OVERRIDES
are those of the rivals too: avmixup, iat, mart.

Expected: M2AT's own numbers are not known. Its abstract claims more clean and robust accuracy than
earlier methods; of its relatives, AVmixup has 93.24 clean, 58.23 under PGD-20 and 53.63 under CW-20
by its own paper, and 40.50 under CW-20 in a rerun by M2AT's first author (CIFAR-10, WRN-34-10). So
compare cw20 and AutoAttack, not pgd20: soft labels flatter PGD on the cross-entropy.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import recipes

_DIGITS = dict(steps=7, step_size=0.04, ramp_epochs=8.0)
_MNIST = dict(steps=7, step_size=0.08, ramp_epochs=3.0)
_CIFAR10 = dict(steps=10, step_size=2 / 255, ramp_epochs=0.0)
ATTACK = dict(
    digits=_DIGITS,
    mnist=_MNIST,
    cifar10=_CIFAR10,
    cifar10_paper=_CIFAR10,
    cifar10_cpu=dict(_CIFAR10, **recipes.REDUCED_ATTACK),
)

_MIX = dict(name="m2at", pairing="complement", gamma=1.0, labels="area", l1=1.0, l2=0.55)
DEFENSE = {row: dict(_MIX, **attack) for row, attack in ATTACK.items()}
DEFENSE |= {row: dict(_MIX, **attack) for row, attack in recipes.MORE.items()}
DEFENSE["cifar10_onehot"] = dict(_MIX, labels="onehot", **_CIFAR10)
DEFENSE["cifar10_gamma2"] = dict(DEFENSE["cifar10"], gamma=2.0, l2=0.1)
DEFENSE["cifar10_cpu_onehot"] = dict(DEFENSE["cifar10_cpu"], labels="onehot")
DEFENSE["cifar10_cpu_gamma2"] = dict(DEFENSE["cifar10_cpu"], gamma=2.0, l2=0.1)
DEFENSE |= recipes.strengthened(DEFENSE["cifar10_cpu"], "cifar10_cpu")


def _cw20(step_size):
    """20 steps up the margin: what soft labels do not flatter."""
    attack = dict(name="pgd", steps=20, step_size=step_size, loss="margin")
    return dict(evaluation=dict(attacks=dict(cw20=attack)))


_PAPER = dict(
    model=dict(name="wide_resnet", depth=34, width=10),
    train=dict(
        length="200e",
        optimizer=dict(
            name="sgd",
            lr=0.1,
            momentum=0.9,
            weight_decay=2e-4,
            schedule=dict(name="piecewise", at=["100e", "150e"], factor=0.1),
        ),
    ),
)
OVERRIDES = dict(
    digits=_cw20(0.02),
    mnist=_cw20(0.02),
    cifar10=_cw20(2 / 255),
    cifar10_onehot=_cw20(2 / 255),
    cifar10_gamma2=_cw20(2 / 255),
    cifar10_paper=dict(_PAPER, **_cw20(2 / 255)),
    **{row: _cw20(attack["step_size"]) for row, attack in recipes.MORE.items()},
)
REDUCED = [f"cifar10_cpu{suffix}" for suffix in ("", "_onehot", "_gamma2", "_awp", "_ema")]
OVERRIDES |= {row: _cw20(2 / 255) for row in REDUCED}


def get_config(variant="digits"):
    return recipes.make("m2at", variant, DEFENSE, OVERRIDES)
