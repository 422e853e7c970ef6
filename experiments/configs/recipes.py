"""The recipes that the configs share: one per data set; a defence adds what is its own.

`folder` and `arrays` are for images of your own (docs/your_data.md).

A variant is DATASET, or DATASET_ROW where a config has further rows (a paper's own recipe), each
also with _debug, which keeps everything but shrinks it to seconds.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxdefense import registry

# What the papers' models subtract from the pixels and divide by, where they do.
NORMALISED = dict(
    mnist=dict(mean=[0.1307], std=[0.3081]),
    fashion_mnist=dict(mean=[0.2862], std=[0.3204]),
    cifar10=dict(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010]),
)


def _attacks(step_size: float, *steps: int) -> dict[str, Any]:
    """FGSM and PGD of several lengths, as a config's evaluation names them."""
    pgd = {f"pgd{n}": dict(name="pgd", steps=n, step_size=step_size) for n in steps}
    return dict(attacks=dict(fgsm=dict(name="fgsm"), **pgd))


def _digits() -> dict[str, Any]:
    """scikit-learn's 8x8 scans, L_inf .15; seconds on a CPU."""
    return dict(
        seed=0,
        dataset=dict(name="digits", validation=200),
        model=dict(name="cnn", width=1.0),
        threat=dict(norm="linf", eps=0.15),
        train=dict(
            length="40e",
            batch_size=64,
            optimizer=dict(name="adam", lr=3e-3, schedule=dict(name="one_cycle")),
            augment="none",
            select="robust",
            validate_every="20%",
            checkpoint_every="20%",
            steps_per_dispatch=100,
            streaming=False,
        ),
        validation=dict(name="pgd", steps=10, step_size=0.04),
        evaluation=_attacks(0.02, 20),
    )


def _mnist() -> dict[str, Any]:
    """MNIST, L_inf .3, the small CNN; minutes on two CPU cores."""
    return dict(
        seed=0,
        dataset=dict(name="mnist", validation=1000),
        model=dict(name="cnn", width=1.0),
        threat=dict(norm="linf", eps=0.3),
        train=dict(
            length="12e",
            batch_size=64,
            optimizer=dict(name="adam", lr=5e-3, schedule=dict(name="one_cycle")),
            augment="none",
            select="robust",
            validate_every="1e",
            checkpoint_every="1e",
            steps_per_dispatch=400,
            streaming=False,
        ),
        validation=dict(name="pgd", steps=20, step_size=0.03),
        evaluation=_attacks(0.02, 10, 40),
    )


def _fashion_mnist() -> dict[str, Any]:
    """Fashion-MNIST, L_inf .1, otherwise as MNIST."""
    recipe = _mnist()
    recipe["dataset"]["name"] = "fashion_mnist"
    recipe["threat"]["eps"] = 0.1
    recipe["validation"]["step_size"] = 0.01
    recipe["evaluation"] = _attacks(0.01, 10, 40)
    return recipe


def _cifar10() -> dict[str, Any]:
    """CIFAR-10, L_inf 8/255, ResNet-18, about 30 epochs of one cycle; an accelerator's work."""
    return dict(
        seed=0,
        dataset=dict(name="cifar10", validation=1000),
        model=dict(name="resnet", depth=18, width=64, dtype="float32"),
        threat=dict(norm="linf", eps=8 / 255),
        train=dict(
            length="30e",
            batch_size=128,
            optimizer=dict(
                name="sgd",
                lr=0.2,
                momentum=0.9,
                weight_decay=5e-4,
                schedule=dict(name="one_cycle", shape="linear", peak="40%"),
            ),
            augment="crop_flip",
            select="robust",
            validate_every="1e",
            checkpoint_every="1e",
            steps_per_dispatch=50,
            streaming=False,
        ),
        validation=dict(name="pgd", steps=10, step_size=2 / 255),
        evaluation=_attacks(2 / 255, 10, 20),
    )


def _cifar100() -> dict[str, Any]:
    """CIFAR-100, otherwise as CIFAR-10."""
    recipe = _cifar10()
    recipe["dataset"]["name"] = "cifar100"
    return recipe


# The reduced recipe: CIFAR-10 and CIFAR-100 on two CPU cores, minutes a row. All training images
# but the held-out ones, and one network, length and attack for every system: the candidate of
# `experiments/study.py --choose` with the shortest AutoAttack at which PGD-AT keeps 45 % clean and
# 24 % under AA-fast.
REDUCED_MODEL = dict(name="vgg", width=8, dtype="float32")
REDUCED_EPOCHS = 10
REDUCED_ATTACK = dict(steps=2, step_size=6 / 255)
REDUCED_TRAIN = dict(batch_size=128, lr=0.2)


def _reduce(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of CIFAR with the reduced network and length."""
    recipe["model"] = dict(REDUCED_MODEL)
    recipe["train"].update(
        length=f"{REDUCED_EPOCHS}e", batch_size=REDUCED_TRAIN["batch_size"], validate_every="50%"
    )
    recipe["train"]["optimizer"]["lr"] = REDUCED_TRAIN["lr"]
    recipe["train"]["checkpoint_every"] = "10%"
    return recipe


def _cifar10_cpu() -> dict[str, Any]:
    """CIFAR-10 *reduced*: a narrow VGG, ten epochs, an attack of two steps; CPU minutes."""
    return _reduce(_cifar10())


def _cifar100_cpu() -> dict[str, Any]:
    """CIFAR-100 *reduced*, as CIFAR-10."""
    return _reduce(_cifar100())


def reduced(section: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A defence's section on CIFAR with the reduced recipe's attack, where it crafts with steps.

    Args:
      section: of the full recipe.
      **changes: what else differs.
    """
    attack = REDUCED_ATTACK if "steps" in section else {}
    return {**section, **attack, **changes}


def strengthened(section: Mapping[str, Any], row: str) -> dict[str, dict[str, Any]]:
    """Further rows of a robust defence: ROW_awp and ROW_ema, weight perturbation and averaging.

    Args:
      section: of the row.
      row: e.g. "cifar10_cpu".
    """
    transforms = dict(
        awp=dict(weight_perturbation=dict(gamma=5e-3, warmup_epochs=REDUCED_EPOCHS / 3)),
        ema=dict(ema=dict(decay=0.99)),  # a mean over a hundred steps: the runs are short
    )
    return {
        f"{row}_{name}": {**section, "transforms": transform}
        for name, transform in transforms.items()
    }


def _svhn() -> dict[str, Any]:
    """SVHN, cropped (32x32x3), L_inf 8/255, otherwise as CIFAR-10 but for flips: digits have none.

    A tenth of CIFAR-10's learning rate, and defences ramp eps up: adversarial training on SVHN is
    known to stay at chance otherwise. Both are ours.
    """
    recipe = _cifar10()
    recipe["dataset"]["name"] = "svhn_cropped"
    recipe["train"]["augment"] = "crop"
    recipe["train"]["optimizer"]["lr"] = 0.02
    return recipe


def _imagenette() -> dict[str, Any]:
    """ImageNette in 160x160 pixels, L_inf 4/255 (ours: ImageNet's usual eps), ResNet-18.

    The network has no pooling before its blocks: an image costs 25 times one of CIFAR-10.
    """
    recipe = _cifar10()
    recipe["dataset"] = dict(name="imagenette/160px-v2", size=160, validation=500)
    recipe["threat"]["eps"] = 4 / 255
    recipe["train"]["batch_size"] = 64
    recipe["validation"]["step_size"] = 1 / 255
    recipe["evaluation"] = dict(_attacks(1 / 255, 10, 20), batch_size=100)
    return recipe


def _tiny_imagenet() -> dict[str, Any]:
    """Tiny-ImageNet, 64x64, 200 classes, L_inf 4/255 (ours), otherwise as CIFAR-10."""
    recipe = _cifar10()
    recipe["dataset"] = dict(name="tiny_imagenet", validation=2000)
    recipe["threat"]["eps"] = 4 / 255
    recipe["validation"]["step_size"] = 1 / 255
    recipe["evaluation"] = _attacks(1 / 255, 10, 20)
    return recipe


def _own_images(name: str, **keys: Any) -> dict[str, Any]:
    """Images of the user's, otherwise as CIFAR-10: eps, network and length are theirs to choose."""
    recipe = _cifar10()
    held_out = dict(test=placeholder(object), validation=placeholder(object))
    recipe["dataset"] = dict(name=name, **keys, **held_out)
    return recipe


def _folder() -> dict[str, Any]:
    """A folder of images: --config.dataset.folder=PATH, and .size where they differ in size."""
    return _own_images("folder", folder=placeholder(str), size=placeholder(object))


def _arrays() -> dict[str, Any]:
    """An .npz file of arrays: --config.dataset.file=PATH."""
    return _own_images("arrays", file=placeholder(str), num_classes=placeholder(object))


_RECIPES = {
    "arrays": _arrays,
    "cifar10": _cifar10,
    "cifar10_cpu": _cifar10_cpu,
    "cifar100": _cifar100,
    "cifar100_cpu": _cifar100_cpu,
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "folder": _folder,
    "imagenette": _imagenette,
    "mnist": _mnist,
    "svhn": _svhn,
    "tiny_imagenet": _tiny_imagenet,
}

# The attack of adversarial training on the recipes that came later, for defences that have them.
MORE = {
    "svhn": dict(steps=10, step_size=2 / 255, ramp_epochs=5.0),
    "imagenette": dict(steps=10, step_size=1 / 255, ramp_epochs=0.0),
    "tiny_imagenet": dict(steps=10, step_size=1 / 255, ramp_epochs=0.0),
    "folder": dict(steps=10, step_size=2 / 255, ramp_epochs=0.0),
    "arrays": dict(steps=10, step_size=2 / 255, ramp_epochs=0.0),
}

# A network's width in debug variants; 8 for those that count channels.
_NARROW = {"cnn": 0.5, "lenet": 1.0, "mobilenet": 0.125, "wide_resnet": 1}

Sections = Mapping[str, Mapping[str, Any]]


def _shrink(config: ConfigDict) -> None:
    """The same run in seconds."""
    config.train.update(
        length="6s", batch_size=16, steps_per_dispatch=3, validate_every="3s", checkpoint_every="3s"
    )
    config.dataset.update(validation=32, limit=256)
    config.model.width = _NARROW.get(config.model.name, 8)
    config.evaluation.batch_size = 64
    config.evaluation.audit = dict(steps=2, restarts=1, stages=["apgd-ce"], queries=4)
    if "steps" in config.defense:
        config.defense.steps = 2


def variants(defense: Mapping[str, Any]) -> list[str]:
    """Every variant of a config that has these defence sections."""
    return [name + suffix for name in defense for suffix in ("", "_debug")]


def make(
    name: str,
    variant: str | None,
    defense: Sections,
    overrides: Mapping[str, Sections] | None = None,
    **train: Any,
) -> ConfigDict:
    """The locked config of one row.

    Args:
      name: of the defence's config, the first half of the row's name.
      variant: one of `variants(defense)`; "debug" is digits_debug, none is digits.
      defense: {row: the config's "defense" section}; a row is a data set's name or begins with
        one and an underscore.
      overrides: {row or "debug": {section: {key: value}}}, what differs from the data set's
        recipe; "debug" is for every debug variant, after all else.
      **train: what the defence changes in "train" of every row.

    Raises:
      ValueError: unknown variant.
    """
    variant = {"debug": "digits_debug", None: "digits", "": "digits"}.get(variant, variant)
    if variant not in variants(defense):
        registry.raise_unknown(f"variant of config {name}", variant, variants(defense))
    row = variant.removesuffix("_debug")
    dataset = max((d for d in _RECIPES if f"{row}_".startswith(f"{d}_")), key=len)
    config = ConfigDict(_RECIPES[dataset](), convert_dict=True)
    config.name = f"{name}-{variant}".replace("_debug", "-debug")
    config.defense = ConfigDict(dict(defense[row]))
    config.train.update(train)
    overrides = overrides or {}
    _override(config, overrides.get(row, {}))
    if variant != row:
        _shrink(config)
        _override(config, overrides.get("debug", {}))
    return config.lock()


def _override(config: ConfigDict, sections: Sections) -> None:
    """Merges sections key by key; another model or optimiser replaces the whole section."""
    for section, values in sections.items():
        if section not in config or (section == "model" and "name" in values):
            config[section] = ConfigDict(dict(values))
            continue
        values = dict(values)
        if "optimizer" in values:
            config[section].optimizer = ConfigDict(values.pop("optimizer"))
        config[section].update(values)
