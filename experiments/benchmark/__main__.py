"""Times this library against its peers: same machine, same weights, in turn.

    python experiments/benchmark                      # all suites
    python experiments/benchmark conv pgd training    # some
    python experiments/benchmark --record=experiments/records/benchmark/pgd.json pgd
    python experiments/benchmark --runs=runs/pgd_at-mnist-0:1000 --reference=auto-attack attacks
    python experiments/benchmark --runs=runs/pgd_at-mnist-0:500 --repeats=2 rewritten
    python experiments/benchmark --runs=runs/pgd_at-mnist-0:1000 --journal=J fast half targeted

Suites with --runs: `rewritten` is a plain network of Flax linen, NNX and Equinox beside itself with
fast convolutions and beside torchattacks (a run of the MNIST CNN), `attacks` AutoAttack against
peers, `fast` AutoAttack's version fast beside standard (on any trained run: its deployed
predictor), `half` float32 beside bfloat16, `targeted` targeted attacks, PGD and CW against
torchattacks'. With --journal the last three go on where they were killed. A record is written after
each row.

Peers are Foolbox on JAX, torchattacks where it and torch are installed (they are not among the
library's requirements) and the authors' AutoAttack (--reference, a checkout of
github.com/fra31/auto-attack); a peer that is missing is said to be. Only ratios carry over to
another machine. torch runs in a process of its own: beside XLA in one process it crawls.
"""

import pathlib
import sys
import time

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the scripts' folder

import cli

from benchmark import attacks, conv, pgd, rewritten, tables, training, verdicts
from jaxdefense import registry, validate
from jaxdefense.attacks import checks
from jaxdefense.evaluation import records

RECORD = flags.DEFINE_string("record", None, "Write the rows to this JSON file too.")
RUNS = flags.DEFINE_list("runs", [], "WORKDIR:EXAMPLES or WORKDIR:EXAMPLES:NORM:EPS, trained.")
JOURNAL = flags.DEFINE_string("journal", None, "A folder for fast, half, targeted to go on from.")
REFERENCE = flags.DEFINE_string("reference", None, "For attacks: a checkout of fra31/auto-attack.")
GOLDEN = flags.DEFINE_string("golden", None, "For attacks: a folder for the golden files.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed pairs per row, after one warm-up.")


def conv_suite():
    """Gradients of convolutions inside a loop: ours against those that autodiff emits."""
    for row in conv.rows():
        times = {"ours_ms": row["explicit_ms"], "peer_ms": row["autodiff_ms"]}
        yield {"what": row["case"], "peer": "autodiff", **times, "ratio": row["ratio"]}


def pgd_suite():
    """PGD: L_inf on the small CNN and on ResNet-18, against Foolbox on JAX and torchattacks."""
    yield from pgd.rows(REPEATS.value)


def training_suite():
    """Adversarial training on all cores as devices, against one of them."""
    yield from training.rows(REPEATS.value)


def rewritten_suite():
    """A user's own network, plain and with fast convolutions, on a trained MNIST CNN (--runs)."""
    for workdir, examples, _ in _runs():
        yield from rewritten.rows(workdir, examples, REPEATS.value)


def attacks_suite():
    """Standard AutoAttack on trained runs (--runs), against torchattacks and the authors' code."""
    for workdir, examples, ball in _runs():
        peers = {"reference": REFERENCE.value, "golden": GOLDEN.value}
        yield from attacks.rows(workdir, examples, **ball, **peers)


def fast_suite():
    """AutoAttack's version fast beside standard on trained runs (--runs): survivors and passes."""
    yield from map(verdicts.fast, _problems())


def half_suite():
    """Standard AutoAttack in float32 beside bfloat16 on trained runs (--runs), weights rounded."""
    yield from map(verdicts.half, _problems())


def targeted_suite():
    """Targeted attacks on trained runs (--runs), PGD and CW against torchattacks'."""
    for given in _problems():
        yield from verdicts.targeted(given)


def _runs():
    """(workdir, examples, {"norm", "eps"}) of each of --runs."""
    for run in RUNS.value:
        workdir, *rest = run.split(":")
        if len(rest) not in (1, 3):
            raise ValueError(f"--runs takes WORKDIR:EXAMPLES or WORKDIR:EXAMPLES:NORM:EPS: {run!r}")
        examples, norm, eps = [*rest, None, None][:3]
        try:
            count, eps = int(examples), eps and float(eps)
        except ValueError as error:
            raise ValueError(f"--runs={run}: {error}") from None
        checks.check_count(f"--runs={run}: EXAMPLES", count)
        yield workdir, count, {"norm": norm, "eps": eps}


def _problems():
    """The problem of each of --runs."""
    for workdir, examples, ball in _runs():
        yield verdicts.problem(workdir, examples, **ball, journal=JOURNAL.value)


SUITES = {
    "conv": conv_suite,
    "pgd": pgd_suite,
    "training": training_suite,
    "rewritten": rewritten_suite,
    "attacks": attacks_suite,
    "fast": fast_suite,
    "half": half_suite,
    "targeted": targeted_suite,
}


def main(argv):
    rows, began = [], time.monotonic()
    registry.check_known("suite", argv[1:], SUITES)
    checks.check_count("--repeats", REPEATS.value)
    if RECORD.value:
        validate.check_file("--record", RECORD.value)
        cli.ending.told = f"the rows that were measured are in {RECORD.value}"
    # All of --runs is read before the first suite begins; without --runs these have nothing to do.
    idle = sorted(set(argv[1:]) & set(SUITES) - {"conv", "pgd", "training"})
    if not list(_runs()) and idle:
        raise ValueError(f"the suite {idle[0]} needs --runs=WORKDIR:EXAMPLES")
    for name in argv[1:] or SUITES:
        print(f"{name}: {SUITES[name].__doc__}", flush=True)
        for row in SUITES[name]():
            rows.append(row)
            if RECORD.value:  # what is measured stays, however the suite ends
                records.save(_record(rows, began), RECORD.value)
            if "suite" in row:  # its verdicts have been printed
                continue
            shown = f"{row['ratio']:.2f} times" if "ratio" in row else "not measured"
            print(f"  {row['what']}: {row['peer']} takes {shown} ours", flush=True)
    print(tables.render(_record(rows, began)))


def _record(rows, began):
    spent = time.monotonic() - began
    return records.make("benchmark", {}, {}, seed=0, seconds=spent, rows=rows)


if __name__ == "__main__":
    cli.run(main, spread=True)
