"""What the pages of docs/tables show: a table and verdicts for each document, and a cross-table.

Everything is computed from records; what has none says "open", with the command that makes it.
The study's records are those of experiments/study.py, others lie beside them.
"""

import dataclasses
import pathlib
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import comparisons
import configs
import study_grid as grid
from papers import metric_i, reported

from jaxdefense import registry
from jaxdefense.evaluation import records, tables
from jaxdefense.evaluation.records import Record

ROOT = pathlib.Path(__file__).parents[1]
RECORDS = "experiments/records"
STUDY = f"{RECORDS}/study"

TOP = 10  # rows of a cross-table that README shows
ALPHA = 0.05  # a verdict needs a p below it


@dataclasses.dataclass(frozen=True)
class Source:
    """Records of one row.

    Attributes:
      path: their folder, from the root of the checkout.
      name: of the row, NAME or NAME[PREDICTOR].
      protected: the numbers are metric I.
      columns: that are shown; none is all.
    """

    path: str
    name: str
    protected: bool = False
    columns: tuple[str, ...] = ()

    def load(self) -> list[Record]:
        """The records of the row, by seed; none where there are none yet."""
        return [record for _, record in sorted(self._row()[1].items())]

    def accuracies(self) -> dict[str, list[float]]:
        """{attack: percent by seed}, in the order of the columns."""
        predictor, row = self._row()
        found: dict[str, list[float]] = {}
        for _, record in sorted(row.items()):
            if self.protected:
                measured = metric_i.means(record)
            else:
                measured = {k: v["accuracy"] for k, v in record["results"][predictor].items()}
            for column in self.columns or measured:
                if column in measured:
                    found.setdefault(column, []).append(measured[column])
        return found

    def _row(self) -> tuple[str, Mapping[int, Record]]:
        folder = ROOT / self.path
        if not folder.exists():
            return "", {}
        found = records.load_all([folder])
        name = self.name.partition("[")[0]
        if name not in {record["name"] for record in found}:
            return "", {}
        return comparisons.find_row(found, self.name)


_HONEST = ("clean", "autoattack", "worst")


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a document's table.

    Attributes:
      label: what the reader sees.
      row: of the study, that measures it honestly.
      own: records of the paper's own protocol.
      honest: records of an honest one, beside the study's.
      reported: {attack: percent} of the paper.
      differs: from the paper's experiment.
    """

    label: str
    row: grid.Row | None = None
    own: Source | None = None
    honest: Source | None = None
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)
    differs: str = ""

    def honest_sources(self) -> list[Source]:
        """Where honest numbers of it may be: what is named, then the study's."""
        found = [self.honest] if self.honest else []
        return found + (study_sources(self.row) if self.row else [])


def study_sources(row: grid.Row) -> list[Source]:
    """The study's records of a row, one source for each protocol that is honest.

    FGSM and PGD are no honest measure of what AutoAttack judges too: until it has, the row is open.

    Args:
      row: of any seed.
    """
    weak = ("configured",) if "autoattack" in row.protocols else ()
    name, stacked = f"{row.config}-{row.variant}", "protect" in str(grid.settings(row)["defense"])
    protected = stacked and row.variant.endswith("_paper")
    return [
        Source(f"{STUDY}/{row.folder}/{protocol}", name, protected, _HONEST)
        for protocol in reversed(row.protocols)
        if protocol not in (*grid.OF_PAPERS, *weak)
    ]


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one row is better than another.

    Attributes:
      text: the claim in words.
      first: the row that should be better, as in `Source.name`.
      second: the other one.
      path: folder of both rows' records.
      column: the attack.
    """

    text: str
    first: str
    second: str
    path: str
    column: str


@dataclasses.dataclass(frozen=True)
class Document:
    """One of the documents: its table's rows and its claims."""

    lines: Sequence[Line]
    claims: Sequence[Claim]


_CPU = "cifar10_cpu"
_CONFIGURED = f"{STUDY}/{_CPU}/configured"
_SHORT = "reduced recipe"


def _row(config: str, variant: str = _CPU, **more: object) -> grid.Row:
    """The grid's row of a config and variant; its first seed."""
    known = {(row.config, row.variant): row for row in reversed(grid.rows("full"))}
    return dataclasses.replace(known[config, variant], **more)


def _reduced(label: str, config: str, variant: str = _CPU, differs: str = _SHORT) -> Line:
    return Line(f"{label}, CIFAR-10", _row(config, variant), differs=differs)


def _reduced_claf(label: str, variant: str) -> Line:
    """A row of the reduced recipe that is judged by CLAF's own attack too."""
    own = Source(f"{STUDY}/{_CPU}/literal", f"claf-{variant} (the literal attack)")
    return dataclasses.replace(_reduced(label, "claf", variant), own=own)


def _on_cpu(
    text: str, first: str, second: str, column: str = "autoattack", variant: str = _CPU
) -> Claim:
    """A claim about two rows of the study, of the reduced recipe or of MNIST."""
    protocol = "autoattack" if column in ("autoattack", "aa-fast") else "configured"
    names = [f"{name}-{variant}" if "-" not in name else name for name in (first, second)]
    return Claim(text, *names, f"{STUDY}/{variant}/{protocol}", column)


def _both(text: str, first: str, second: str, column: str = "autoattack") -> list[Claim]:
    """A claim about two rows of reduced CIFAR-10, then of MNIST's."""
    return [
        _on_cpu(f"{text}, {said}.", first, second, column, variant)
        for said, variant in (("CIFAR-10", _CPU), ("MNIST", "mnist"))
    ]


def _paper_values(config: str, variant: str = "cifar10_paper") -> dict[str, float]:
    """{attack: percent} that a config says that its paper reports."""
    section = configs.load(config, variant).get("reported", {})
    return {column: entry["value"] for column, entry in section.items()}


def _cost_sensitive(label: str, config: str, dataset: str, differs: str = "") -> Line:
    """A row of Shen et al., by the paper's protocol and by AutoAttack in [0, 1]."""
    protected = dataset != "mnist"
    variant = "mnist_example" if not protected else f"{dataset}_paper"
    folder = {"mnist": "", "fashion_mnist": "_fashion", "cifar10": "_cifar10"}[dataset]
    name = f"{config}-{variant}" + ("-short" if "short" in differs else "")
    table = reported.METRIC_I if protected else reported.COST_SENSITIVE
    path = f"{RECORDS}/cost_sensitive{folder}"
    return Line(
        label,
        own=Source(path, f"{name} (the paper's protocol)", protected),
        honest=Source(f"{path}_autoattack", name, protected, _HONEST),
        reported=reported.cost_sensitive(table, f"{config}-{variant}"),
        differs=differs,
    )


def _cost_sensitive_row(label: str, config: str, variant: str) -> Line:
    """A row of Shen et al. that the study makes."""
    row = _row(config, variant)
    own = Source(
        f"{STUDY}/{row.folder}/cost_sensitive",
        f"{config}-{variant} (the paper's protocol)",
        protected=True,
    )
    found = reported.cost_sensitive(reported.METRIC_I, f"{config}-{variant}")
    return Line(label, row, own, reported=found)


_M2AT = Document(
    [
        Line(
            "AVmixup, WRN-34-10 (a relative; M2AT's own table is not known)",
            _row("avmixup", "cifar10_paper"),
            reported=_paper_values("avmixup"),
        ),
        Line("M2AT, WRN-34-10", _row("m2at", "cifar10_paper"), differs="recipe INFERRED"),
        _reduced("standard training", "standard"),
        _reduced("PGD-AT", "pgd_at"),
        _reduced("TRADES", "trades"),
        _reduced("MART", "mart"),
        _reduced("AVmixup", "avmixup"),
        _reduced("IAT", "iat"),
        _reduced("M2AT, reading 1", "m2at"),
        _reduced("M2AT, reading 1, hard labels", "m2at", f"{_CPU}_onehot"),
        _reduced("M2AT, reading 1, gamma 2", "m2at", f"{_CPU}_gamma2"),
        _reduced("M2AT, reading 2", "m2at_shuffle"),
    ],
    [
        _on_cpu("M2AT has more clean accuracy than PGD-AT.", "m2at", "pgd_at", "clean"),
        _on_cpu("M2AT is more robust than PGD-AT.", "m2at", "pgd_at"),
        _on_cpu("M2AT is more robust than TRADES.", "m2at", "trades"),
        _on_cpu("M2AT is more robust than AVmixup.", "m2at", "avmixup"),
        _on_cpu("Soft labels make M2AT more robust.", "m2at", f"m2at-{_CPU}_onehot"),
        _on_cpu("Reading 1 is more robust than reading 2.", "m2at", "m2at_shuffle"),
    ],
)

_LITERAL = f"{RECORDS}/claf_literal"
_CLAF = Document(
    [
        Line(
            "CLAF, ResNet-18, the literal mode",
            own=Source(_LITERAL, "claf-cifar10_small_literal (the literal attack)"),
            reported=_paper_values("claf", "cifar10_literal"),
            differs="a small CNN, 20 passes; 512 images",
        ),
        Line(
            "CLAF, pixel mode",
            _row("claf", "cifar10_paper"),
            Source(_LITERAL, "claf-cifar10_small (the literal attack)"),
            differs="as above",
        ),
        Line("RoCL, ResNet-18", _row("rocl", "cifar10"), reported=_paper_values("rocl")),
        _reduced("PGD-AT", "pgd_at"),
        _reduced("SupCon", "supcon"),
        _reduced("RoCL", "rocl"),
        _reduced("ACL", "acl"),
        _reduced_claf("CLAF, pixel mode", _CPU),
        _reduced_claf("CLAF, literal mode", f"{_CPU}_literal"),
    ],
    [
        _on_cpu("CLAF has more clean accuracy than RoCL.", "claf", "rocl", "clean"),
        _on_cpu("CLAF is more robust than RoCL.", "claf", "rocl"),
        _on_cpu("CLAF is more robust than ACL.", "claf", "acl"),
        _on_cpu("CLAF is more robust than SupCon.", "claf", "supcon"),
        _on_cpu("CLAF is more robust than PGD-AT.", "claf", "pgd_at"),
    ],
)

_EXAMPLE = f"{RECORDS}/cost_sensitive"
_OF_PAPER = " (the paper's protocol)"
_COST = Document(
    [
        _cost_sensitive("NORMAL, MNIST example", "standard", "mnist"),
        _cost_sensitive("ADV, MNIST example", "fgsm_at", "mnist"),
        _cost_sensitive("CSE, MNIST example", "cse", "mnist"),
        _cost_sensitive("NORMAL, Fashion-MNIST, metric I", "standard", "fashion_mnist"),
        _cost_sensitive("ADV, Fashion-MNIST, metric I", "fgsm_at", "fashion_mnist"),
        _cost_sensitive(
            "CSE, Fashion-MNIST, metric I, short", "cse", "fashion_mnist", "12 epochs of 40: short"
        ),
        _cost_sensitive_row("CSE, Fashion-MNIST, metric I", "cse", "fashion_mnist_paper"),
        _cost_sensitive("NORMAL, CIFAR-10, metric I", "standard", "cifar10"),
        _cost_sensitive("ADV, CIFAR-10, metric I", "fgsm_at", "cifar10"),
        _cost_sensitive_row("CSA, CIFAR-10, metric I", "csa", "cifar10_paper"),
        _cost_sensitive(
            "CSE, CIFAR-10, metric I", "cse", "cifar10", "32 epochs of batch 64 for one of batch 2"
        ),
        _reduced("CSA, class 0", "csa"),
        _reduced("CSE, class 0", "cse"),
        _reduced("CSE+AT, class 0", "cse_at", differs=f"{_SHORT}; the loop INFERRED"),
        _reduced("FGSM-AT", "fgsm_at"),
        _reduced("FRL", "frl"),
        _reduced("Zhang and Evans, class 0", "zhang_evans"),
    ],
    [
        Claim(
            "CSE withstands DeepFool better than ordinary training (the paper's protocol).",
            f"cse-mnist_example{_OF_PAPER}",
            f"standard-mnist_example{_OF_PAPER}",
            _EXAMPLE,
            "normalised deepfool3",
        ),
        Claim(
            "CSE withstands FGSM better than ordinary training (the paper's protocol).",
            f"cse-mnist_example{_OF_PAPER}",
            f"standard-mnist_example{_OF_PAPER}",
            _EXAMPLE,
            "normalised fgsm",
        ),
        Claim(
            "CSE withstands AutoAttack better than ordinary training.",
            "cse-mnist_example",
            "standard-mnist_example",
            f"{_EXAMPLE}_autoattack",
            "autoattack",
        ),
        Claim(
            "CSE withstands AutoAttack better than FGSM training.",
            "cse-mnist_example",
            "fgsm_at-mnist_example",
            f"{_EXAMPLE}_autoattack",
            "autoattack",
        ),
        _on_cpu("CSA is more robust than FGSM training.", "csa", "fgsm_at"),
        _on_cpu("CSE is more robust than standard training.", "cse", "standard"),
    ],
)


def _gssl_claim(dataset: str, folder: str, row: str) -> Claim:
    return Claim(
        f"GSSL has more clean accuracy than standard training of its budget, {dataset}.",
        f"gssl-{row}",
        f"gssl_baseline-{row}",
        folder,
        "clean",
    )


_SMALL = f"{STUDY}/mnist/configured"


def _gssl(label: str, variant: str) -> list[Line]:
    values = {"gssl": _paper_values("gssl", variant), "gssl_baseline": {}}
    # The paper's standard training, which gssl_baseline is to come near.
    standard = {"mnist_paper": 99.64, "cifar10_paper": 83.00, "cifar100_paper": 62.76}
    values["gssl_baseline"] = {"clean": standard[variant]}
    differs = "settings INFERRED"
    found = []
    for name, said in (("gssl_baseline", "standard training"), ("gssl", "GSSL")):
        own = Source(_SMALL, f"{name}-mnist_small", columns=("clean",))
        mnist = variant == "mnist_paper"
        made = {"mnist_paper": "mnist_small", "cifar10_paper": variant}.get(variant)
        row = _row(name, made) if made else None
        found.append(
            Line(
                f"{said}, {label}",
                row,
                own if mnist else None,
                reported=values[name],
                differs=f"{differs}; networks an eighth as wide, 2 epochs" if mnist else differs,
            )
        )
    return found


_GSSL = Document(
    [
        *_gssl("MNIST", "mnist_paper"),
        *_gssl("CIFAR-10", "cifar10_paper"),
        *_gssl("CIFAR-100", "cifar100_paper"),
        _reduced("standard training of GSSL's budget", "gssl_baseline"),
        _reduced("GSSL", "gssl"),
        _reduced("GSSL without the generator", "gssl", f"{_CPU}_no_generator"),
        _reduced("GSSL without the gate", "gssl", f"{_CPU}_no_gate"),
        _reduced("AdvProp", "advprop"),
        Line(
            "standard training of GSSL's budget, CIFAR-100",
            _row("gssl_baseline", "cifar100_cpu"),
            differs=_SHORT,
        ),
        Line("GSSL, CIFAR-100", _row("gssl", "cifar100_cpu"), differs=_SHORT),
    ],
    [
        _gssl_claim("MNIST", _SMALL, "mnist_small"),
        _gssl_claim("CIFAR-10", _CONFIGURED, _CPU),
        _gssl_claim("CIFAR-100", f"{STUDY}/cifar100_cpu/configured", "cifar100_cpu"),
        _on_cpu("The generator adds clean accuracy.", "gssl", f"gssl-{_CPU}_no_generator", "clean"),
        _on_cpu("The gate adds clean accuracy.", "gssl", f"gssl-{_CPU}_no_gate", "clean"),
    ],
)

_PURIFIERS = f"{RECORDS}/purifiers"
_OBLIVIOUS = ("clean", "T0 oblivious pgd (not white-box)")


def _purifier(label: str, path: str, name: str, differs: str = "all INFERRED") -> Line:
    return Line(
        label,
        own=Source(path, name, columns=_OBLIVIOUS),
        honest=Source(path, name, columns=_HONEST),
        differs=differs,
    )


def _purifier_row(label: str, config: str, variant: str = _CPU) -> Line:
    row = _row(config, variant)
    own = Source(f"{STUDY}/{row.folder}/audit", f"{config}-{variant}", columns=_OBLIVIOUS)
    return Line(f"{label}, CIFAR-10", row, own, differs=_SHORT)


_AUDIT = f"{STUDY}/{_CPU}/audit"


def _audited(text: str, second: str) -> Claim:
    """A claim about what withstands everything in the audit."""
    return Claim(text, f"ipg-{_CPU}", f"{second}-{_CPU}", _AUDIT, "worst")


_IPG = Document(
    [
        _purifier("IPG, phase I, MNIST", _PURIFIERS, "ipg-mnist_phase1"),
        _purifier("IPG, phases I and II, MNIST", _PURIFIERS, "ipg-mnist"),
        _purifier("IPG, phases I and II, digits", f"{_PURIFIERS}_digits", "ipg-digits"),
        _purifier("HGD, digits", f"{_PURIFIERS}_digits", "hgd-digits", ""),
        _purifier("APE-GAN, digits", f"{_PURIFIERS}_digits", "ape_gan-digits", ""),
        _purifier("Anti-Adversary, digits", f"{_PURIFIERS}_digits", "anti_adversary-digits", ""),
        _purifier_row("IPG, phase I", "ipg", f"{_CPU}_phase1"),
        _purifier_row("IPG, phases I and II", "ipg"),
        _purifier_row("HGD", "hgd"),
        _purifier_row("APE-GAN", "ape_gan"),
        _purifier_row("Anti-Adversary", "anti_adversary"),
        _reduced("PGD-AT", "pgd_at"),
    ],
    [
        Claim(
            "Phase II withstands more of the audit than phase I alone, MNIST.",
            "ipg-mnist",
            "ipg-mnist_phase1",
            _PURIFIERS,
            "worst",
        ),
        _audited("IPG withstands more of the audit than HGD.", "hgd"),
        _audited("IPG withstands more of the audit than APE-GAN.", "ape_gan"),
        _on_cpu("IPG is more robust than PGD-AT.", "ipg", "pgd_at"),
    ],
)

_LIGHT = f"{RECORDS}/distillation"


def _light(label: str, name: str) -> Line:
    return Line(
        f"{label}, a quarter-width CNN, MNIST",
        honest=Source(f"{_LIGHT}_autoattack", f"{name}-mnist-light", columns=_HONEST),
    )


def _light_claim(text: str, second: str, column: str = "autoattack") -> Claim:
    path = f"{_LIGHT}_autoattack" if column == "autoattack" else _LIGHT
    return Claim(text, "add-mnist-light", f"{second}-mnist-light", path, column)


_ADD = Document(
    [
        _light("PGD-AT", "pgd_at"),
        _light("TRADES", "trades"),
        _light("ADD", "add"),
        Line("PGD-AT (the teacher), MNIST", _row("pgd_at", "mnist")),
        *(
            Line(f"{label}, MNIST", _row(config, "mnist"), differs="a quarter-width student")
            for label, config in zip(("ADD", "ARD", "IAD", "AdaAD"), grid.STUDENTS, strict=True)
        ),
        _reduced("MART (the teacher)", "mart"),
        _reduced("ADD, half as wide", "add", differs=f"{_SHORT}; all but the idea INFERRED"),
        _reduced("ARD, half as wide", "ard"),
        _reduced("IAD, half as wide", "iad"),
        _reduced("AdaAD, half as wide", "adaad"),
        _reduced("defensive distillation", "defensive_distillation"),
    ],
    [
        _light_claim("A teacher makes a light network more robust than PGD-AT alone.", "pgd_at"),
        _light_claim("A teacher makes a light network more robust than TRADES alone.", "trades"),
        _light_claim(
            "A teacher gives a light network more clean accuracy than PGD-AT.", "pgd_at", "clean"
        ),
        *_both("Soft labels everywhere (ADD) are more robust than ARD", "add", "ard"),
        *_both("ADD is more robust than AdaAD", "add", "adaad"),
        *_both("ADD is more robust than IAD", "add", "iad"),
    ],
)


# The tests behind the findings of docs/tables/all_systems.md.
_FINDINGS = [
    *_both("CSE is more robust than standard training", "cse", "standard"),
    *_both("PGD-AT is more robust than M2AT", "pgd_at", "m2at"),
    *_both("TRADES is more robust than M2AT", "trades", "m2at"),
    *_both("M2AT has more clean accuracy than PGD-AT", "m2at", "pgd_at", "clean"),
    *_both("PGD-AT is more robust than TRADES", "pgd_at", "trades"),
    _on_cpu("M2AT withstands PGD-20 better than CSA, CIFAR-10.", "m2at", "csa", "pgd20"),
    _on_cpu("M2AT withstands AutoAttack better than CSA, CIFAR-10.", "m2at", "csa"),
    _on_cpu("MART withstands PGD-20 better than PGD-AT, CIFAR-10.", "mart", "pgd_at", "pgd20"),
    _on_cpu("MART withstands AutoAttack better than PGD-AT, CIFAR-10.", "mart", "pgd_at"),
]

DOCUMENTS = {
    "m2at": _M2AT,
    "claf": _CLAF,
    "cost_sensitive": _COST,
    "gssl": _GSSL,
    "ipg": _IPG,
    "add": _ADD,
}


def find_document(name: str) -> Document:
    """A document by its page's name.

    Args:
      name: a key of `DOCUMENTS`.

    Raises:
      ValueError: unknown; the nearest is named.
    """
    registry.check_known("document", [name], DOCUMENTS)
    return DOCUMENTS[name]


def study_command(config: str, variant: str) -> str:
    """The command that makes the study's rows of a config and variant, all seeds.

    Args:
      config: of the rows.
      variant: of the rows.
    """
    pattern = f"{config}-{variant}-*"
    in_cpu = any((row.config, row.variant) == (config, variant) for row in grid.rows("cpu"))
    more = "" if in_cpu else " --grid=gpu"
    return f"python experiments/study.py{more} --rows={shlex.quote(pattern)}"


def _open(row: grid.Row | None) -> str:
    return f"open: `{study_command(row.config, row.variant)}`" if row else "–"


def _cell(accuracies: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{k} {tables.format_mean(list(v))}" for k, v in accuracies.items())


def _honest_cell(line: Line) -> str:
    """The honest numbers of a line, with the threat and the images behind them."""
    for source in line.honest_sources():
        if found := source.load():
            told = f"{tables.format_threat(found[0])}, n {_count(source, found)}"
            return f"{_cell(source.accuracies())} ({told})"
    return _open(line.row)


def _count(source: Source, found: Sequence[Record]) -> str:
    """The images behind a source's records."""
    if source.protected:
        return metric_i.count(found[0])
    return tables.format_count(r for record in found for r in _results(record, source).values())


def _results(record: Record, source: Source) -> Mapping[str, Mapping[str, float]]:
    predictor = source.name.partition("[")[2].rstrip("]") or next(iter(record["results"]))
    return record["results"][predictor]


def document_table(name: str) -> str:
    """The table of a document: reported, measured its way, measured honestly; then the commands.

    Args:
      name: a key of `DOCUMENTS`.

    Raises:
      ValueError: unknown.
    """
    rows, commands, used = [], [], []
    for line in find_document(name).lines:
        own_text = ""
        if line.own and (found := line.own.load()):
            own_text = f"{_cell(line.own.accuracies())} (n {_count(line.own, found)})"
        elif line.own:
            own_text = _open(line.row)
        paper = "; ".join(f"{k} {v:.2f}" for k, v in line.reported.items())
        cells = [paper and f"{paper} (FOUND)", own_text, _honest_cell(line), line.differs]
        rows.append([line.label, *(cell or "–" for cell in cells)])
        sources = [*([line.own] if line.own else []), *line.honest_sources()]
        loaded = [(source, source.load()) for source in sources]
        used += [record for _, found in loaded for record in found]
        apart = [found for source, found in loaded if not source.path.startswith(f"{STUDY}/")]
        commands += _commands(line, [record for found in apart for record in found])
    header = ["accuracy, %", "reported", "measured, its protocol", "measured honestly", "differs"]
    told = f"{tables.provenance(used)}\n\n" if used else ""
    listed = "\n".join(commands)
    return f"{tables.markdown(header, rows)}\n\n{told}```sh\n{listed}\n```"


# The scripts of experiments/papers, by the beginning of their records' "protocol".
_SCRIPTS = {"paper": "cost_sensitive", "literal": "claf_literal"}
_OLD_NAMES = {"honest": "autoattack"}  # of older records' protocols


def _commands(line: Line, found: Sequence[Record]) -> list[str]:
    """The lines that make a row: of its records beside the study's, and of the study."""
    lines: dict[str, None] = {}
    others = sorted({record["seed"] for record in found})[1:]
    seeds = "|".join(map(str, others))
    told = f"; --config.seed={seeds} and other folders make the others" if others else ""
    for record in found:
        if record["seed"] != found[0]["seed"]:
            continue
        protocol = record.get("protocol", "configured")
        script = _SCRIPTS.get(protocol.partition(":")[0])
        checkpoint = record.get("training", {}).get("checkpoint", "best")
        made = configs.commands(
            record["config"], protocol=_OLD_NAMES.get(protocol, protocol), checkpoint=checkpoint
        )
        words = [command for command in made if not command.startswith("#")]
        if len(words) == 2 and (some := _first_examples(record)):
            words[1] += f" --examples={some}"
        if script:
            workdir = next(word for word in made[0].split() if word.startswith("--workdir="))
            narrow = f" --eps={record['eps']}" if record.get("eps", 0.3) != 0.3 else ""
            words.append(f"python experiments/papers/{script}.py {workdir}{narrow}")
        lines |= dict.fromkeys([*_teacher_command(record["config"]), *words])
    if line.row:
        lines[study_command(line.row.config, line.row.variant)] = None
    return [f"# {line.label}{told}", *(lines or ["# open: an accelerator's work"])]


def _teacher_command(config: Mapping[str, Any]) -> list[str]:
    """The line that trains a run's teacher, whose folder is named NAME-SEED."""
    workdir = config.get("defense", {}).get("teacher", {}).get("workdir")
    if not workdir:
        return []
    folder = pathlib.PurePath(workdir).name
    teacher = f"{folder.partition('-')[0]}:{config['dataset']['name']}"
    return [f"python experiments/train.py --config={teacher} --workdir=runs/{folder}"]


def _first_examples(record: Record) -> int | None:
    """The number of test images behind a record, where it is a part of them."""
    results = record["results"]
    if record["config"]["dataset"]["name"] == "digits":
        return None
    if any(name.startswith("protect") for name in results):  # each is judged on its class
        count = int(metric_i.count(record))
    else:
        count = max(result["n"] for attacks in results.values() for result in attacks.values())
    return None if count >= 10000 else count


def verdict(claim: Claim) -> str:
    """What a test of pairs says of a claim, in words: of seeds, or in a single seed of images.

    Args:
      claim: of a document.
    """
    folder = ROOT / claim.path
    found = records.load_all([folder]) if folder.exists() else []
    have = {record["name"] for record in found}
    if missing := [name for name in (claim.first, claim.second) if name not in have]:
        return f"open: no record of {' and '.join(missing)}"
    (pair,) = comparisons.compare(found, claim.first, claim.second, [claim.column])
    count, gap = len(pair.first), f"{pair.difference:+.2f} points"
    if (test := pair.test()) is not None:
        told = f"{gap}, standard error {pair.error:.2f}, {count} pairs, p {_format_p(test[1])}"
        return _decide(test[1], pair.difference, "", told)
    if (p := pair.test_of_images()) is not None:
        one, other = pair.apart[0]
        told = f"{gap}; of {pair.count} images {one} and {other} are right in one alone, "
        return _decide(p, pair.difference, " in one seed", f"{told}p {_format_p(p)}")
    if count > 1:
        return f"not tested: {gap} in {count} pairs that differ alike"
    alike = pair.apart == [(0, 0)]
    return "nothing to test: both are right on the same images" if alike else f"not tested: {gap}"


def _decide(p: float, difference: float, where: str, told: str) -> str:
    """A verdict and what it rests on."""
    if p >= ALPHA:
        return f"not decided{where}: {told}"
    return f"{'holds' if difference > 0 else 'does not hold'}{where}: {told}"


def _format_p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3g}".lstrip("0")


def claims(name: str) -> str:
    """The verdicts of a document or of the findings, a line each.

    Args:
      name: a key of `DOCUMENTS`, or "all_systems".

    Raises:
      ValueError: unknown.
    """
    lines = []
    for claim in _FINDINGS if name == "all_systems" else find_document(name).claims:
        word, _, rest = verdict(claim).partition(":")
        lines.append(f"* {claim.text} **{word}**" + (f":{rest}" if rest else ""))
    return "\n".join(lines)


def _epoch_seconds(record: Record) -> float | None:
    """Seconds of training over epochs of the training images; None where neither is known."""
    training = record.get("training", {})
    seconds, step, steps = (training.get(key) for key in ("seconds", "step", "steps"))
    length = record["config"]["train"]["length"]
    if not seconds or not step or not steps or not length.endswith("e"):
        return None
    return seconds / (float(length[:-1]) * step / steps)  # until the checkpoint that is judged


def cross_table(folder: str) -> str:
    """All systems of one recipe, the most robust under AutoAttack first, and what is open.

    Args:
      folder: of the study's records, e.g. "cifar10_cpu".

    Raises:
      ValueError: no row of the study has it.
    """
    table, robust = _ranked(folder)
    parts = [table, tables.provenance(robust)] if robust else []
    return "\n\n".join([*parts, *_open_rows(folder)])


def top_table(folder: str) -> str:
    """The first rows of a cross-table.

    Args:
      folder: of the study's records, e.g. "cifar10_cpu".

    Raises:
      ValueError: no row of the study has it.
    """
    table, robust = _ranked(folder, TOP)
    return f"{table}\n\n{tables.provenance(robust)}"


def _ranked(folder: str, most: int | None = None) -> tuple[str, list[Record]]:
    """A cross-table of so many rows, with what they cost, and the records behind it."""
    registry.check_known("folder of the study", [folder], {row.folder for row in grid.rows("full")})
    path = ROOT / STUDY / folder
    robust = records.load_all([path / "autoattack"]) if (path / "autoattack").exists() else []
    clean = records.load_all([path / "configured"]) if (path / "configured").exists() else []
    attacked = tables.group_by_row(clean)
    pgd = _longest_pgd(clean)
    ranked = []
    for (name, predictor), same in tables.group_by_row(robust).items():
        results = [record["results"][predictor] for record in same]
        values = [result["autoattack"]["accuracy"] for result in results]
        worst = [
            min(found.values())
            for result in results
            if (found := tables.class_accuracies(result["autoattack"]))
        ]
        beside = [record["results"][predictor] for record in attacked.get((name, predictor), [])]
        cells = [
            name,
            tables.format_threat(same[0]),
            tables.format_count([result["autoattack"] for result in results]),
            tables.format_mean([result["clean"]["accuracy"] for result in results]),
            tables.format_mean(_on_first(beside, pgd, results[0]["autoattack"]["n"])),
            tables.format_mean(values),
            tables.format_mean(worst),
            *_costs(same),
            _thousands(same[0].get("parameters", {}).get(predictor)),
            _flags(same, predictor),
        ]
        ranked.append((statistics.fmean(values), cells, same))
    ranked = sorted(ranked, key=lambda found: -found[0])[:most]
    header = ["accuracy, %", "threat", "n", "clean", pgd, "autoattack", "worst class"]
    header += ["s an epoch", "GB", "parameters", "flags"]
    shown = [record for *_, same in ranked for record in same]
    return tables.markdown(header, [cells for _, cells, _ in ranked]), shown


def _on_first(found: Sequence[Mapping[str, Any]], attack: str, count: int) -> list[float]:
    """Each seed's accuracy under an attack on the first so many images, percent."""
    results = [one[attack] for one in found if attack in one]
    bits = [records.unpack_bits(result["bits"], result["n"]) for result in results]
    return [100.0 * right[:count].mean().item() for right in bits]


def _longest_pgd(found: Sequence[Record]) -> str:
    """The PGD of most steps that the records have, as they name it; "pgd20" where there is none."""
    names = {name for record in found for result in record["results"].values() for name in result}
    pgd = [name for name in names if name.startswith("pgd") and name[3:].isdigit()]
    return max(pgd, key=lambda name: int(name[3:]), default="pgd20")


def _costs(same: Sequence[Record]) -> list[str]:
    """Seconds of an epoch in the mean over seeds, and the most memory of them."""
    epochs = [value for record in same if (value := _epoch_seconds(record)) is not None]
    memory = [held for record in same if (held := record.get("training", {}).get("memory"))]
    return [
        f"{statistics.fmean(epochs):.0f}" if epochs else "–",
        f"{max(memory) / 1e9:.2f}" if memory else "–",
    ]


def _flags(same: Sequence[Record], predictor: str) -> str:
    """What AutoAttack's flags say against the number; a dash where they say nothing."""
    found = [flag for record in same for flag in record.get("cascade", {}).get("flags", [])]
    names = dict.fromkeys(flag["name"] for flag in found if flag["predictor"] == predictor)
    return ", ".join(names) or "–"


def _thousands(count: int | None) -> str:
    return f"{count:,}" if count else "–"


def _open_rows(folder: str) -> list[str]:
    """What has no record under AutoAttack yet, and the command of each grid that makes it."""
    told: list[str] = []
    listed: set[str] = set()
    for machine in ("cpu", "gpu"):
        rows = [row for row in grid.rows(machine) if row.folder == folder]
        path = ROOT / STUDY / folder / "autoattack"
        missing: dict[str, list[str]] = {}
        for row in rows:
            done = row.name in listed or (path / f"{row.name}.json").exists()
            if "autoattack" in row.protocols and not done:
                name, _, seed = row.name.rpartition("-")
                missing.setdefault(name, []).append(seed)
                listed.add(row.name)
        if missing:
            command = f"python experiments/study.py --grid={machine}"
            count = sum(map(len, missing.values()))
            names = [name + _seeds(seeds) for name, seeds in sorted(missing.items())]
            rows_open = "1 row" if count == 1 else f"{count} rows"
            told.append(f"Open, {rows_open}: {', '.join(names)}; `{command}`.")
    return told


def _seeds(seeds: Sequence[str]) -> str:
    """Which seeds a row is open for; nothing where it is the first alone."""
    if list(seeds) == ["0"]:
        return ""
    return f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})"


def reported_values() -> set[float]:
    """Every number that a document or a config reports, percent."""
    lines = [line for document in DOCUMENTS.values() for line in document.lines]
    return {value for line in lines for value in line.reported.values()}
