"""How a config becomes a run: `build` checks it and makes its data, model, defence and attacks.

`restore` does so from a workdir, and adds the weights of a checkpoint. The sections of a config:

{"seed": 0,
 "name":     "pgd_at-mnist",
 "dataset":  {"name": "mnist", "validation": 2000},
 "model":    {"name": "cnn", "width": 1.0},
 "threat":   {"norm": "linf", "eps": 0.3},
 "defense":  {"name": "pgd_at", "steps": 7, "transforms": {...}},
 "train":    {"length": "10e", "batch_size": 128, "optimizer": {...}, "augment": "none",
              "select": "robust", "validate_every": "1e", "checkpoint_every": "1e", ...},
 "validation": {"name": "pgd", "steps": 10, ...},
 "evaluation": {"batch_size": 500, "attacks": {"pgd40": {"name": "pgd", "steps": 40}}},
 "reported": {"pgd40": {"value": 93.2, "status": "FOUND"}}}

`data.load_section` reads the section "dataset": a set of TFDS, a folder of images or a file of
arrays. Wherever an option of the defence (of a part, of a transform) is {"workdir": ...,
"checkpoint": "best"} or {"file": ...}, the classifier of that trained run is meant: the defence is
given a `base.Trained`.

A network that is given as an argument in place of the section "model", or images in place of
"dataset", are named there by `own_model` and `own_data`: {"name": "own", ...}. A config cannot
rebuild them, so they must be given again.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import attacks, defenses, distributed, files, models, registry, threat, validate
from jaxdefense.attacks import checks
from jaxdefense.data import Arrays, load_section, to_float
from jaxdefense.defenses import base
from jaxdefense.models import adapt, zoo
from jaxdefense.runs import checkpoint, config_file, sources
from jaxdefense.runs.sources import Source
from jaxdefense.types import Attack, HostArray, Images, Logits, PyTree, Threat

# What `train` may hold, and its value where a config leaves it out.
TRAIN_DEFAULTS: dict[str, Any] = {
    "length": "1e",
    "batch_size": 128,
    "optimizer": None,
    "augment": "none",
    "select": "robust",
    "select_with": {},
    "validate_every": "1e",
    "checkpoint_every": "1e",
    "steps_per_dispatch": 50,
    "streaming": False,
    "init_from": None,
    "frozen": (),
}
_TRAIN_TYPES = {
    "batch_size": int,
    "augment": str,
    "steps_per_dispatch": int,
    "streaming": bool,
    "init_from": Mapping | None,
    "optimizer": Mapping,
    "select_with": Mapping,
}
# The section "evaluation".
_EVALUATION = {"attacks": Mapping, "audit": Mapping, "batch_size": int | None}
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
    """What a config describes, built; nothing is trained or compiled yet.

    Attributes:
      config: plain values, as given.
      seed: of parameters, data order, attacks.
      threat: of training and evaluation.
      module: the classifier's network.
      defense: its phases, losses and predictors.
      train: the section "train" with its defaults.
      validation: the attack on the validation split.
      attacks: the evaluation's attacks by name.
      sources: the trained runs that the section "defense" names, by the option's path with dots.
      second_attack: `train.select_with`, which chooses `best` among the best few checkpoints; None
        where the validation attack alone does.
      splits: {"train", "validation", "test"} of images that were given; empty where the config's
        section "dataset" says what they are.
    """

    config: dict[str, Any]
    seed: int
    threat: Threat
    module: Any
    defense: defenses.Defense
    train: dict[str, Any]
    validation: Attack
    attacks: dict[str, Attack]
    sources: dict[str, Source]
    second_attack: Attack | None = None
    splits: Mapping[str, Arrays] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row's name in tables: the config's "name", or its defence and data set."""
        dataset = self.config["dataset"].get("name", "folder")
        default = f"{self.config['defense']['name']}-{dataset}"
        return self.config.get("name", default)

    def arrays(self, split: str) -> Arrays:
        """A split of the run's data set.

        Args:
          split: 'train', 'validation' or 'test'.

        Raises:
          ValueError: another process has others.
        """
        arrays = self.splits[split] if self.splits else load_section(self.config["dataset"], split)
        images = [arrays.images] if isinstance(arrays.images, np.ndarray) else []  # not on disk
        distributed.check_same(f"images of {arrays.name}", arrays.labels, arrays.ids, *images)
        return arrays

    def judging_batch(self, shape: tuple[int, ...]) -> int:
        """The most images judged at once: 512 up to 64x64 pixels, as many pixels of larger ones.

        Args:
          shape: of the images, (N, H, W, C).
        """
        pixels = shape[1] * shape[2]
        if pixels <= 64 * 64:
            return 512
        asked = self.config["evaluation"].get("batch_size") or 512
        return min(asked, max(8, 512 * 64 * 64 // pixels))

    def apply(self, predictor: str) -> Any:
        """A predictor as a function of its weights: (variables, images) -> logits.

        variables is {"params": params, "carry": carry}.

        Args:
          predictor: one of `defense.predictors`.
        """

        def apply(variables: PyTree, images: Images) -> Logits:
            make = self.defense.predictors[predictor]
            return make(variables["params"], variables["carry"])(images)

        return apply

    def init(self, images: HostArray) -> tuple[PyTree, PyTree]:
        """Initial (params, carry), from the run's seed.

        Args:
          images: (N, H, W, C), of which one is used for its shape.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), 0x1217)
        return self.defense.init(key, jnp.asarray(images[:1], jnp.float32))


def _section(config: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        given = {"model": "model=", "dataset": "data="}.get(where + name, "")
        hint = f"; a run on what `train({given}...)` was given needs it again" if given else ""
        raise ValueError(f"the config needs a section {where + name!r}, got {section!r}{hint}")
    return dict(section)


def _make_threat(options: Mapping[str, Any]) -> Threat:
    known = inspect.signature(threat.make).parameters
    registry.check_known("option of threat", options, known)
    validate.check_types("threat", options, {"norm": str, "eps": float, "bounds": Sequence})
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"the config's threat needs {name!r}, got {dict(options)}")
    return threat.make(**options)


def _load_source(option: str, source: Source, arrays: Arrays) -> base.Trained:
    """The network of a source, if it fits the run's data."""
    refused = f"defense.{option} ({source}) cannot be used"
    try:
        network, name = _read_source(source)
        if name not in (None, arrays.name):
            raise ValueError(f"it was trained on {name}, and this run is of {arrays.name}")
        variables = {"params": network.params, "batch_stats": network.batch_stats}
        image = jax.ShapeDtypeStruct((1, *arrays.images.shape[1:]), jnp.float32)
        logits = jax.eval_shape(network.module.apply, variables, image)
        if logits.shape != (1, arrays.num_classes):
            raise ValueError(f"it has {logits.shape[-1]} classes, not {arrays.num_classes}")
    except (ValueError, TypeError, flax.errors.FlaxError) as error:
        way = _replace_source(option, source, isinstance(error, checkpoint.Damaged))
        raise ValueError(f"{refused}: {error}{way}") from error
    return network


def _replace_source(option: str, source: Source, damaged: bool) -> str:
    """What can take the place of a source that cannot be used: its original, or its other
    checkpoint where one is damaged."""
    if source.original is not None:
        try:
            _read_source(Source(source.original, source.checkpoint))
        except ValueError:
            return ""
        return f"; remove {source.path}, and {source.original} is copied again"
    other = checkpoint.find_other(source.path, source.checkpoint) if damaged else None
    if other is None:
        return ""
    return f"; its checkpoint of step {other[1]} is whole: defense.{option}.checkpoint={other[0]}"


def _read_source(source: Source) -> tuple[base.Trained, str | None]:
    """The classifier of a source and the name of the data set that it was trained on, if known."""
    if (
        distributed.from_writer(source.path.is_file)
        and zoo.read(source.path)[1]["holds"] == "classifier"
    ):
        module, variables, meta = models.load(source.path)
        network = base.Trained(
            module, variables["params"], variables.get("batch_stats", {}), str(source)
        )
        return network, meta.get("config", {}).get("dataset", {}).get("name")
    if source.path.is_dir():
        run, model, _ = _restore_workdir(source.path, source.checkpoint)
    else:
        run, model, _ = restore(source.path)
    params, carry = run.defense.deployed(model["params"], model["carry"])
    if "classifier" not in params:
        raise ValueError(f"it has no network called classifier, only {sorted(params)}")
    network = base.Trained(run.module, params["classifier"], carry["classifier"], str(source))
    return network, run.arrays("validation").name


def load_classifier(workdir: str | os.PathLike, *, kind: str = "best") -> base.Trained:
    """The classifier of a trained run, as defences take it as an argument, e.g. as a teacher.

    Args:
      workdir: of the run, or a file of `models.save` or `export`.
      kind: of checkpoint, "best" or "last", in a workdir.

    Returns:
      The network in the role `classifier`, its running averages where the run deploys those.

    Raises:
      ValueError: no run there, no checkpoint, a damaged one, or no such network.
    """
    source = Source(pathlib.Path(workdir), kind)
    try:
        return _read_source(source)[0]
    except checkpoint.Damaged as error:
        raise ValueError(f"{error}; {_offer_other(source.path, kind)}") from error


OWN = "own"
_ASKED = 4  # images that a network of the user's is tried on
_SAMPLED = 256  # images of a split that its checksum reads


def own_model(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The config of a run on a network of the user's.

    Args:
      config: plain values; its section "model" is left out, or names the same network.
      model: as in `models.adapt`.

    Raises:
      ValueError: the section "model" names another network.
    """
    section = {"name": OWN, "type": adapt.describe(model)}
    named = config.get("model", section)
    if named.get("name") == OWN and named != section:
        raise ValueError(
            f"the run was trained on {named.get('type')}, and model= is {section['type']}: "
            f"give the same network"
        )
    if named != section:
        raise ValueError(
            f"the config's model is {dict(named)}, and another one was given as model=: "
            f"{section['type']}; leave one of them out"
        )
    return {**config, "model": section}


def own_data(config: Mapping[str, Any], splits: Sequence[Arrays]) -> dict[str, Any]:
    """The config of a run on images of the user's.

    Args:
      config: plain values; its section "dataset" is left out, or names the same images.
      splits: (train, validation, test), as `data.from_arrays` and `data.from_folder` return them.

    Raises:
      ValueError: not three splits, of one shape and as many classes; or the section "dataset" names
        other images.
    """
    given = [type(split).__name__ for split in splits] if isinstance(splits, Sequence) else []
    if given == ["Arrays", "Arrays", "NoneType"]:
        raise ValueError("data has no test images: make it with test=0.2, a share of the images")
    if given != ["Arrays"] * 3:
        raise ValueError(
            "data must be (train, validation, test), as data.from_arrays and data.from_folder "
            f"return them, got {type(splits).__name__} of {given}"
        )
    kinds = {(*split.images.shape[1:], split.num_classes) for split in splits}
    if len(kinds) > 1:
        raise ValueError(f"data's splits differ in height, width, channels or classes: {kinds}")
    digest = hashlib.sha256()
    for split in splits:
        digest.update(np.ascontiguousarray(split.labels).tobytes())
        some = np.unique(np.linspace(0, len(split) - 1, min(len(split), _SAMPLED)).astype(int))
        digest.update(np.ascontiguousarray(split.images[some]).tobytes())
    section = {
        "name": OWN,
        "of": splits[0].name,
        "sizes": [len(split) for split in splits],
        "shape": list(splits[0].images.shape[1:]),
        "sha256": digest.hexdigest()[:16],
    }
    named = config.get("dataset", section)
    if named.get("name") == OWN and named != section:
        differ = sorted(key for key in section if named.get(key) != section[key])
        raise ValueError(
            f"data= is not what the run was trained on, {named.get('of')} of {named.get('sizes')} "
            f"images: it differs in {', '.join(differ)}"
        )
    if named != section:
        raise ValueError(
            f"the config's dataset is {dict(named)}, and another one was given as data=: "
            f"{section}; leave one of them out"
        )
    return {**config, "dataset": section}


def _check_given(config: Mapping[str, Any], **given: Any) -> None:
    """Refuses a config whose own network or images are not given.

    Args:
      config: of the run.
      **given: the arguments, None where there is none: model, data.

    Raises:
      ValueError: what is missing is named, with what the config knows of it.
    """
    missing = {}
    for argument, section in (("model", "model"), ("data", "dataset")):
        known = config.get(section)
        if isinstance(known, Mapping) and known.get("name") == OWN and given[argument] is None:
            missing[f"{argument}="] = known.get("type") or f"images {known.get('sizes')}"
    if missing:
        raise ValueError(
            f"the run is of its user's {' and '.join(missing.values())}, which config.json cannot "
            f"rebuild, and a script cannot judge: give runs.restore (and train) "
            f"{' and '.join(missing)}, and evaluation.autoattack judges it"
        )


def _make_module(section: dict[str, Any], model: Any, arrays: Arrays) -> Any:
    """The network that a section "model" names, or the user's own."""
    if model is not None:
        return adapt.adapt(model, arrays.images, arrays.num_classes)
    return models.make(section.pop("name", None), arrays.num_classes, **section)


def _check_outputs(module: Any, name: str, images: HostArray) -> None:
    """Refuses a network that ends in a softmax; the first validation would, an epoch later."""
    variables = module.init(jax.random.key(0), jnp.asarray(images[:1]))
    logits = jax.jit(module.apply)(variables, jnp.asarray(images))
    try:
        checks.check_logits(logits, len(images))
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from error


def build(
    config: Mapping[str, Any],
    *,
    workdir: pathlib.Path | None = None,
    model: Any = None,
    data: Sequence[Arrays] | None = None,
) -> Run:
    """Builds the run that a config describes.

    Args:
      config: plain values, see the head of this file.
      workdir: the run's own, where copies of the trained runs that the config names may lie.
      model: a network of the user's own in place of the section "model", as in `models.adapt`.
      data: images of the user's own in place of the section "dataset", as in `own_data`.

    Returns:
      A `Run`. Its data are read when they are asked for; train options that need the data's size
      are checked by `train`.

    Raises:
      ValueError: a missing or unknown section or name, a value out of range, a trained run that is
        not there, is damaged, or is of other data, or a network of the user's that returns
        probabilities.

    >>> from jaxdefense import runs
    >>> config = {
    ...     "dataset": {"name": "digits"},
    ...     "model": {"name": "cnn", "width": 0.25},
    ...     "threat": {"norm": "linf", "eps": 0.1},
    ...     "defense": {"name": "pgd_at", "steps": 2},
    ...     "train": {"optimizer": {"name": "sgd", "lr": 0.1}},
    ...     "validation": {"name": "pgd", "steps": 2},
    ...     "evaluation": {"attacks": {"pgd10": {"name": "pgd", "steps": 10}}},
    ... }
    >>> run = runs.build(config)  # prepares digits where TFDS keeps its data
    >>> run.threat, list(run.defense.predictors), run.train["batch_size"]
    (Linf(eps=0.1, bounds=(0.0, 1.0)), ['classifier'], 128)
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a config must be a mapping of sections, got {config!r}")
    config = _without_numpy(config)
    if model is not None:
        config = own_model(config, model)
    if data is not None:
        config = own_data(config, data)
    _check_given(config, model=model, data=data)
    splits = dict(zip(("train", "validation", "test"), data or (), strict=False))
    registry.check_known("config section", config, _SECTIONS)
    if "name" in config:  # exports and records are called so
        files.check_name("the config's name", config["name"])
    seed = config.get("seed", 0)
    validate.check_seed("seed", seed)
    _check_reported(config.get("reported", {}))
    ball = _make_threat(_section(config, "threat"))
    network = _section(config, "model")
    held_out = splits.get("validation") or load_section(_section(config, "dataset"), "validation")
    module = _make_module(network, model, held_out)
    defense = _section(config, "defense")
    train = _train_options(config)
    evaluation = _section(config, "evaluation")
    registry.check_known("evaluation option", evaluation, _EVALUATION)
    validate.check_types("evaluation", evaluation, _EVALUATION)
    validate.check_positive_numbers("evaluation", evaluation)
    named_attacks = _make_attacks(_section(evaluation, "attacks", "evaluation."), ball)
    validation = _make_attacks({"validation": _section(config, "validation")}, ball)["validation"]
    named_runs = {}
    for path, spec in sources.find_sources(defense).items():
        option = ".".join(path)
        named_runs[option] = sources.locate_source(option, spec, workdir)
        trained = _load_source(option, named_runs[option], held_out)
        defense = sources.replace_option(defense, path, trained)
    if model is not None:
        _check_outputs(module, adapt.describe(model), to_float(held_out.images[:_ASKED]))
    return Run(
        config=dict(config),
        seed=seed,
        threat=ball,
        module=module,
        defense=defenses.make(defense.pop("name", None), module, ball, **defense),
        train=train,
        validation=validation,
        attacks=named_attacks,
        sources=named_runs,
        second_attack=_make_second_attack(train, ball),
        splits=splits,
    )


def _train_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section "train", checked, with its defaults."""
    options = {**TRAIN_DEFAULTS, **_section(config, "train")}
    registry.check_known("train option", options, TRAIN_DEFAULTS)
    if options["select"] not in ("robust", "clean"):
        registry.raise_unknown("train.select", options["select"], ("robust", "clean"))
    validate.check_types("train", options, _TRAIN_TYPES)
    sizes = {name: options[name] for name in ("batch_size", "steps_per_dispatch")}
    validate.check_positive_numbers("train", sizes, most=1_000_000)
    frozen = options["frozen"]
    if not isinstance(frozen, list | tuple) or not all(isinstance(name, str) for name in frozen):
        raise ValueError(f"train.frozen must be a list of names, got {frozen!r}")
    return options


def _make_second_attack(train: Mapping[str, Any], ball: Threat) -> Attack | None:
    """The attack of `train.select_with`, {"name": ..., options, "best_of": 3}; None where empty."""
    spec = train["select_with"]
    if not spec:
        return None
    if train["select"] != "robust":
        raise ValueError(
            f"train.select_with chooses by robust accuracy, and train.select is {train['select']!r}"
        )
    options = {key: value for key, value in spec.items() if key != "best_of"}
    checks.check_count("train.select_with.best_of", best_of(train))
    return _make_attacks({"train.select_with": options}, ball)["train.select_with"]


def best_of(train: Mapping[str, Any]) -> int:
    """How many checkpoints the second attack compares.

    Args:
      train: the section "train" with its defaults.
    """
    return train["select_with"].get("best_of", 3)


def _check_reported(reported: Any) -> None:
    """Checks the section "reported": what a paper says, {attack: {"value": percent, ...}}."""
    validate.check_types("config", {"reported": reported}, {"reported": Mapping})
    for attack, said in reported.items():
        validate.check_types("reported", {attack: said}, {attack: Mapping})
        validate.check_types(f"reported.{attack}", said, {"value": float | None, "status": str})


def _without_numpy(value: Any) -> Any:
    """A config's value with Python's numbers and lists in place of NumPy's, for JSON."""
    if isinstance(value, Mapping):
        return {name: _without_numpy(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_numpy, value))
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _make_attacks(specs: Mapping[str, Mapping[str, Any]], ball: Threat) -> dict[str, Attack]:
    """The attacks that a config specifies as {"name": ..., options}, by the config's names."""
    made: dict[str, Attack] = {}
    for name, spec in specs.items():
        validate.check_types("evaluation.attacks", {name: spec}, {name: Mapping})
        checks.check_attack_name(name)
        options = dict(spec)
        attack = attacks.make(options.pop("name", None), ball, **options)
        if attack.targeted:
            raise ValueError(
                f"{name}: {attack!r} is targeted, and would take the labels for its targets"
            )
        made[name] = attack
    return made


class Restored(NamedTuple):
    """A trained run and the weights of one of its checkpoints.

    Attributes:
      run: what its config describes.
      variables: {"params", "carry"} of a checkpoint.
      meta: the checkpoint's metadata with its "step", and where the workdir holds the run's log,
        the "validation" curve [[epoch, clean, robust]], percent, and the "warnings" of training,
        [{"step", "epoch", "name", "evidence"}].
    """

    run: Run
    variables: dict[str, Any]
    meta: dict[str, Any]


def restore(
    workdir: str | os.PathLike,
    *,
    kind: str = "best",
    model: Any = None,
    data: Sequence[Arrays] | None = None,
) -> Restored:
    """Reads a trained run back from its workdir, or from a file of `export`.

    Of several processes, which all must call, the first reads the workdir and tells the others; a
    file is read by each.

    Args:
      workdir: of a run that has at least one checkpoint, or a file.
      kind: "best" or "last", in a workdir.
      model: the network, if the run was trained on one that was given as an argument.
      data: its images, likewise.

    Returns:
      The run, its variables and the checkpoint's metadata.

    Raises:
      ValueError: no run there, no checkpoint, a damaged one, or an unknown kind.

    >>> run, variables, meta = runs.restore("runs/trades-mnist")  # doctest: +SKIP
    >>> logits = run.apply(run.defense.primary)(variables, images)  # doctest: +SKIP
    """
    if not isinstance(workdir, str | os.PathLike):
        raise ValueError(f"workdir must be the path of a run or a file, got {workdir!r}")
    workdir = pathlib.Path(workdir)
    if distributed.from_writer(workdir.is_file):
        return _restore_file(workdir)
    if workdir.suffix == ".safetensors":
        raise ValueError(f"no such file: {workdir}")
    try:
        return _restore_workdir(workdir, kind, model=model, data=data)
    except checkpoint.Damaged as error:
        raise ValueError(f"{error}; {_offer_other(workdir, kind)}") from error


def _restore_workdir(
    workdir: pathlib.Path, kind: str, *, model: Any = None, data: Sequence[Arrays] | None = None
) -> Restored:
    if kind not in ("best", "last"):
        registry.raise_unknown("kind of checkpoint", kind, ("best", "last"))
    distributed.from_writer(lambda: config_file.check_places(workdir))
    config = distributed.from_writer(lambda: config_file.read(workdir))
    if not distributed.from_writer((workdir / kind).is_dir):
        raise checkpoint.Damaged(f"{workdir} has no checkpoint {kind!r}")
    try:
        run = build(config, workdir=workdir, model=model, data=data)
    except ValueError as error:  # of an edited file, say
        raise ValueError(f"{workdir / config_file.NAME}: {error}") from error
    store = checkpoint.Store(workdir / kind)
    try:
        meta = store.meta()
        for_resumed = ("watch", "kept", "config")
        meta = {k: v for k, v in meta.items() if k not in for_resumed}
        params, carry = jax.eval_shape(run.init, run.arrays("validation").images)
        model = read_model(store, run.defense, params, carry)
    finally:
        store.close()
    meta.pop("unfinished", None)  # what an interrupted run goes on with
    lines = distributed.from_writer(lambda: read_log(workdir / "metrics.jsonl"))
    if warnings := _read_warnings(lines):
        meta["warnings"] = warnings
    curve = _read_validation(lines)
    return Restored(run, model, {**meta, "validation": curve} if curve else meta)


def _offer_other(workdir: pathlib.Path, kind: str) -> str:
    """What can be read in place of a damaged checkpoint."""
    other = checkpoint.find_other(workdir, kind)
    if other is None:
        return "no other checkpoint there is whole: train the run again"
    name, step = other
    return f"the checkpoint {name!r} of step {step} is whole: --checkpoint={name} (kind={name!r})"


_POINTS = 60  # most of a validation curve that are kept: enough for a figure
_VALIDATION = ("epoch", "validation_clean", "validation_robust")


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that is torn (a full disk's, a killed run's) is none.

    Args:
      path: of the log; one that is not there is empty.
    """
    lines = []
    content = path.read_bytes() if path.exists() else b""
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            whole = isinstance(found, dict) and isinstance(found.get("step"), int)
            lines += [found] if whole else []
    return lines


def _read_warnings(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The warnings in a run's log, as `train` returns them."""
    keys = {"step": "step", "epoch": "epoch", "name": "warning", "evidence": "evidence"}
    return [
        {name: line.get(key) for name, key in keys.items()} for line in lines if "warning" in line
    ]


def _read_validation(lines: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The validations in a run's log, thinned evenly where they are many; the last one stays."""
    rows = [[line.get(key) for key in _VALIDATION] for line in lines]
    found = [[v for v in row if isinstance(v, float)] for row in rows]
    curve = [[round(v, 4) for v in row] for row in found if len(row) == len(_VALIDATION)]
    if not curve:
        return []
    kept = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), _POINTS)).round().astype(int))
    return [curve[i] for i in kept]


def export(path: str | os.PathLike, run: Run, variables: PyTree, meta: Mapping[str, Any]) -> None:
    """Writes a trained run to one file, whole or not at all: its config and its weights.

    If the deployed predictor is the classifier alone, `models.load` reads the file too; otherwise
    (a purifier before it, a stack) it holds all networks of the run, which only `restore` reads.

    Args:
      path: of the file, by custom *.safetensors.
      run: what was trained.
      variables: {"params", "carry"}, as `restore` gives them.
      meta: kept as the file's "training": the checkpoint and its metadata.

    Raises:
      ValueError: a system that needs the workdir of another run.

    >>> run, variables, meta = runs.restore("runs/trades-mnist")  # doctest: +SKIP
    >>> runs.export("trades.safetensors", run, variables, meta)  # doctest: +SKIP
    """
    images = run.arrays("validation").images
    kept = {"image_shape": images.shape[1:], "config": run.config, "training": dict(meta)}
    classifier = _lone_classifier(run, variables, to_float(images[:8]))
    if classifier is not None:
        return models.save(path, run.module, classifier, kept)
    if run.sources:
        names = ", ".join(f"defense.{name}" for name in run.sources)
        raise ValueError(f"the run needs those of {names}, which one file cannot hold")
    header = {"holds": "system", "model": zoo.describe(run.module), "meta": kept}
    arrays = {name: variables[name] for name in ("params", "carry")}
    zoo.write(path, zoo.flatten(arrays), header)


def _lone_classifier(run: Run, variables: PyTree, images: HostArray) -> dict[str, PyTree] | None:
    """The classifier's Flax variables, if it alone is the deployed predictor."""
    params, carry = run.defense.deployed(variables["params"], variables["carry"])
    if "classifier" not in params:
        return None
    network = {"params": params["classifier"]}
    if carry["classifier"]:
        network["batch_stats"] = carry["classifier"]
    like = jax.eval_shape(run.module.init, jax.random.key(0), images[:1])
    shapes = ({k: v.shape for k, v in zoo.leaves_by_path(t).items()} for t in (like, network))
    if zoo.compare(*shapes):  # a stack's
        return None
    deployed = run.apply(run.defense.primary)(variables, images)
    alone: Any = run.module.apply(network, images)
    return network if np.allclose(deployed, alone, 1e-4, 1e-4, equal_nan=True) else None


def _restore_file(path: pathlib.Path) -> Restored:
    """What `export` wrote. A lone classifier needs no more of its defence than how it predicts."""
    arrays, header = zoo.read(path)
    meta = header["meta"]
    if "config" not in meta:
        raise ValueError(f"{path} holds a network but no run: it has no config")
    if header["holds"] == "classifier":
        variables = models.load(path).variables
        run = build({**meta["config"], "defense": {"name": "standard"}})
        run = dataclasses.replace(run, config=meta["config"])
        model = {"params": variables["params"], "carry": variables.get("batch_stats", {})}
        return Restored(run, {k: {"classifier": v} for k, v in model.items()}, meta["training"])
    run = build(meta["config"])
    params, carry = jax.eval_shape(run.init, run.arrays("validation").images)
    like = {"params": params, "carry": carry}
    return Restored(run, zoo.unflatten(arrays, like, str(path)), meta["training"])


def read_model(
    store: checkpoint.Store, defense: defenses.Defense, params: PyTree, carry: PyTree
) -> dict[str, PyTree]:
    """The newest checkpoint's variables, with the pretrained networks that it leaves out.

    Args:
      store: of the run's checkpoints.
      defense: the run's.
      params: of the same structure, shapes and dtypes as the checkpoint's.
      carry: likewise.

    Returns:
      {"params", "carry"}.

    Raises:
      ValueError: no checkpoint, a damaged one, or one of another model.
    """
    trained = defense.without_pretrained
    model = store.restore("model", {"params": trained(params), "carry": trained(carry)})
    for role, network in defense.pretrained.items():
        for kind, like, own in zip(
            ("params", "carry"), (params, carry), network.init(role), strict=True
        ):
            # A stack holds it once for each member.
            whole = jax.tree.map(lambda x, y: np.broadcast_to(x, y.shape), own[role], like[role])
            model[kind] = {**model[kind], role: whole}
    return model
