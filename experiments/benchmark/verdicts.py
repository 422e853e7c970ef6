"""Verdicts on trained runs beside each other: fast and standard, bfloat16 and float32, targeted."""

import dataclasses
import importlib.util
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmark import peers
from jaxdefense import attacks, data, runs, threat
from jaxdefense.attacks.ensemble import Stage
from jaxdefense.evaluation import cascade
from jaxdefense.evaluation.evaluator import Evaluator, Examples
from jaxdefense.runs.run import Run, build
from jaxdefense.types import Threat

# Of the targeted suite. torchattacks' CW has one c and no search for it.
PGD_STEPS = 40
CW_STEPS, CW_CONST, CW_RATE = 200, 1000.0, 0.05


class Problem(NamedTuple):
    """A trained run and what its deployed predictor is judged on."""

    workdir: str
    run: Run
    variables: dict  # {"params", "carry"}
    ball: Threat
    arrays: data.Arrays
    journal: pathlib.Path | None  # keeps finished dispatches

    @property
    def text(self):
        """ "pgd_at-mnist, linf 0.3, 1000 images"."""
        name, ball = self.run.name, self.ball
        return f"{name}, {ball.norm} {ball.eps:.3g}, {len(self.arrays)} images"


def problem(workdir, examples=None, *, norm=None, eps=None, journal=None):
    """The problem of a trained run and its first test images.

    Args:
      workdir: of any trained run.
      examples: number of test images, or None for all.
      norm: of another threat than the run's.
      eps: of that threat.
      journal: a folder for finished dispatches, to go on from, or None.
    """
    run, variables, _ = runs.restore(workdir)
    ball = run.threat if norm is None else threat.make(norm, eps)
    arrays = run.arrays("test").take(slice(examples))
    if journal:
        name = f"{pathlib.Path(workdir).resolve().name}-{ball.norm}-{ball.eps:.3g}-{len(arrays)}"
        journal = pathlib.Path(journal) / name
    return Problem(workdir, run, variables, ball, arrays, journal)


def deployed(run):
    """(variables, images) -> logits of the predictor that the run's defence deploys."""
    return run.apply(run.defense.primary)


def evaluator(given, apply, ball=None):
    """An evaluator of the problem's threat or another, with the batch size of the run's config."""
    batch_size = given.run.config["evaluation"].get("batch_size")
    return Evaluator(apply, ball or given.ball, batch_size=batch_size)


def judge(name, judging, variables, given, stages, targets=None):
    """The verdict of some stages, whose seconds are without compilation, each stage printed.

    Args:
      name: of the verdict, of its folder in the journal too.
      judging: the model's `Evaluator`.
      variables: its weights.
      given: the problem.
      stages: of a cascade.
      targets: (N,) classes to be reached, for targeted stages.
    """
    images = data.to_float(given.arrays.images)
    _compile(judging, variables, images[:1], stages, targeted=targets is not None)
    verdict = cascade.run_stages(
        judging,
        variables,
        images,
        given.arrays.labels,
        stages,
        targets=targets,
        ids=given.arrays.ids,
        seed=given.run.seed,
        folder=given.journal and given.journal / name,
        progress=True,
    )
    left = [f"{stage} {count}" for stage, count in survivors(verdict).items()]
    print(f"  {given.text}: {name}: {', '.join(left)}; {verdict.seconds:.0f} s", flush=True)
    return verdict


def _compile(judging, variables, image, stages, *, targeted):
    """Compiles each stage on an image whose attack has already won: next to no time else."""
    variables = judging.replicate(variables)
    said = judging.logits(variables, image)
    won = said.argmax(-1) if targeted else said.argmin(-1)
    for size in {judging.small, judging.large}:
        rows = np.zeros(size, int)
        examples = Examples(image[rows], won[rows], rows, rows)
        for stage in stages:
            judging.attack(stage.name, stage.attack, variables, examples)


def survivors(verdict):
    """{"clean": count, stage: count}."""
    counts = {"clean": int(verdict.clean.sum())}
    return counts | {stage: int(left.sum()) for stage, left in verdict.by_attack.items()}


def _told(verdict, stages):
    """What a record keeps of a verdict: counts, passes, seconds, flags, and how it was come by."""
    return {
        "survivors": survivors(verdict),
        "passes": {name: list(passes) for name, passes in verdict.passes.items()},
        "most_passes": [sum(s.forward for s in stages), sum(s.backward for s in stages)],
        "seconds": verdict.seconds,
        "flags": [dataclasses.asdict(flag) for flag in verdict.flags],
        "attacks": {stage.name: repr(stage.attack) for stage in stages},
    }


def _row(suite, given, verdicts, stages):
    """Two verdicts on the same images, and the images on which they differ."""
    (one, first), (other, second) = verdicts.items()
    return {
        "suite": suite,
        "what": given.text,
        "examples": len(first.clean),
        "verdicts": {name: _told(verdict, stages[name]) for name, verdict in verdicts.items()},
        "only": {
            one: np.flatnonzero(first.robust & ~second.robust).tolist(),
            other: np.flatnonzero(second.robust & ~first.robust).tolist(),
        },
    }


def fast(given):
    """The row of version 'standard' beside 'fast', on the deployed predictor of a problem.

    "most_passes" are those of an image that nothing fools, "passes" the most that can have been
    spent on all, and "only" are the places of the images that survive in one verdict alone.
    """
    judging, classes = evaluator(given, deployed(given.run)), given.arrays.num_classes
    stages = {v: cascade.stages(given.ball, classes, version=v) for v in ("standard", "fast")}
    verdicts = {
        version: judge(version, judging, given.variables, given, plan)
        for version, plan in stages.items()
    }
    return _row("fast", given, verdicts, stages)


def half(given):
    """The row of float32 beside bfloat16, standard AutoAttack on the same network.

    All weights and running statistics are rounded to bfloat16 once and for both. In bfloat16 the
    classifier is built with its own `dtype`, which rounds images and activations (BatchNorm
    normalises in float32 and rounds its result), and its logits are rounded too. Images and steps
    of an attack are float32 on both sides.
    """
    config = given.run.config
    narrow = {**config, "model": {**config["model"], "dtype": "bfloat16"}}
    rounded = deployed(build(narrow, workdir=pathlib.Path(given.workdir)))

    def in_half(variables, images):
        return rounded(variables, images).astype(jnp.bfloat16)

    variables = jax.tree.map(_to_half, given.variables)
    stages = cascade.stages(given.ball, given.arrays.num_classes)
    verdicts = {
        name: judge(name, evaluator(given, apply), variables, given, stages)
        for name, apply in {"float32": deployed(given.run), "bfloat16": in_half}.items()
    }
    return _row("half", given, verdicts, dict.fromkeys(verdicts, stages))


def _to_half(leaf):
    """Floats rounded to bfloat16, in the dtype that they had."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf.astype(jnp.bfloat16).astype(leaf.dtype)


def targeted(given):
    """Rows of targeted attacks on a run's plain classifier; targets are the labels plus 1.

    PGD and CW (L2, one c, no search) against torchattacks' with identical weights, CW against
    torchattacks' mended one too (`torch_peers.targeted`), the targeted APGD, FAB and Square each
    alone, and AutoAttack with targets. CW knows no eps, and runs only under the run's own.

    Raises:
      ValueError: another norm than linf.
    """
    if given.ball.norm != "linf":
        raise ValueError(f"targeted compares attacks in linf, got {given.ball.norm}")
    targets = (given.arrays.labels + 1) % given.arrays.num_classes
    variables = peers.classifier(given.variables)
    plans = _targeted_plans(given)
    verdicts = {}
    for name, (ball, stages) in plans.items():
        judging = evaluator(given, given.run.module.apply, ball)
        verdicts[name] = judge(name, judging, variables, given, stages, targets)
    compared = {}
    if importlib.util.find_spec("torchattacks"):
        known = {"pgd": ["pgd"], "cw": ["cw", "cw, mended"]}
        compared = {name: known[name] for name in plans if name in known}
    names = [peer for known in compared.values() for peer in known]
    answer = _targeted_peers(given, variables, targets, names) if names else {}
    for name, (_, stages) in plans.items():
        for peer in compared.get(name, [None]):
            row = _targeted_row(given, name, verdicts[name], answer, peer)
            yield {**row, "attacks": {stage.name: repr(stage.attack) for stage in stages}}


def _targeted_plans(given):
    """{name: (threat, stages)}: PGD, CW in the whole box, AutoAttack's stages each and all.

    PGD starts at the image, so that it can be compared with the peer's image by image.
    """
    ball = given.ball
    pgd = attacks.pgd(ball, steps=PGD_STEPS, random_start=False, targeted=True)
    plans = {"pgd": (ball, [Stage("pgd", pgd, PGD_STEPS, PGD_STEPS)])}
    if ball == given.run.threat:
        low, high = ball.bounds
        length = (high - low) * math.sqrt(math.prod(given.arrays.images.shape[1:]))
        box = threat.L2(length, bounds=ball.bounds)
        options = dict(steps=CW_STEPS, initial_const=CW_CONST, learning_rate=CW_RATE)
        cw = attacks.cw(box, searches=1, minimal=True, targeted=True, **options)
        plans["cw"] = (box, [Stage("cw", cw, CW_STEPS, CW_STEPS)])
    stages = cascade.stages(ball, given.arrays.num_classes, version="targeted")
    alone = {stage.name: (ball, [stage]) for stage in stages}
    return {**plans, **alone, "autoattack": (ball, stages)}


def _targeted_peers(given, variables, targets, names):
    """What `torch_peers.targeted` writes of its attacks `names`, with our step sizes and c."""
    images, labels = data.to_float(given.arrays.images), given.arrays.labels
    options = dict(pgd_steps=PGD_STEPS, c=CW_CONST, lr=CW_RATE, cw_steps=CW_STEPS)
    options |= dict(targets=targets, alpha=2.5 * given.ball.eps / PGD_STEPS)
    problem = (given.run, given.ball, variables, images, labels)
    return peers.answer_of_torch("targeted", *problem, *names, **options)


def _targeted_row(given, name, verdict, answer, peer):
    """Targets hit by ours and by the peer, if there is one, and for CW the distances of both."""
    hit = ~verdict.robust
    row = {
        "suite": "targeted",
        "what": f"{given.text}: {'cw, in L2 without eps' if name == 'cw' else name}",
        "peer": f"torchattacks {peer}" if peer else None,
        "examples": len(hit),
        "hits": [int(hit.sum())],
        "seconds": [verdict.seconds],
    }
    if peer:
        row["hits"].append(int(answer[peer].sum()))
        row["seconds"].append(float(answer[f"{peer} seconds"]))
        row["only"] = {
            "ours": np.flatnonzero(hit & ~answer[peer]).tolist(),
            "peer": np.flatnonzero(answer[peer] & ~hit).tolist(),
        }
    if name == "cw":
        images = data.to_float(given.arrays.images)
        lengths = np.linalg.norm((verdict.x_adv - images).reshape(len(images), -1), axis=1)
        common = hit & answer[peer] if peer else hit
        both = [lengths, *([answer[f"{peer} distance"]] if peer else [])]
        row["distances"] = [float(one[common].mean()) if common.any() else None for one in both]
        row["hit_by_both"] = int(common.sum())
    return row
