"""AutoAttack here and in torch: identical weights, a verdict per image, time and passes of both."""

import importlib.util
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmark import peers
from jaxdefense import data, runs, threat
from jaxdefense.evaluation import cascade
from jaxdefense.evaluation.evaluator import Evaluator

GUARDED = 64  # images that a golden file keeps, and that tests/test_golden.py attacks


def _matrix_rate(n=2048):
    """The machine's FLOP/s in a matrix product, the best of five."""
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def _arithmetic(module, variables, images):
    """FLOP of a forward pass of one image; a backward pass for the image takes as many again."""
    forward = jax.jit(module.apply).lower(variables, images[:1]).compile()
    return forward.cost_analysis()["flops"]


def _row(what, peer, verdict, seconds, answer, share):
    """One comparison as plain values; times of ours in a second run, when all is compiled."""
    stages = list(verdict.by_attack)
    spent = float(answer["seconds"])
    return {
        "what": what,
        "peer": peer,
        "ours_ms": 1e3 * seconds,
        "first_ms": 1e3 * verdict.seconds,
        "peer_ms": 1e3 * spent,
        "ratio": spent / seconds,
        "matrix_rate_share": share,
        "examples": len(verdict.clean),
        "clean": [int(verdict.clean.sum()), int(answer["clean"].sum())],
        "survivors": {
            name: [int(verdict.by_attack[name].sum()), int(answer[name].sum())] for name in stages
        },
        "differ": np.flatnonzero(verdict.robust != answer[stages[-1]]).tolist(),
        "passes": {
            name: [list(verdict.passes[name]), answer[f"{name} passes"].tolist()] for name in stages
        },
    }


def rows(workdir, examples, *, norm=None, eps=None, reference=None, golden=None):
    """Standard AutoAttack as a cascade on a trained run's first test images, against each peer.

    Args:
      workdir: of a trained run of one classifier (cnn or resnet).
      examples: number of test images.
      norm: of another threat than the run's.
      eps: of that threat.
      reference: a checkout of github.com/fra31/auto-attack, or None.
      golden: a folder for NAME.npz with weights, some images and every verdict, or None.

    Yields:
      A row for torchattacks' attacks with standard AutoAttack's budgets (its own AutoAttack has 10
      steps where the standard has 100) and one for the authors' code, where they are installed.
    """
    run, trained, _ = runs.restore(workdir)
    ball = threat.make(norm or run.threat.norm, eps or run.threat.eps)
    # Half precision, so that a golden file is small and holds exactly what was attacked.
    variables = jax.tree.map(
        lambda w: w.astype(np.float16).astype(np.float32), peers.classifier(trained)
    )
    arrays = run.arrays("test").take(slice(examples))
    images = data.to_float(arrays.images)
    evaluator = Evaluator(run.module.apply, ball)
    stages = cascade.stages(ball, arrays.num_classes)
    verdict, again = (
        cascade.run_stages(evaluator, variables, images, arrays.labels, stages, progress=True)
        for _ in range(2)
    )
    work = sum(map(sum, verdict.passes.values())) * _arithmetic(run.module, variables, images)
    share = work / again.seconds / _matrix_rate()
    name = f"{run.config['name']}-{ball.norm}"
    what = f"AutoAttack {ball.norm} {ball.eps:.3g}, {run.config['name']}, {examples} images"
    made = {stage.name: repr(stage.attack) for stage in stages}
    installed = [p for p in ("torchattacks",) if importlib.util.find_spec(p)]
    answers = {}
    for peer in [*installed, *(["reference"] if reference else [])]:
        words = ("cascade", run, ball, variables, images, arrays.labels, peer, reference or "")
        answers[peer] = answer = peers.answer_of_torch(*words)
        yield {**_row(what, peer, verdict, again.seconds, answer, share), "attacks": made}
    if golden:
        bits = {f"ours {stage}": b for stage, b in verdict.by_attack.items()}
        for peer, answer in answers.items():
            bits |= {f"{peer} {stage}": answer[stage] for stage in verdict.by_attack}
        np.savez_compressed(
            pathlib.Path(golden) / f"{name}.npz",
            model=run.config["model"]["name"],
            width=run.config["model"]["width"],
            norm=ball.norm,
            eps=ball.eps,
            labels=arrays.labels,
            clean=verdict.clean,
            images=arrays.images[:GUARDED],
            **bits,
            **{path: w.astype(np.float16) for path, w in peers.flatten(variables).items()},
        )
