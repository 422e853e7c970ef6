"""Times this library against its peers: same machine, same weights, in turn.

    python experiments/benchmark                      # all suites
    python experiments/benchmark conv pgd             # some
    python experiments/benchmark --record=experiments/records/benchmark/cpu.json pgd
    python experiments/benchmark --runs=runs/pgd_at-mnist-0:1000 --reference=auto-attack attacks
    python experiments/benchmark --runs=runs/pgd_at-mnist-0:1000 --journal=J fast half targeted

Suites with --runs: `attacks` is AutoAttack against peers, `fast` AutoAttack's version fast beside
standard (on any trained run: its deployed predictor), `half` float32 beside bfloat16, `targeted`
targeted attacks, PGD and CW against torchattacks'. With --journal the last three go on where they
were killed. A record is written at the end, whole.

Peers are Foolbox on JAX, torchattacks where it and torch are installed (they are not among the
library's requirements) and the authors' AutoAttack (--reference, a checkout of
github.com/fra31/auto-attack); a peer that is missing is said to be. Only ratios carry over to
another machine. torch runs in a process of its own: beside XLA in one process it crawls.
"""

import contextlib
import importlib.util
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

sys.path[0] = str(pathlib.Path(__file__).parents[1])  # the scripts' folder, not this one

import cli

from benchmark import attacks as benchmark_attacks
from benchmark import conv as benchmark_conv
from benchmark import verdicts as benchmark_verdicts
from jaxdefense import attacks, models, registry, threat
from jaxdefense.evaluation import records, tables

RECORD = flags.DEFINE_string("record", None, "Write the rows to this JSON file too.")
RUNS = flags.DEFINE_list("runs", [], "WORKDIR:EXAMPLES or WORKDIR:EXAMPLES:NORM:EPS, trained.")
JOURNAL = flags.DEFINE_string("journal", None, "A folder for fast, half, targeted to go on from.")
REFERENCE = flags.DEFINE_string("reference", None, "For attacks: a checkout of fra31/auto-attack.")
GOLDEN = flags.DEFINE_string("golden", None, "For attacks: a folder for the golden files.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed pairs per row, after one warm-up.")


def pairs(ours, theirs, repeats):
    """Medians of both in seconds and of the ratio theirs / ours, run in turn."""
    times = []
    for i in range(repeats + 1):
        pair = []
        for function in (ours, theirs):
            begin = time.perf_counter()
            function()
            pair.append(time.perf_counter() - begin)
        if i:  # the first is the warm-up
            times.append(pair)
    ratios = [b / a for a, b in times]
    ours_s, theirs_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {"ours_ms": 1e3 * ours_s, "peer_ms": 1e3 * theirs_s, "ratio": statistics.median(ratios)}


def _problem(name, batch):
    """A network with its weights, and a batch for it, as NumPy."""
    shape = (28, 28, 1) if name == "cnn" else (32, 32, 3)
    net = models.make(name, 10)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(batch, *shape)).astype(np.float32)
    labels = rng.integers(0, 10, batch)
    variables = jax.jit(net.init)(jax.random.key(0), jnp.asarray(images[:1]))
    return net, variables, images, labels


def _jax_attack(net, variables, attack, images, labels):
    fast = attacks.jitted(attack, net.apply, devices=jax.local_devices())
    x, y, key = jnp.asarray(images), jnp.asarray(labels), jax.random.key(0)
    return lambda: jax.block_until_ready(fast(variables, key, x, y))


@contextlib.contextmanager
def _torchattacks_pgd(name, variables, images, labels, eps, steps, step_size):
    """One run per call, in a process of its own: torch beside XLA in one process crawls."""
    flat = {
        "/".join(("variables", *(str(key.key) for key in path))): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    rest = {"name": name, "images": images, "labels": labels, "eps": eps}
    with tempfile.TemporaryDirectory() as folder:
        problem = pathlib.Path(folder) / "problem.npz"
        np.savez(problem, steps=steps, step_size=step_size, **flat, **rest)
        script = pathlib.Path(__file__).parent / "torch_peers.py"
        with subprocess.Popen(
            [sys.executable, str(script), "serve", str(problem)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:

            def run():
                child.stdin.write("go\n")
                child.stdin.flush()
                if child.stdout.readline() != "done\n":
                    raise ValueError("the torch process failed; its error is above")

            yield run
            child.stdin.close()


@contextlib.contextmanager
def _foolbox_pgd(net, variables, images, labels, eps, steps, step_size):
    import foolbox

    model = foolbox.JAXModel(lambda x: net.apply(variables, x), bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps)
    x, y = jnp.asarray(images), jnp.asarray(labels)
    yield lambda: jax.block_until_ready(attack.run(model, x, y, epsilon=eps))


def pgd():
    """PGD: L_inf on the small CNN and on ResNet-18, against Foolbox on JAX and torchattacks."""
    cases = [("cnn", 1, 40), ("cnn", 16, 40), ("cnn", 500, 40), ("resnet", 64, 10)]
    for name, batch, steps in cases:
        net, variables, images, labels = _problem(name, batch)
        eps, step_size = (0.3, 0.01) if name == "cnn" else (8 / 255, 2 / 255)
        attack = attacks.pgd(threat.Linf(eps), steps=steps, step_size=step_size)
        ours = _jax_attack(net, variables, attack, images, labels)
        arguments = (images, labels, eps, steps, step_size)
        peers = {
            "torchattacks": lambda n=name, v=variables, a=arguments: _torchattacks_pgd(n, v, *a)
        }
        if name == "cnn":
            peers["foolbox"] = lambda n=net, v=variables, a=arguments: _foolbox_pgd(n, v, *a)
        for peer, build in peers.items():
            what = f"PGD-{steps}, {name}, batch {batch}"
            if not importlib.util.find_spec(peer):
                yield {"what": what, "peer": f"{peer} (not installed)"}
                continue
            with build() as theirs:
                row = pairs(ours, theirs, REPEATS.value)
            yield {"what": what, "peer": peer, **row}


def conv():
    """Gradients of convolutions inside a loop: ours against those that autodiff emits."""
    for row in benchmark_conv.rows():
        times = {"ours_ms": row["explicit_ms"], "peer_ms": row["autodiff_ms"]}
        yield {"what": row["case"], "peer": "autodiff", **times, "ratio": row["ratio"]}


def attacks_suite():
    """Standard AutoAttack on trained runs (--runs), against torchattacks and the authors' code."""
    for workdir, examples, ball in _runs():
        peers = {"reference": REFERENCE.value, "golden": GOLDEN.value}
        yield from benchmark_attacks.rows(workdir, examples, **ball, **peers)


def _runs():
    """(workdir, examples, {"norm", "eps"}) of each of --runs."""
    for run in RUNS.value:
        workdir, examples, *ball = run.split(":")
        if len(ball) not in (0, 2):
            raise ValueError(f"--runs takes WORKDIR:EXAMPLES or WORKDIR:EXAMPLES:NORM:EPS: {run!r}")
        norm, eps = ball or (None, None)
        yield workdir, int(examples), {"norm": norm, "eps": eps and float(eps)}


def _problems():
    """The problem of each of --runs."""
    for workdir, examples, ball in _runs():
        yield benchmark_verdicts.problem(workdir, examples, **ball, journal=JOURNAL.value)


def fast():
    """AutoAttack's version fast beside standard on trained runs (--runs): survivors and passes."""
    yield from map(benchmark_verdicts.fast, _problems())


def half():
    """Standard AutoAttack in float32 beside bfloat16 on trained runs (--runs), weights rounded."""
    yield from map(benchmark_verdicts.half, _problems())


def targeted():
    """Targeted attacks on trained runs (--runs), PGD and CW against torchattacks'."""
    for given in _problems():
        yield from benchmark_verdicts.targeted(given)


SUITES = {
    "conv": conv,
    "pgd": pgd,
    "attacks": attacks_suite,
    "fast": fast,
    "half": half,
    "targeted": targeted,
}


def main(argv):
    rows, began = [], time.monotonic()
    for name in argv[1:] or SUITES:
        if name not in SUITES:
            registry.raise_unknown("suite", name, SUITES)
        print(f"{name}: {SUITES[name].__doc__}", flush=True)
        for row in SUITES[name]():
            rows.append(row)
            if "suite" in row:  # its verdicts have been printed
                continue
            shown = f"{row['ratio']:.2f} times" if "ratio" in row else "not measured"
            print(f"  {row['what']}: {row['peer']} takes {shown} ours", flush=True)
    spent = time.monotonic() - began
    record = records.make("benchmark", {}, {}, seed=0, seconds=spent, rows=rows)
    made = (tables.benchmark_table(record), tables.verdict_table(record))
    print("\n\n".join(table for table in made if table.count("\n") > 1))
    if RECORD.value:
        records.save(record, RECORD.value)


if __name__ == "__main__":
    cli.run(main, spread=True)
