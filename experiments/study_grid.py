"""The grid of the study as data: its rows in order of worth, and the minutes that each should take.

Nothing here imports JAX, so that `study.py --list` answers in a second.
"""

import dataclasses
import fnmatch
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import configs

from jaxdefense import registry

GRIDS = ("cpu", "gpu", "full", "debug")

SEVEN = ("m2at", "claf", "csa", "cse", "gssl", "ipg", "add")
BASELINES = ("standard", "pgd_at", "trades", "gssl_baseline")
PURIFIERS = ("ipg", "hgd", "ape_gan", "anti_adversary")
STUDENTS = ("add", "ard", "iad", "adaad")
# What may be a teacher, and what weight perturbation and averaging are tried on: the two best.
ROBUST = ("pgd_at", "trades", "mart", "avmixup", "iat", "m2at", "m2at_shuffle")
TRANSFORMS = ("awp", "ema")

OF_PAPERS = ("cost_sensitive", "literal")  # protocols that are a paper's own: no honest number
EXAMPLES = 1000  # first test images under AutoAttack
EXAMPLES_OF = {"autoattack": EXAMPLES, "audit": 200}  # by protocol; all in the others


@dataclasses.dataclass(frozen=True)
class Row:
    """A run and how it is judged.

    Attributes:
      config: name of a config; empty where the study's own results choose it, see `best`.
      variant: of the config; of a chosen one what stands before the transform's name.
      seed: of the run.
      protocols: of experiments/evaluate.py, in order, or `OF_PAPERS`, scripts of
        experiments/papers.
      checkpoint: that is judged, "best" or "last".
      best: (place, transform): the row is that of the robust config in this place, with it.
      changes: {key of the config: value}, as flags.
    """

    config: str
    variant: str
    seed: int = 0
    protocols: tuple[str, ...] = ("configured", "autoattack")
    checkpoint: str = "best"
    best: tuple[int, str] | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Its name, which no other row has, e.g. "trades-cifar10_cpu-1"."""
        config = f"best{self.best[0]}_{self.best[1]}" if self.best else self.config
        return f"{config}-{self.variant}-{self.seed}"

    @property
    def folder(self) -> str:
        """The folder of its records: its data set, with _cpu for the reduced recipe."""
        names = ("cifar100", "cifar10", "fashion_mnist", "mnist", "digits")
        dataset = next(name for name in names if self.variant.startswith(name))
        return f"{dataset}_cpu" if "_cpu" in self.variant else dataset

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from the best robust row of the same variant and threat."""
        return self.config in STUDENTS and self.variant.startswith(("mnist", "cifar10"))

    def resolved(self, ranking: Sequence[str]) -> "Row":
        """The row with the config that the study's results choose.

        Args:
          ranking: names of the robust configs, the best first; see `rank`.

        Raises:
          ValueError: fewer robust configs than the row's place.
        """
        if self.best is None:
            return self
        place, transform = self.best
        if len(ranking) < place:
            raise ValueError(f"no robust row in place {place}: {len(ranking)} of them are done")
        return dataclasses.replace(
            self, config=ranking[place - 1], variant=f"{self.variant}_{transform}", best=None
        )


def settings(row: Row) -> dict[str, Any]:
    """The plain config of a row whose config is known.

    Args:
      row: resolved.
    """
    return dict(_settings(row))


@functools.cache
def _settings(row: Row) -> dict[str, Any]:
    config = configs.load(row.config, row.variant)
    with config.unlocked():
        config.seed = row.seed
    found = json.loads(config.to_json())
    for key, value in row.changes:
        *path, last = key.split(".")
        section = found
        for part in path:
            section = section[part]
        section[last] = value
    return found


def _protocols(config: str, variant: str) -> tuple[str, ...]:
    """Clean, FGSM and PGD, then AutoAttack; the audit for what cleans images; CLAF's own attack."""
    audited = ["audit"] if config in PURIFIERS else []
    literal = ["literal"] if config == "claf" and variant.startswith(_CPU) else []
    return ("configured", "autoattack", *audited, *literal)


def rows_of(pairs: Iterable[tuple[str, str]], seeds: Iterable[int] = (0,)) -> list[Row]:
    """Rows of (config, variant), seed by seed.

    Args:
      pairs: in order.
      seeds: the first of all pairs, then the second.
    """
    pairs = list(pairs)
    return [Row(c, v, seed, _protocols(c, v)) for seed in seeds for c, v in pairs]


_CPU = "cifar10_cpu"
# The systems with what they are compared with, then their rivals.
_CPU_FIRST = [
    ("pgd_at", _CPU),
    ("standard", _CPU),
    ("trades", _CPU),
    ("m2at", _CPU),
    ("cse", _CPU),
    ("csa", _CPU),
    ("gssl", _CPU),
    ("gssl_baseline", _CPU),
    ("ipg", _CPU),
    ("claf", _CPU),
    ("avmixup", _CPU),
    ("mart", _CPU),
    ("iat", _CPU),
    ("m2at_shuffle", _CPU),
    ("add", _CPU),
]
_CPU_RIVALS = [
    ("m2at", f"{_CPU}_gamma2"),
    ("m2at", f"{_CPU}_onehot"),
    ("fgsm_at", _CPU),
    ("cse_at", _CPU),
    ("ard", _CPU),
    ("supcon", _CPU),
    ("frl", _CPU),
    ("hgd", _CPU),
    ("ipg", f"{_CPU}_phase1"),
    ("rocl", _CPU),
    ("acl", _CPU),
    ("claf", f"{_CPU}_literal"),
    ("zhang_evans", _CPU),
    ("gssl", f"{_CPU}_no_generator"),
    ("gssl", f"{_CPU}_no_gate"),
    ("advprop", _CPU),
    ("ape_gan", _CPU),
    ("anti_adversary", _CPU),
    ("iad", _CPU),
    ("adaad", _CPU),
    ("defensive_distillation", _CPU),
]
_BEST = [Row("", _CPU, best=(place, transform)) for transform in TRANSFORMS for place in (1, 2)]
# With further seeds: the seven systems and what they are compared with.
_SEEDS = [(name, _CPU) for name in (*BASELINES, *SEVEN)]
_MNIST = [
    *("pgd_at", "standard", "trades", "m2at", "csa", "cse", "ipg", "claf", "add"),
    *("fgsm_at", "cse_at", "mart", "avmixup", "iat", "m2at_shuffle", "frl", "zhang_evans"),
    *("supcon", "rocl", "acl", "hgd", "ape_gan", "anti_adversary", "ard", "iad", "adaad"),
    *("defensive_distillation",),
]
_FASHION = (
    *("pgd_at", "standard", "trades", "csa", "cse", "fgsm_at", "cse_at", "frl", "zhang_evans"),
)


def _last(config: str, variant: str, seed: int = 0, **more: Any) -> Row:
    """A row whose last checkpoint is judged, as the papers do."""
    return Row(config, variant, seed, checkpoint="last", **more)


_PAPER_PROTOCOL = ("cost_sensitive", "autoattack")
_COST_SENSITIVE = [
    _last("cse", "fashion_mnist_paper", protocols=_PAPER_PROTOCOL),
    _last("csa", "cifar10_paper", protocols=_PAPER_PROTOCOL),
]
_GSSL_MNIST = [
    _last(name, "mnist_small", seed, protocols=("configured",))
    for seed in range(5)
    for name in ("gssl", "gssl_baseline")
]
_GSSL_CIFAR100 = [
    _last(name, "cifar100_cpu", seed, protocols=("configured",))
    for seed in range(3)
    for name in ("gssl", "gssl_baseline")
]

_GPU_FIRST = (*("pgd_at", "standard", "trades", "m2at", "cse", "csa", "gssl", "gssl_baseline"),)
_GPU = [
    *_GPU_FIRST,
    *("add", "ipg", "claf", "avmixup", "mart", "iat", "m2at_shuffle", "fgsm_at", "cse_at"),
    *("ard", "supcon", "frl", "hgd", "rocl", "acl", "zhang_evans", "advprop", "ape_gan"),
    *("anti_adversary", "iad", "adaad", "defensive_distillation"),
]
_GPU_MORE = [("m2at", "cifar10_gamma2"), ("m2at", "cifar10_onehot")]
_GPU_PAPER = [
    (name, "cifar10_paper")
    for name in ("m2at", "avmixup", "mart", "iat", "gssl", "gssl_baseline", "ipg", "supcon", "claf")
]


def _cpu_rows() -> list[Row]:
    return [
        *rows_of([*_CPU_FIRST, *_CPU_RIVALS]),
        *_COST_SENSITIVE,
        *_BEST,
        *rows_of(_SEEDS, (1, 2)),
        *_GSSL_MNIST,
        *rows_of((name, "mnist") for name in _MNIST),
        *rows_of((name, "fashion_mnist") for name in _FASHION),
        *_GSSL_CIFAR100,
    ]


def _gpu_rows() -> list[Row]:
    return [
        *rows_of((name, "cifar10") for name in _GPU),
        *rows_of(_GPU_MORE),
        *rows_of(((name, "cifar10") for name in (*BASELINES, *SEVEN)), (1, 2)),
        *rows_of(_GPU_PAPER),
    ]


def _debug_rows() -> list[Row]:
    pairs = [(name, "digits_debug") for name in ("pgd_at", "standard", "add")]
    return [Row(*pair, protocols=("configured",)) for pair in pairs]


def matching(what: str, known: Sequence[Any], patterns: Iterable[str]) -> list[Any]:
    """What has a name that one of the patterns fits, in its order.

    Args:
      what: they are, e.g. "candidate", for the error.
      known: things with a `name`.
      patterns: with * and ?.

    Raises:
      ValueError: no pattern, an empty one, or one that fits nothing; the nearest names are told.
    """
    names, patterns = [one.name for one in known], list(patterns)
    if not all(patterns):
        raise ValueError(f"the name of a {what} is empty: {', '.join(map(repr, patterns))}")
    if not patterns:
        raise ValueError(f"no {what} is named")
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            registry.raise_unknown(what, pattern, names)
        chosen.update(found)
    return [one for one in known if one.name in chosen]


def rows(grid: str, patterns: Iterable[str] = ("*",)) -> list[Row]:
    """The rows of a grid in order of worth.

    Args:
      grid: one of `GRIDS`.
      patterns: of the rows' names, with * and ?.

    Raises:
      ValueError: no row has such a name; the nearest are named.
    """
    found = {
        "cpu": _cpu_rows,
        "gpu": _gpu_rows,
        "full": lambda: [*_cpu_rows(), *_gpu_rows()],
        "debug": _debug_rows,
    }[grid]()
    return matching(f"row of the grid {grid}", found, patterns)


def training_words(
    row: Row, workdir: pathlib.Path, teacher: pathlib.Path | None = None
) -> tuple[str, ...]:
    """The command that trains a row: train.py and its arguments.

    Args:
      row: resolved.
      workdir: of the run.
      teacher: workdir of its teacher, where it needs one.
    """
    words = ["train.py", f"--config={row.config}:{row.variant}", f"--workdir={workdir}"]
    words += [f"--config.seed={row.seed}"] if row.seed else []
    words += [f"--config.{key}={value}" for key, value in row.changes]
    words += [f"--config.defense.teacher.workdir={teacher}"] if teacher else []
    return tuple(words)


def judging_words(
    row: Row, protocol: str, workdir: pathlib.Path, record: pathlib.Path
) -> tuple[str, ...]:
    """The command that judges a row by a protocol.

    Args:
      row: resolved.
      protocol: one of the row's.
      workdir: of the run.
      record: to write.
    """
    common = (f"--workdir={workdir}", f"--record={record}", f"--checkpoint={row.checkpoint}")
    if protocol == "cost_sensitive":
        # The paper's PGD on CIFAR-10 was of other networks; its metric I there is of eps .03.
        narrow = ("--eps=.03", "--pgd=false") if row.variant.startswith("cifar10") else ()
        return ("papers/cost_sensitive.py", *common, *narrow, "--progress=false")
    if protocol == "literal":
        return ("papers/claf_literal.py", *common)
    examples = EXAMPLES_OF.get(protocol)
    some = (f"--examples={examples}",) if examples else ()
    return ("evaluate.py", *common, f"--protocol={protocol}", *some)


def rank(accuracies: Mapping[str, float]) -> list[str]:
    """The robust configs of a grid, the best under AutoAttack first.

    Args:
      accuracies: {config: percent under AutoAttack}; others than `ROBUST` are left out.

    >>> rank({"trades": 27.0, "pgd_at": 26.0, "claf": 30.0})
    ['trades', 'pgd_at']
    """
    robust = {name: value for name, value in accuracies.items() if name in ROBUST}
    return sorted(robust, key=robust.__getitem__, reverse=True)


# Expected minutes: passes through the network, of what one costs, at the speed of a machine.

# Multiplications and additions of a forward pass of one image, by network, at its width.
FORWARD = {
    ("cnn", 32): (1.9e6, 1.0),
    ("cnn", 28): (1.4e6, 1.0),
    ("cnn", 8): (0.1e6, 1.0),
    ("lenet", 28): (0.83e6, 1.0),
    ("lenet", 32): (1.3e6, 1.0),
    ("mnist_net", 28): (28e6, 32.0),
    ("resnet", 32): (1.11e9, 64.0),
    ("vgg", 32): (0.31e9, 64.0),
    ("mobilenet", 32): (0.19e9, 1.0),
    ("wide_resnet", 32): (10.5e9, 10.0),
}
IMAGES = {"mnist": 60000, "fashion_mnist": 60000, "digits": 1297}  # of the others 50,000
SIDES = {"mnist": 28, "fashion_mnist": 28, "digits": 8}  # of the others 32
CPU_SPEED = 5e10  # operations a second: measured on two AVX2 cores
# A GPU's are of the operations and bytes that `make tpu-check` found, at the limits of an H100's
# data sheet (TF32 without sparsity); which share of them is reached is a guess until a row is
# measured, then `plan.Clock` scales all.
ACCELERATORS = pathlib.Path(__file__).parent / "records" / "accelerators" / "v5e.json"
GPU_OPERATIONS, GPU_BYTES = 495e12, 3.35e12
GPU_SHARE = 0.2

# Passes through the network for a training image, beside the attack's two a step: forward,
# input gradient and weight gradient are one each.
PASSES = {
    "trades": 6.0,
    "mart": 6.0,
    "frl": 6.0,
    "iat": 6.0,
    "fgsm_at": 8.0,
    "csa": 8.0,
    "supcon": 6.0,
    "claf": 9.0,
    "rocl": 9.0,
    "acl": 6.0,
    "gssl": 8.0,
    "add": 7.0,
    "ipg": 10.0,
    "hgd": 6.0,
    "ape_gan": 6.0,
    "adaad": 7.0,
    "ard": 4.0,
    "iad": 8.0,
}
# Passes of AutoAttack for a test image, by the share that withstands it.
AUTOATTACK = 1e4
AUDIT = 2e4
LITERAL = 512 * 44  # CLAF's own attack and PGD of ten steps, on its images
WITHSTANDS = {"cifar10": 0.25, "cifar100": 0.15, "mnist": 0.85, "fashion_mnist": 0.6}
START = 25.0  # seconds that a process takes to start and compile


def forward_cost(config: Mapping[str, Any]) -> float:
    """Operations of a forward pass of one image through a config's network.

    Args:
      config: plain values.
    """
    model, dataset = config["model"], config["dataset"]["name"]
    cost, width = FORWARD[model["name"], SIDES.get(dataset, 32)]
    return cost * (model.get("width", width) / width) ** 2


def training_passes(config: Mapping[str, Any]) -> float:
    """Passes through the network of a whole training.

    Args:
      config: plain values.
    """
    defense, train = config["defense"], config["train"]
    passes = PASSES.get(defense["name"], 3.0) + 2.0 * defense.get("steps", 0)
    members = defense.get("transforms", {}).get("stacked", {}).get("members", 1)
    length = float(train["length"][:-1])
    if train["length"].endswith("s"):
        return length * train["batch_size"] * passes * members
    return length * IMAGES.get(config["dataset"]["name"], 50000) * passes * members


def expected_seconds(row: Row, machine: str) -> float:
    """The seconds that a row should take, before anything was measured.

    Args:
      row: one whose config the results choose counts as the first robust one.
      machine: "cpu" or "gpu".
    """
    row = row.resolved(ROBUST)
    config = settings(row)
    passes = 0.0
    if "configured" in row.protocols:
        steps = sum(attack.get("steps", 1) for attack in config["evaluation"]["attacks"].values())
        passes += 10000 * (2 * steps + 1)
    share = WITHSTANDS.get(config["dataset"]["name"], 0.25) if _withstands(row) else 0.02
    passes += EXAMPLES * AUTOATTACK * share * ("autoattack" in row.protocols)
    passes += EXAMPLES_OF["audit"] * AUDIT * ("audit" in row.protocols)
    passes += LITERAL * ("literal" in row.protocols)
    training, judging = CPU_SPEED, CPU_SPEED
    if machine == "gpu":
        training, judging = gpu_speed(f"{row.config}:cifar10"), gpu_speed("attack pgd10")
    seconds = forward_cost(config) * (training_passes(config) / training + passes / judging)
    return seconds + START * (1 + len(row.protocols))


@functools.cache
def gpu_speed(program: str) -> float:
    """Operations a second that a GPU should reach, as `forward_cost` counts them.

    Args:
      program: a row of `ACCELERATORS`, a training or ten steps of PGD; for one that is not there,
        that of PGD-AT.
    """
    record = json.loads(ACCELERATORS.read_text())
    chips = math.prod(map(int, record["topology"].partition(":")[2].split("x")))
    found = {one["row"]: one for one in record["rows"] if one["dtype"] == "float32"}
    row = found.get(program, found["pgd_at:cifar10"])
    least = [  # seconds of one chip that had the work of all
        chips * max(one["flops"] / GPU_OPERATIONS, one["moved"] / GPU_BYTES)
        for one in row["programs"]
    ]
    if row["kind"] == "train":
        passes = training_passes(row["config"])
        seconds = sum(one["times"] * s for one, s in zip(row["programs"], least, strict=True))
    else:
        # Two passes for each of ten steps, and one of the result.
        passes, seconds = 21.0 * row["programs"][0]["images"], least[0]
    return GPU_SHARE * passes * forward_cost(row["config"]) / seconds


def _withstands(row: Row) -> bool:
    """Whether a row's network should withstand something of AutoAttack."""
    weak = ("standard", "gssl", "gssl_baseline", "cse", "supcon", "advprop", "claf", "zhang_evans")
    return row.config not in (*weak, *PURIFIERS, "defensive_distillation")
