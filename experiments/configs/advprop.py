"""AdvProp (Xie et al., arXiv 1911.09665): adversarial examples have a BatchNorm set of their own.

    python experiments/train.py --config=advprop:cifar10 --workdir=runs/advprop-cifar10
    python experiments/evaluate.py --workdir=runs/advprop-cifar10

Variants: digits, mnist, cifar10, cifar100, cifar10_paper, cifar100_paper, each also with _debug,
with networks, eps and recipes of the `gssl` config. It is GSSL without generator, gate and KL: the
sum of both cross-entropies from the first step on, the PGD against the adversarial set. (GSSL's own
ablation, which keeps gate, KL and stages, is gssl:ROW_no_generator.)

Expected: a clean accuracy above standard training's; by its paper 76.67 -> 77.42 on ImageNet
(ResNet-50, found). No robust accuracy is claimed, and `classifier` (the clean set) has little.

Rows with cifar10_cpu are the reduced recipe: minutes on two CPU cores (recipes.py, `_cpu`).
"""

from configs import gssl, recipes

DEFENSE = {
    row: dict(
        name="gssl",
        screen="none",
        gate=False,
        screened_weight=1.0,
        kl_weight=0.0,
        attacked="screened",
        stages=dict(screening=None),
        **{option: gssl.DEFENSE[row][option] for option in ("eps", "steps", "step_size")},
    )
    for row in (
        "digits",
        "mnist",
        "cifar10",
        "cifar10_cpu",
        "cifar100",
        "cifar10_paper",
        "cifar100_paper",
    )
}
OVERRIDES = {
    row: {section: v for section, v in gssl.OVERRIDES.get(row, {}).items() if section != "reported"}
    for row in DEFENSE
}


def get_config(variant="digits"):
    return recipes.make("advprop", variant, DEFENSE, OVERRIDES, select="clean")
