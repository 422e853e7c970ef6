"""The recipes that the configs share: one per data set; a defence adds what is its own.

Variants are DATASET or DATASET_debug: `debug` keeps everything but shrinks it to seconds.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxdefense import registry


def _attacks(step_size: float, *steps: int) -> dict[str, Any]:
    """FGSM and PGD of several lengths, as a config's evaluation names them."""
    pgd = {f"pgd{n}": dict(name="pgd", steps=n, step_size=step_size) for n in steps}
    return dict(batch_size=1000, attacks=dict(fgsm=dict(name="fgsm"), **pgd))


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


_RECIPES = {"cifar10": _cifar10, "digits": _digits, "mnist": _mnist}


def _shrink(config: ConfigDict) -> None:
    """The same run in seconds."""
    config.train.update(
        length="6s", batch_size=16, steps_per_dispatch=3, validate_every="3s", checkpoint_every="3s"
    )
    config.dataset.update(validation=32, limit=256)
    config.model.width = {"cnn": 0.5, "lenet": 1.0}.get(config.model.name, 8)
    config.evaluation.batch_size = 64


def names() -> list[str]:
    """Every variant."""
    return sorted(name + suffix for name in _RECIPES for suffix in ("", "_debug"))


def make(name: str, variant: str, defense: Mapping[str, Mapping[str, Any]], **train: Any):
    """The locked config of one row.

    Args:
      name: of the defence's config, the first half of the row's name.
      variant: DATASET or DATASET_debug; "debug" is digits_debug.
      defense: {dataset: the config's "defense" section}.
      **train: what the defence changes in "train".

    Raises:
      ValueError: unknown variant.
    """
    variant = {"debug": "digits_debug", None: "digits", "": "digits"}.get(variant, variant)
    if variant not in names():
        registry.unknown(f"variant of config {name}", variant, names())
    dataset, _, debug = variant.partition("_")
    config = ConfigDict(_RECIPES[dataset](), convert_dict=True)
    config.name = f"{name}-{dataset}" + ("-debug" if debug else "")
    config.defense = ConfigDict(dict(defense[dataset]))
    config.train.update(train)
    if debug:
        _shrink(config)
        if "steps" in config.defense:
            config.defense.steps = 2
    return config.lock()
