"""The programs that users run on an accelerator, made for devices that are not there.

A program is the pmapped step of a defence's phase, or an attack as `Evaluator` dispatches it, with
the shapes of its arguments: nothing is initialised, no image is read.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import configs
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from accelerators import folding
from jaxdefense import attacks, models, runs, threat
from jaxdefense.attacks import ensemble
from jaxdefense.data import Arrays, OnDevice, make_augment
from jaxdefense.data.pipeline import to_float
from jaxdefense.defenses.base import AXIS
from jaxdefense.evaluation.crafting import AttackProgram
from jaxdefense.evaluation.evaluator import attack_keys
from jaxdefense.runs import sources
from jaxdefense.train import plan
from jaxdefense.train.step import State, compile_steps, make_step, metric_shapes
from jaxdefense.types import PyTree

# (height, width, channels), classes, training images, test images
DATASETS = {
    "cifar10": ((32, 32, 3), 10, 50_000, 10_000),
    "cifar100": ((32, 32, 3), 100, 50_000, 10_000),
}
LINF, L2 = threat.Linf(8 / 255), threat.L2(0.5)  # of the attacks
FOLDED = "pgd10 folded"  # the attack of folding.py on its folded network
_EXAMPLES = "examples"


@dataclasses.dataclass(frozen=True)
class Program:
    """A function for one device, and how it is mapped over several.

    Attributes:
      name: of the phase, or of the attack.
      times: how often a run executes it: a phase's steps, or an attack's batches.
      images: that all devices together see each time.
      body: the function of one device whose cost is counted, once for each of `times`.
      inputs: shapes of `body`'s arguments.
      mapped: the jitted function over all devices, which is compiled.
      arguments: shapes of `mapped`'s arguments.
      axis: (name, size) of the mapped axis in which `body` may average.
      rounds: the most turns of a loop of `body` that no number in the program bounds: an attack's
        runs, which a batch takes up one after another.
    """

    name: str
    times: int
    images: int
    body: Callable[..., Any]
    inputs: tuple[Any, ...]
    mapped: Any
    arguments: tuple[Any, ...]
    axis: tuple[str, int]
    rounds: int = 1


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced inside is what the library traces where this is the default backend.

    Args:
      platform: "tpu", "cuda" ("gpu" to JAX) or "cpu".
    """
    name = {"cuda": "gpu"}.get(platform, platform)
    with mock.patch.object(jax, "default_backend", return_value=name):
        yield


def load_config(row: str, dtype: str, overrides: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The plain config of NAME:VARIANT, its classifier computing in `dtype`.

    Args:
      row: NAME:VARIANT.
      dtype: "float32" or "bfloat16".
      overrides: of the section "model", e.g. {"width": 8}.
    """
    config = configs.load(*row.split(":")).copy_and_resolve_references().to_dict()
    config["model"] |= {**overrides, "dtype": dtype}
    return config


def build_run(config: Mapping[str, Any], folder: pathlib.Path) -> runs.Run:
    """The run of a config on blank images of its data set's size; its teachers' weights are zeros.

    Args:
      config: of `load_config`.
      folder: where the teachers' files are written.
    """
    config = dict(config)
    section = config.pop("dataset")
    shape, classes, train, test = DATASETS[section["name"]]
    held_out = section["validation"]
    sizes = (train - held_out, held_out, test)
    splits = tuple(_blank_images(section["name"], n, shape, classes) for n in sizes)
    for path, spec in sources.find_sources(config["defense"]).items():
        name, _, variant = pathlib.PurePath(spec["workdir"]).name.partition("-")
        file = folder / f"{name}-{variant}.safetensors"
        model = dict(load_config(f"{name}:{variant}", "float32")["model"])
        if "width" in config["model"] and config["model"].get("name") == model["name"]:
            model["width"] = config["model"]["width"]
        _save_blank(file, models.make(model.pop("name"), classes, **model), shape)
        config["defense"] = sources.replace_option(config["defense"], path, {"file": str(file)})
    return runs.build(config, data=splits)


def _blank_images(name: str, n: int, shape: tuple[int, ...], classes: int) -> Arrays:
    labels = np.arange(n, dtype=np.int32) % classes
    images = np.broadcast_to(np.zeros(shape, np.uint8), (n, *shape))
    names = tuple(map(str, range(classes)))
    return Arrays(images, labels, np.arange(n, dtype=np.int32), classes, name, names)


def _save_blank(path: pathlib.Path, module: Any, shape: tuple[int, ...]) -> None:
    """Writes a network whose weights are all zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    blank = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(shapes))
    models.save(path, module, blank, {"image_shape": list(shape)})


def training(run: runs.Run, devices: Sequence[Any], *, platform: str = "tpu") -> Iterator[Program]:
    """The program of each phase of a run's recipe.

    Args:
      run: of `build_run`.
      devices: that share a batch.
      platform: that is traced for.
    """
    options, arrays, count = run.train, run.arrays("train"), len(devices)
    per_epoch = len(arrays) // options["batch_size"]
    segments = plan.make(
        run.defense.phases, options["optimizer"], length=options["length"], per_epoch=per_epoch
    )
    example = to_float(arrays.images[:1])
    params, carry = jax.eval_shape(lambda: run.init(example))
    resident = {"image": arrays.images, "label": arrays.labels, "id": arrays.ids}
    resident = _shapes(resident)
    share = options["batch_size"] // count
    rows = jax.ShapeDtypeStruct((share,), np.int32)
    gather = functools.partial(OnDevice.gather, None)
    augment = make_augment(options["augment"])
    opt: dict[str, PyTree] = {}
    programs: dict[Any, Program] = {}
    for segment in segments:
        built = segment.build()
        for role in segment.fresh:
            opt[role] = jax.eval_shape(built[role].init, params[role])
        name = (segment.phase, tuple(sorted(segment.optimizers.items())))
        if name in programs:
            times = programs[name].times + segment.end - segment.start
            programs[name] = dataclasses.replace(programs[name], times=times)
            continue
        state = State(jax.ShapeDtypeStruct((), np.int32), params, carry, dict(opt))
        step = make_step(
            segment.phase,
            built,
            segment.phase.view or (lambda key, x: {"image": augment(key, x)}),
            seed=run.seed,
            per_epoch=per_epoch,
            frozen=tuple(options["frozen"]),
        )
        items = jax.ShapeDtypeStruct((options["steps_per_dispatch"], share), np.int32)
        mapped = compile_steps(step, gather, devices=devices)
        mine = _with_axis((state, resident, items), count)
        sums = metric_shapes(step, gather, *mine)
        programs[name] = Program(
            name=segment.phase.name,
            times=segment.end - segment.start,
            images=options["batch_size"],
            body=functools.partial(_one_step, step, gather),
            inputs=(state, resident, rows),
            mapped=mapped,
            arguments=(*mine, jax.ShapeDtypeStruct((), np.int32), sums),
            axis=(AXIS, count),
        )
    yield from programs.values()


def _one_step(step: Any, gather: Any, state: State, resident: PyTree, rows: Any) -> Any:
    return step(state, gather(resident, rows))


def judging(
    run: runs.Run,
    name: str,
    attack: Any,
    devices: Sequence[Any],
    *,
    batch_size: int,
    rounds: int = 1,
) -> Program:
    """An attack on a run's deployed classifier, as `Evaluator` dispatches it.

    Args:
      run: of `build_run`.
      name: of the attack.
      attack: a `Method`.
      devices: that share a batch.
      batch_size: images at once, over all devices.
      rounds: see `Program`.
    """
    test = run.arrays("test")
    params, carry = jax.eval_shape(lambda: run.init(to_float(test.images[:1])))
    variables: PyTree = {"params": params, "carry": carry}
    apply = run.apply(run.defense.primary)
    if name == FOLDED:
        variables = jax.eval_shape(folding.fold, params["classifier"], carry["classifier"])
        apply = folding.apply_folded
    program = AttackProgram(name, attack, apply, attack.threat, None, with_margin=False)
    mesh = Mesh(np.asarray(devices), (_EXAMPLES,))
    whole, split = PartitionSpec(), PartitionSpec(_EXAMPLES)
    keys = jax.eval_shape(lambda: jax.random.key_data(attack_keys(0, name, np.arange(2))))
    rows = (
        jax.ShapeDtypeStruct((batch_size, *keys.shape[1:]), keys.dtype),
        jax.ShapeDtypeStruct((batch_size, *test.images.shape[1:]), np.float32),
        jax.ShapeDtypeStruct((batch_size,), np.int32),
        jax.ShapeDtypeStruct((batch_size,), np.float32),
    )
    mapped = jax.jit(
        jax.shard_map(
            program,
            mesh=mesh,
            in_specs=(whole, *(split for _ in rows)),
            out_specs=split,
            check_vma=False,
        )
    )

    def placed(spec: PartitionSpec, tree: PyTree) -> PyTree:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    share = batch_size // len(devices)
    own = tuple(jax.ShapeDtypeStruct((share, *s.shape[1:]), s.dtype) for s in rows)
    return Program(
        name=name,
        times=-(-len(test) // batch_size),
        images=batch_size,
        body=program,
        inputs=(variables, *own),
        mapped=mapped,
        arguments=(placed(whole, variables), *placed(split, rows)),
        axis=(_EXAMPLES, len(devices)),
        rounds=rounds,
    )


def attack_rows() -> dict[str, tuple[Any, int]]:
    """{name: (attack, rounds)} of AutoAttack's stages, and of every other attack.

    Of L_inf 8/255, and of L2 .5 the attacks that look for the smallest norm.
    """
    found = {}
    for version in ("standard", "fast"):
        for stage in ensemble.stages(LINF, version):
            name = "autoattack " + ("fast " if version == "fast" else "") + stage.name
            options = stage.attack.options
            found[name] = (stage.attack, options.get("targets", 1) * options.get("restarts", 1))
    for name in attacks.names():
        if name in ("autoattack", "apgd", "apgd_targeted", "fab", "fab_targeted", "square"):
            continue  # a stage above
        minimal = name in ("cw", "ddn", "deepfool", "fmn")
        steps = {"steps": 20} if name in ("pgd", "bim", "mi_fgsm") else {}
        found[name] = (attacks.make(name, L2 if minimal else LINF, **steps), 1)
    # The gain of a folded BatchNorm: no user runs it.
    return found | {"pgd10": (folding.pgd10(), 1), FOLDED: (folding.pgd10(), 1)}


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _with_axis(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), tree)
