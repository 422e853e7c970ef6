"""Training: `train(config, workdir)` builds the run, and `Trainer` takes it to its end.

A config becomes a run in `runs.build`; here its phases become segments (`plan`), and segments
compiled steps (`step`). A run that was killed goes on from its last checkpoint and ends with the
same bits as one that was not.

A workdir holds config.json, metrics.jsonl, TensorBoard events, and the checkpoints `last` (to go
on from) and `best` (of the last phase, by accuracy on the validation split, never on the test
set). Networks that the config names by their workdir (a teacher) are copied into `given` at the
start, so that a workdir is all that its run needs; checkpoints do not repeat them.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from tqdm import tqdm

from jaxdefense import files
from jaxdefense.data import Arrays, Encoded, OnDevice, Streaming, make_augment, to_float
from jaxdefense.defenses import base
from jaxdefense.defenses.base import Metrics
from jaxdefense.evaluation import protocols
from jaxdefense.evaluation.evaluator import Evaluator
from jaxdefense.runs import checkpoint, sources, start
from jaxdefense.runs.run import Run, build, read_log, read_model
from jaxdefense.train import optim, plan, refused
from jaxdefense.train.step import (
    RunSteps,
    State,
    compile_steps,
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
    """Scalars as JSON lines and TensorBoard events; a resumed run goes on where it was.

    Args:
      workdir: of the run.
      step: that the run starts from; what a killed run wrote of later ones is dropped.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():  # what a killed run wrote after its last checkpoint
            kept = [line for line in read_log(self._path) if line["step"] <= step]
            files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step)

    def write(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """Writes one line at once.

        Args:
          step: of the run.
          values: scalars by name.
          **more: further values of the line, which TensorBoard does not get.
        """
        self._file.write(json.dumps({"step": step, **more, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes both files, everything written."""
        self._file.close()
        self._board.close()


@contextlib.contextmanager
def _collect_sigterm() -> Iterator[list[int]]:
    """A list that SIGTERM is appended to instead of ending the process.

    Outside the main thread, where Python takes no signals, it stays empty.
    """
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
    """Trains one run, from its last checkpoint where there is one, to its end.

    A run is a list of segments (`plan.Segment`): a phase between two steps. A segment is computed
    in dispatches of several steps; each ends where a validation, a checkpoint or the segment does.

    Args:
      run: of `runs.build`.
      workdir: of the run, where its log and checkpoints are.

    Raises:
      ValueError: train options that do not fit the data, the phases or the optimiser.
    """

    def __init__(self, run: Run, workdir: pathlib.Path):
        self.run, self.workdir = run, workdir
        options = run.train
        arrays = run.arrays("train")
        streaming = options["streaming"] or isinstance(arrays.images, Encoded)
        pipeline = Streaming if streaming else OnDevice
        self.batches = pipeline(arrays, batch_size=options["batch_size"], seed=run.seed)
        self.per_epoch = self.batches.steps_per_epoch
        self.segments = plan.make(
            run.defense.phases,
            options["optimizer"],
            length=options["length"],
            per_epoch=self.per_epoch,
        )
        self.total = self.segments[-1].end
        for name in ("validate_every", "checkpoint_every"):
            plan.check_interval(name, options[name])
        protocols.check_audit_options(run.config["evaluation"].get("audit", {}), run.threat)
        self.example_image = to_float(arrays.images[:1])
        self.held_out = run.arrays("validation")
        self.augment = make_augment(options["augment"])
        self.judged = run.judging_batch(arrays.images.shape)  # images at once
        self.evaluator = Evaluator(
            run.apply(run.defense.primary), run.threat, batch_size=self.judged
        )
        self._compiled: dict[Any, RunSteps] = {}
        self.stores = {
            "last": checkpoint.Store(workdir / "last"),
            "best": checkpoint.Store(workdir / "best"),
        }
        self.start: start.Start | None = None
        if options["init_from"] or options["frozen"]:
            shapes = jax.eval_shape(run.init, self.example_image)
            if options["init_from"] and not self.stores["last"].steps():
                self.start = start.load_start(options["init_from"])
                self.start.apply(*shapes)  # refuses what does not fit
            start.check_frozen(options["frozen"], shapes[0])
        self.best: dict[str, Any] = {}
        self.pretrained_scores: dict[str, Any] = {}
        self.seconds = 0.0

    def run_to_end(self, *, progress: bool) -> dict[str, Any]:
        """Trains until the last segment ends.

        Args:
          progress: show a bar.

        Returns:
          What `train` returns.

        Raises:
          Diverged: a loss that is not finite.
          Interrupted: after SIGTERM, when the state is saved.
        """
        state = self.restore_state()
        step = int(state.step)
        self._print_notes()
        with (
            contextlib.closing(Log(self.workdir, step)) as log,
            tqdm(total=self.total, initial=step, disable=not progress, unit="step") as bar,
            _collect_sigterm() as received,
        ):
            for segment in self.segments:
                if segment.end > int(state.step):
                    state = self._run_segment(segment, state, log, bar, received)
        summary = {"steps": self.total, "seconds": self.seconds, "best": self.best}
        return {**summary, "given": self.pretrained_scores} if self.pretrained_scores else summary

    def _run_segment(
        self, segment: plan.Segment, state: State, log: Log, bar: tqdm, received: list[int]
    ) -> State:
        """The state at a segment's end, on the host, from one at its start or inside it.

        Args:
          segment: of the run.
          state: on the host.
          log: of the run.
          bar: shows the steps.
          received: signals; after the first, the state is saved and `Interrupted` raised.
        """
        step = int(state.step)
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
                self._validate_at(step, segment, state, log, bar)
            self.seconds += time.monotonic() - began
            if received or self._due("checkpoint_every", step):
                self.save_checkpoint("last", state)
            if received:
                raise Interrupted(
                    f"signal {received[0]} at step {step}; saved in {self.workdir}: "
                    f"the same command goes on from there"
                )
        return unreplicate(state)

    # The state: where it comes from, and where it is kept.

    def initial_state(self) -> State:
        """The state before the first step, on the host."""
        params, carry = self.run.init(self.example_image)
        if self.start:
            params, carry = self.start.apply(params, carry)
        return State(jnp.zeros((), jnp.int32), params, carry, {})

    def begin_segment(self, state: State, segment: plan.Segment) -> State:
        """The state at a segment's first step: with fresh parameters and optimisers where due.

        Args:
          state: on the host, at the end of the segment before.
          segment: which is about to begin.
        """
        params, opt = dict(state.params), dict(state.opt)
        if segment.phase.fresh_params:
            key = jax.random.fold_in(jax.random.key(self.run.seed), segment.start)
            new, _ = self.run.defense.init(key, jnp.asarray(self.example_image))
            params |= {role: new[role] for role in segment.phase.fresh_params}
        built = segment.build()
        opt |= {role: built[role].init(params[role]) for role in segment.fresh}
        return State(state.step, params, state.carry, opt)

    def restore_state(self) -> State:
        """The last checkpoint's state, or the initial one where there is none, on the host."""
        last = self.stores["last"]
        if not last.steps():
            self.pretrained_scores = self.score_pretrained()
            return self.initial_state()
        meta = last.meta()
        self.best, self.seconds = meta["best"], meta["seconds"]
        self.pretrained_scores = meta.get("given", {})

        def state_at_checkpoint() -> State:
            """Only its structure is used: which roles have optimisers depends on past segments."""
            state = self.initial_state()
            for segment in self.segments:
                if segment.start < meta["step"]:
                    state = self.begin_segment(state, segment)
            return state

        like = jax.eval_shape(state_at_checkpoint)
        model = read_model(last, self.run.defense, like.params, like.carry)
        opt = last.restore("optimizer", like.opt)
        return State(jnp.int32(meta["step"]), model["params"], model["carry"], opt)

    def save_checkpoint(self, kind: str, state: State) -> None:
        """Writes a checkpoint, without the pretrained networks.

        Args:
          kind: "last", with the optimisers, to go on from; or "best", to deploy.
          state: replicated.
        """
        if jax.process_index() != 0:
            return
        host = unreplicate(state)
        own = self.run.defense.without_pretrained
        items = {"model": {"params": own(host.params), "carry": own(host.carry)}}
        if kind == "last":
            items["optimizer"] = host.opt
        meta = {"best": self.best, "seconds": self.seconds}
        if self.pretrained_scores:
            meta["given"] = self.pretrained_scores
        self.stores[kind].save(int(host.step), items, meta)

    # Steps.

    def interval(self, name: str) -> int:
        """The steps from one validation or checkpoint to the next.

        Args:
          name: "validate_every" or "checkpoint_every".
        """
        length = self.run.train[name]
        return max(1, optim.steps_of(length, total=self.total, per_epoch=self.per_epoch))

    def _due(self, name: str, step: int) -> bool:
        """Whether a validation or checkpoint comes at a step; both come at the last one."""
        return step == self.total or step % self.interval(name) == 0

    def _next_stop(self, step: int, segment: plan.Segment) -> int:
        """Where the next dispatch ends: a validation, a checkpoint, a segment, or at its longest.

        Where dispatches end changes no bit, since a step depends on its own number only.
        """
        every = [self.interval(name) for name in ("validate_every", "checkpoint_every")]
        longest = step + self.run.train["steps_per_dispatch"]
        return min(segment.end, longest, *(step - step % length + length for length in every))

    def _advance(
        self, state: State, segment: plan.Segment, step: int, end: int
    ) -> tuple[State, Metrics]:
        """The replicated state after the steps step..end-1, and their metrics' sums."""
        items = self._padded_items(step, end - step)
        chunk = self.compiled_steps(segment)
        state, sums, bad = chunk(state, self.batches.resident, items, jnp.int32(end - step))
        if (at := int(bad[0])) >= 0:
            good = {kind: store.steps() for kind, store in self.stores.items()}
            raise Diverged(
                f"the loss was not finite at step {at} (epoch {at / self.per_epoch:.2f}); "
                f"the last good checkpoints in {self.workdir}: {good}"
            )
        return state, sums

    def _padded_items(self, step: int, count: int) -> PyTree:
        """The next `count` steps' items, padded to the one shape that is compiled."""
        missing = self.run.train["steps_per_dispatch"] - count

        def pad(leaf: np.ndarray) -> np.ndarray:
            return np.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2), mode="edge")

        return jax.tree.map(pad, self.batches.chunk(step, count))

    def compiled_steps(self, segment: plan.Segment) -> RunSteps:
        """The compiled steps of a segment; equal phases with equal optimisers share them.

        Args:
          segment: of the run.
        """
        name = (segment.phase, tuple(sorted(segment.optimizers.items())))
        if name not in self._compiled:
            step = make_step(
                segment.phase,
                segment.build(),
                segment.phase.view or self.augment_view,
                seed=self.run.seed,
                per_epoch=self.per_epoch,
                frozen=tuple(self.run.train["frozen"]),
            )
            self._compiled[name] = compile_steps(step, self.batches.gather)
        return self._compiled[name]

    def augment_view(self, key: Key, images: Images) -> dict[str, Images]:
        """The run's augmentation, for phases without a view of their own.

        Args:
          key: one typed key.
          images: (B, H, W, C) in [0, 1].
        """
        return {"image": self.augment(key, images)}

    # Validation.

    def validate(self, state: State) -> dict[str, float]:
        """Clean and robust accuracy on the validation split, percent.

        Args:
          state: replicated.
        """
        host = unreplicate(state)
        return self.score_network(self.evaluator, {"params": host.params, "carry": host.carry})

    def score_network(self, evaluator: Evaluator, variables: PyTree) -> dict[str, float]:
        """Any network's clean and robust accuracy on the validation split, percent.

        Args:
          evaluator: of the network.
          variables: its weights.

        Returns:
          {"validation_clean", "validation_robust"}.
        """
        arrays = self.held_out
        bits = evaluator.bits(
            variables,
            to_float(arrays.images),
            arrays.labels,
            arrays.ids,
            {"robust": self.run.validation},
            seed=self.run.seed,
        )
        return {f"validation_{name}": 100 * float(b.mean()) for name, b in bits.items()}

    def score_pretrained(self) -> dict[str, dict[str, Any]]:
        """Where each pretrained network (a teacher) comes from, and what `validate` says of it.

        Returns:
          {role: {"source", "validation_clean", "validation_robust"}}.
        """
        scores = {}
        for role, network in self.run.defense.pretrained.items():
            net = base.Net(network.module, role)

            def apply(variables: PyTree, x: Images, net: base.Net = net) -> Logits:
                return net.predict(*variables)(x)

            evaluator = Evaluator(apply, self.run.threat, batch_size=self.judged)
            accuracies = self.score_network(evaluator, network.init(role))
            scores[role] = {"source": network.source, **accuracies}
        return scores

    def update_best(self, scores: Mapping[str, float], step: int) -> bool:
        """Whether these scores beat the best so far, which they then replace.

        Ties go to the other score, then to the later step.

        Args:
          scores: of `validate`.
          step: that they are of.
        """
        first = "validation_" + self.run.train["select"]
        second = {"validation_robust": "validation_clean"}.get(first, "validation_robust")
        if self.best and (scores[first], scores[second]) < (self.best[first], self.best[second]):
            return False
        self.best = {"step": step, **scores}
        return True

    def _validate_at(
        self, step: int, segment: plan.Segment, state: State, log: Log, bar: tqdm
    ) -> None:
        """Validates, logs, and saves a state of the last phase that is the best so far."""
        scores = self.validate(state)
        epoch = step / self.per_epoch
        log.write(step, scores, epoch=epoch)
        bar.write(f"epoch {epoch:.4g}: {_format_scores(scores)}")
        # What earlier phases have is not yet the defence.
        is_last = segment.phase is self.segments[-1].phase
        if is_last and self.update_best(scores, step):
            self.save_checkpoint("best", state)

    # What a reader sees.

    def _report(self, log: Log, bar: tqdm, segment: plan.Segment, step: int, sums: Metrics) -> None:
        """Logs and shows the means of a dispatch's metrics."""
        values = {n: float(s[0]) / max(float(c[0]), 1e-12) for n, (s, c) in sums.items()}
        log.write(step, values, epoch=step / self.per_epoch, phase=segment.phase.name)
        bar.set_postfix_str(
            segment.phase.name + " " + " ".join(f"{n} {v:.3f}" for n, v in values.items())
        )

    def _print_notes(self) -> None:
        """Writes what was done to the data, and the pretrained networks' scores, to stderr."""
        for note in self.held_out.notes:
            tqdm.write(f"{self.held_out.name}: {note}", file=sys.stderr)
        for role, scores in self.pretrained_scores.items():
            accuracies = {name: v for name, v in scores.items() if name != "source"}
            line = f"{role} {scores['source']}: {_format_scores(accuracies)}"
            tqdm.write(line, file=sys.stderr)


def _format_scores(scores: Mapping[str, float]) -> str:
    shown = ", ".join(f"{name.removeprefix('validation_')} {v:.2f} %" for name, v in scores.items())
    return f"validation {shown}"


def _check_config(config: Mapping[str, Any], path: pathlib.Path) -> None:
    """The workdir whose config.json is at `path` belongs to this config, or is new."""
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), json.loads(json.dumps(config))
    if before != now:
        changed = [
            k for k in {**before, **now} if (k in before) != (k in now) or before[k] != now[k]
        ]
        raise ValueError(
            f"{path.parent} holds a run of another config (it differs in {sorted(changed)}); "
            f"choose another workdir, or remove it"
        )


@refused.leaves_nothing
def train(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    model: Any = None,
    data: Sequence[Arrays] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains what a config describes, or goes on with it where it was interrupted.

    Args:
      config: plain values, see `jaxdefense.runs.run`.
      workdir: its own folder; made if it is not there.
      model: a network of the user's own in place of the config's section "model": a linen module,
        an NNX module or its class, or a pair (init, apply), see `models.adapt`. The same call goes
        on with it, and `runs.restore` needs it again.
      data: images of the user's own in place of the section "dataset": (train, validation, test),
        as `data.from_arrays` and `data.from_folder` return them. Likewise.
      progress: show a bar with rate and time left.

    Returns:
      {"steps", "seconds", "best": {"step", "validation_clean", "validation_robust"}}, and where the
      config names pretrained networks, "given": {role: {"source", "validation_clean",
      "validation_robust"}}.

    Raises:
      ValueError: a wrong config, or a workdir of another config; before any compilation.
      Diverged: a loss that is not finite; names the step and the last good checkpoint.
      Interrupted: after SIGTERM, when the state is saved.
    """
    workdir = pathlib.Path(workdir)
    run = build(config, workdir=workdir, model=model, data=data)
    config = run.config
    path = workdir / "config.json"
    _check_config(config, path)
    trainer = Trainer(run, workdir)  # refuses what it cannot train, before the workdir is claimed
    try:
        if not path.exists():
            files.write_text(path, json.dumps(config, indent=1, sort_keys=True) + "\n")
        if jax.process_index() == 0:
            sources.copy_sources(run.sources, workdir)
        return trainer.run_to_end(progress=progress)
    finally:
        for store in trainer.stores.values():
            store.close()
