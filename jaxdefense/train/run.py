"""A run built from its config: data, model, defence, attacks. Train and evaluate read the same.

{"seed": 0,
 "dataset":  {"name": "mnist", "validation": 2000},
 "model":    {"name": "cnn", "width": 1.0},
 "threat":   {"norm": "linf", "eps": 0.3},
 "defense":  {"name": "pgd_at", "steps": 7, "transforms": {...}},
 "train":    {"length": "10e", "batch_size": 128, "optimizer": {...}, "augment": "none",
              "select": "robust", "validate_every": "1e", "checkpoint_every": "1e", ...},
 "validation": {"name": "pgd", "steps": 10, ...},
 "evaluation": {"batch_size": 500, "attacks": {"pgd40": {"name": "pgd", "steps": 40}}},
 "reported": {"pgd40": {"value": 93.2, "status": "FOUND"}}}
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import attacks, data, defenses, models, registry, threat
from jaxdefense.types import Attack, Images, Logits, PyTree, Threat

# What `train` may hold, and its value where a config leaves it out.
TRAIN_DEFAULTS: dict[str, Any] = {
    "length": "1e",
    "batch_size": 128,
    "optimizer": None,
    "augment": "none",
    "select": "robust",
    "validate_every": "1e",
    "checkpoint_every": "1e",
    "steps_per_dispatch": 50,
    "streaming": False,
}
_SECTIONS = (
    "seed",
    "name",
    "dataset",
    "model",
    "threat",
    "defense",
    "train",
    "validation",
    "evaluation",
    "reported",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config describes, built; nothing is trained or compiled yet."""

    config: dict[str, Any]
    seed: int
    threat: Threat
    module: nn.Module
    defense: defenses.Defense
    train: dict[str, Any]
    validation: Attack
    attacks: dict[str, Attack]

    def arrays(self, split: str) -> data.Arrays:
        """The data set's train, validation or test split."""
        return _load(self.config["dataset"], split)

    def apply(self, predictor: str) -> Any:
        """(variables, images) -> logits of one of the defence's predictors.

        variables is {"params": params, "carry": carry}.
        """

        def apply(variables: PyTree, images: Images) -> Logits:
            make = self.defense.predictors[predictor]
            return make(variables["params"], variables["carry"])(images)

        return apply

    def init(self, images: Images) -> tuple[PyTree, PyTree]:
        """(params, carry) from the run's seed."""
        key = jax.random.fold_in(jax.random.key(self.seed), 0x1217)
        return self.defense.init(key, jnp.asarray(images[:1], jnp.float32))


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"the config needs a section {name!r}, got {section!r}")
    return dict(section)


def _load(dataset: Mapping[str, Any], split: str) -> data.Arrays:
    options = dict(dataset)
    limit = options.pop("limit", None)
    known = [p for p in inspect.signature(data.load).parameters if p != "split"]
    for option in options:
        if option not in known:
            registry.unknown("option of dataset", option, [*known, "limit"])
    return data.load(options.pop("name", None), split, **options).take(slice(limit))


def build(config: Mapping[str, Any]) -> Run:
    """The run of a config of plain values.

    Raises:
      ValueError: a missing or unknown section or name, or a value out of range.
    """
    for name in config:
        if name not in _SECTIONS:
            registry.unknown("config section", name, _SECTIONS)
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    where = threat.make(**_section(config, "threat"))
    model = _section(config, "model")
    held_out = _load(_section(config, "dataset"), "validation")
    module = models.make(model.pop("name", None), held_out.num_classes, **model)
    defense = _section(config, "defense")
    options = {**TRAIN_DEFAULTS, **_section(config, "train")}
    for name in options:
        if name not in TRAIN_DEFAULTS:
            registry.unknown("train option", name, TRAIN_DEFAULTS)
    if options["select"] not in ("robust", "clean"):
        registry.unknown("train.select", options["select"], ("robust", "clean"))
    if not isinstance(options["optimizer"], Mapping):
        raise ValueError("train.optimizer must be a mapping, see jaxdefense.train.optim.make")
    named = {
        name: attacks.make(spec.pop("name", None), where, **spec)
        for name, spec in (
            (name, dict(spec)) for name, spec in _section(config, "evaluation")["attacks"].items()
        )
    }
    validation = _section(config, "validation")
    return Run(
        config=dict(config),
        seed=seed,
        threat=where,
        module=module,
        defense=defenses.make(defense.pop("name", None), module, where, **defense),
        train=options,
        validation=attacks.make(validation.pop("name", None), where, **validation),
        attacks=named,
    )
