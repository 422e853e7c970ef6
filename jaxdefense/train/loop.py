"""The train loop: any defence's phases, resumable to the bit.

A workdir holds config.json, metrics.jsonl, TensorBoard events, and the checkpoints `last` (to go
on from) and `best` (of the last phase, by accuracy on the validation split, never on the test
set). A run that was killed goes on from `last` and ends with the same bits as one that was not.
Networks that the config names by their workdir (a teacher) are copied into `given` at the start, so
that a workdir is all that its run needs; checkpoints do not repeat them.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from tqdm import tqdm

from jaxdefense import data, files
from jaxdefense.defenses import base
from jaxdefense.evaluation.evaluator import Evaluator
from jaxdefense.runs import checkpoint, sources
from jaxdefense.runs.run import Run, build, read_model
from jaxdefense.train import optim, plan
from jaxdefense.train.step import (
    Chunk,
    State,
    make_chunk,
    make_step,
    replicate,
    unreplicate,
)
from jaxdefense.types import Images, Key, Logits, PyTree

__all__ = ["Diverged", "Interrupted", "Trainer", "train"]


class Diverged(RuntimeError):
    """A loss was not finite."""


class Interrupted(RuntimeError):
    """The process was asked to end; the state was saved."""


class Log:
    """Scalars as JSON lines and TensorBoard events; a resumed run goes on where it was."""

    def __init__(self, workdir: pathlib.Path, step: int):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():  # what a killed run wrote after its last checkpoint
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            files.write_text(self._path, "".join(line + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step)

    def write(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """One line, flushed."""
        self._file.write(json.dumps({"step": step, **more, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        self._board.close()


@contextlib.contextmanager
def _sigterm() -> Iterator[list[int]]:
    """Collects SIGTERM in a list instead of dying; elsewhere than the main thread, nothing."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    except ValueError:  # signals belong to the main thread
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


class Trainer:
    """One run: its state, and what moves it forward."""

    def __init__(self, run: Run, workdir: pathlib.Path):
        self.run, self.workdir = run, workdir
        options = run.train
        arrays = run.arrays("train")
        pipeline = data.Streaming if options["streaming"] else data.OnDevice
        self.batches = pipeline(arrays, batch_size=options["batch_size"], seed=run.seed)
        self.per_epoch = self.batches.steps_per_epoch
        self.segments = plan.make(
            run.defense.phases,
            options["optimizer"],
            length=options["length"],
            per_epoch=self.per_epoch,
        )
        self.total = self.segments[-1].end
        self.examples = data.to_float(arrays.images[:1])
        self.held_out = run.arrays("validation")
        self.augment = data.make_augment(options["augment"], arrays.name)
        self.evaluator = Evaluator(run.apply(run.defense.primary), run.threat, batch_size=512)
        self._chunks: dict[Any, Chunk] = {}
        self.stores = {
            "last": checkpoint.Store(workdir / "last"),
            "best": checkpoint.Store(workdir / "best"),
        }
        self.best: dict[str, Any] = {}
        self.pretrained: dict[str, Any] = {}
        self.seconds = 0.0

    def interval(self, name: str) -> int:
        """The steps between two validations or checkpoints."""
        length = self.run.train[name]
        return max(1, optim.steps_of(length, total=self.total, per_epoch=self.per_epoch))

    def augment_view(self, key: Key, images: Images) -> dict[str, Images]:
        """The run's augmentation, for phases without a view of their own."""
        return {"image": self.augment(key, images)}

    def compiled_steps(self, segment: plan.Segment) -> Chunk:
        """The compiled steps of a segment; equal phases with equal optimisers share them."""
        name = (segment.phase, tuple(sorted(segment.optimizers.items())))
        if name not in self._chunks:
            step = make_step(
                segment.phase,
                segment.build(),
                segment.phase.view or self.augment_view,
                seed=self.run.seed,
                per_epoch=self.per_epoch,
            )
            self._chunks[name] = make_chunk(step, self.batches.gather)
        return self._chunks[name]

    def initial_state(self) -> State:
        """The state before the first step, on the host."""
        params, carry = self.run.init(self.examples)
        return State(jnp.zeros((), jnp.int32), params, carry, {})

    def begin_segment(self, state: State, segment: plan.Segment) -> State:
        """The state with what a segment renews: parameters of roles, optimiser states."""
        params, opt = dict(state.params), dict(state.opt)
        if segment.phase.fresh_params:
            key = jax.random.fold_in(jax.random.key(self.run.seed), segment.start)
            new, _ = self.run.defense.init(key, jnp.asarray(self.examples))
            params |= {role: new[role] for role in segment.phase.fresh_params}
        built = segment.build()
        opt |= {role: built[role].init(params[role]) for role in segment.fresh}
        return State(state.step, params, state.carry, opt)

    def restore_state(self) -> State:
        """The last checkpoint's state, or a fresh one."""
        last = self.stores["last"]
        if not last.steps():
            self.pretrained = self.score_pretrained()
            return self.initial_state()
        meta = last.meta()
        self.best, self.seconds = meta["best"], meta["seconds"]
        self.pretrained = meta.get("given", {})

        def passed():
            state = self.initial_state()
            for segment in self.segments:
                if segment.start < meta["step"]:
                    state = self.begin_segment(state, segment)
            return state

        like = jax.eval_shape(passed)
        model = read_model(last, self.run.defense, like.params, like.carry)
        opt = last.restore("optimizer", like.opt)
        return State(jnp.int32(meta["step"]), model["params"], model["carry"], opt)

    def save_checkpoint(self, kind: str, state: State) -> None:
        """Writes a checkpoint of the replicated state; `best` needs no optimiser."""
        if jax.process_index() != 0:
            return
        host = unreplicate(state)
        own = self.run.defense.without_pretrained
        items = {"model": {"params": own(host.params), "carry": own(host.carry)}}
        if kind == "last":
            items["optimizer"] = host.opt
        meta = {"best": self.best, "seconds": self.seconds}
        if self.pretrained:
            meta["given"] = self.pretrained
        self.stores[kind].save(int(host.step), items, meta)

    def validate(self, state: State) -> dict[str, float]:
        """Clean and robust accuracy on the validation split, percent."""
        host = unreplicate(state)
        return self.score_network(self.evaluator, {"params": host.params, "carry": host.carry})

    def score_network(self, evaluator: Evaluator, variables: PyTree) -> dict[str, float]:
        """What `validate` returns, of any network."""
        arrays = self.held_out
        bits = evaluator.bits(
            variables,
            data.to_float(arrays.images),
            arrays.labels,
            arrays.ids,
            {"robust": self.run.validation},
            seed=self.run.seed,
        )
        return {f"validation_{name}": 100 * float(b.mean()) for name, b in bits.items()}

    def score_pretrained(self) -> dict[str, dict[str, Any]]:
        """{role: where a given network comes from, and its accuracy on the validation split}."""
        found = {}
        for role, network in self.run.defense.pretrained.items():
            net = base.Net(network.module, role)

            def apply(variables: PyTree, x: Images, net: base.Net = net) -> Logits:
                return net.predict(*variables)(x)

            evaluator = Evaluator(apply, self.run.threat, batch_size=512)
            scores = self.score_network(evaluator, network.init(role))
            found[role] = {"source": network.source, **scores}
        return found

    def is_new_best(self, scores: Mapping[str, float], step: int) -> bool:
        """Whether these scores beat the best so far; ties go to the other score, then to later."""
        first = "validation_" + self.run.train["select"]
        second = {"validation_robust": "validation_clean"}.get(first, "validation_robust")
        if self.best and (scores[first], scores[second]) < (self.best[first], self.best[second]):
            return False
        self.best = {"step": step, **scores}
        return True

    def run_to_end(self, *, progress: bool) -> dict[str, Any]:
        """Runs to the end; returns the summary that the record's "training" holds."""
        state = self.restore_state()
        step = int(state.step)
        for role, scores in self.pretrained.items():
            told = {name: v for name, v in scores.items() if name != "source"}
            tqdm.write(f"{role} {scores['source']}: " + _percent(told), file=sys.stderr)
        with (
            contextlib.closing(Log(self.workdir, step)) as log,
            tqdm(total=self.total, initial=step, disable=not progress, unit="step") as bar,
            _sigterm() as received,
        ):
            for segment in self.segments:
                if segment.end <= step:
                    continue
                if segment.start == step:
                    state = self.begin_segment(state, segment)
                state = replicate(state)
                while step < segment.end:
                    began = time.monotonic()
                    end = self._next_stop(step, segment)
                    state, sums = self._advance(state, segment, step, end)
                    bar.update(end - step)
                    step = end
                    self._report(log, bar, segment, step, sums)
                    if self._due("validate_every", step):
                        scores = self.validate(state)
                        log.write(step, scores, epoch=step / self.per_epoch)
                        bar.write(_line(step, self.per_epoch, scores))
                        # What earlier phases have is not yet the defence.
                        last = segment.phase is self.segments[-1].phase
                        if last and self.is_new_best(scores, step):
                            self.save_checkpoint("best", state)
                    self.seconds += time.monotonic() - began
                    if received or self._due("checkpoint_every", step):
                        self.save_checkpoint("last", state)
                    if received:
                        raise Interrupted(
                            f"signal {received[0]} at step {step}; saved in {self.workdir}: "
                            f"the same command goes on from there"
                        )
                state = unreplicate(state)
        summary = {"steps": self.total, "seconds": self.seconds, "best": self.best}
        return {**summary, "given": self.pretrained} if self.pretrained else summary

    def _next_stop(self, step: int, segment: plan.Segment) -> int:
        """Where the next dispatch ends: a validation, a checkpoint, a phase, or at its longest.

        Where dispatches end changes no bit, since a step depends on its own number only.
        """
        every = [self.interval(name) for name in ("validate_every", "checkpoint_every")]
        longest = step + self.run.train["steps_per_dispatch"]
        return min(segment.end, longest, *(step - step % length + length for length in every))

    def _due(self, name: str, step: int) -> bool:
        return step == self.total or step % self.interval(name) == 0

    def _advance(
        self, state: State, segment: plan.Segment, step: int, end: int
    ) -> tuple[State, Any]:
        """The replicated state after the steps step..end-1, and their metrics' sums."""
        items = self._items(step, end - step)
        chunk = self.compiled_steps(segment)
        state, sums, bad = chunk(state, self.batches.resident, items, jnp.int32(end - step))
        if (at := int(bad[0])) >= 0:
            good = {kind: store.steps() for kind, store in self.stores.items()}
            raise Diverged(
                f"the loss was not finite at step {at} (epoch {at / self.per_epoch:.2f}); "
                f"the last good checkpoints in {self.workdir}: {good}"
            )
        return state, sums

    def _items(self, step: int, count: int) -> Any:
        """The next `count` steps' items, padded to the one shape that is compiled."""
        missing = self.run.train["steps_per_dispatch"] - count

        def pad(leaf):
            return np.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2), mode="edge")

        return jax.tree.map(pad, self.batches.chunk(step, count))

    def _report(self, log: Log, bar: tqdm, segment: plan.Segment, step: int, sums: Any) -> None:
        values = {n: float(s[0]) / max(float(c[0]), 1e-12) for n, (s, c) in sums.items()}
        log.write(step, values, epoch=step / self.per_epoch, phase=segment.phase.name)
        bar.set_postfix_str(
            segment.phase.name + " " + " ".join(f"{n} {v:.3f}" for n, v in values.items())
        )


def _line(step: int, per_epoch: int, scores: Mapping[str, float]) -> str:
    return f"epoch {step / per_epoch:.4g}: " + _percent(scores)


def _percent(scores: Mapping[str, float]) -> str:
    shown = ", ".join(f"{name.removeprefix('validation_')} {v:.2f} %" for name, v in scores.items())
    return f"validation {shown}"


def _claim(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Writes config.json, or checks that the workdir belongs to this config."""
    path = workdir / "config.json"
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        files.write_text(path, text)
        return
    there = json.loads(path.read_text())
    if there != json.loads(text):
        changed = [k for k in {*there, *config} if there.get(k) != json.loads(text).get(k)]
        raise ValueError(
            f"{workdir} holds a run of another config (it differs in {sorted(changed)}); "
            f"choose another workdir, or remove it"
        )


def train(
    config: Mapping[str, Any], workdir: str | os.PathLike, *, progress: bool = True
) -> dict[str, Any]:
    """Trains what a config describes, or goes on with it.

    Args:
      config: plain values, see `jaxdefense.runs.run`.
      workdir: its own folder; made if it is not there.
      progress: show a bar with rate and time left.

    Returns:
      {"steps", "seconds", "best": {"step", "validation_clean", "validation_robust"}}, and "given",
      {role: {"source", "validation_clean", "validation_robust"}}, where networks were given.

    Raises:
      ValueError: a wrong config, or a workdir of another config; before any compilation.
      Diverged: a loss that is not finite; names the step and the last good checkpoint.
      Interrupted: after SIGTERM, when the state is saved.
    """
    workdir = pathlib.Path(workdir)
    run = build(config, workdir=workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _claim(config, workdir)
    if jax.process_index() == 0:
        sources.copy_sources(run.sources, workdir)
    trainer = Trainer(run, workdir)
    try:
        return trainer.run_to_end(progress=progress)
    finally:
        for store in trainer.stores.values():
            store.close()
