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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdefense import distributed, validate
from jaxdefense.data import Arrays, Encoded, OnDevice, Streaming, make_augment, to_float
from jaxdefense.defenses import base
from jaxdefense.defenses.base import Batch, Metrics
from jaxdefense.evaluation import memory, protocols
from jaxdefense.evaluation.evaluator import Evaluator
from jaxdefense.interrupts import Interrupted, Requests
from jaxdefense.runs import checkpoint, config_file, sources, start
from jaxdefense.runs.run import Run, best_of, build, read_model
from jaxdefense.train import collapse, devices, optim, plan, recovery, refused
from jaxdefense.train.candidates import Candidates, choose_best
from jaxdefense.train.log import Log, hash_log
from jaxdefense.train.pace import Pace
from jaxdefense.train.step import (
    RunSteps,
    State,
    compile_steps,
    make_step,
    metric_shapes,
    replicate,
    replicate_like,
    unreplicate,
    zero_sums,
)
from jaxdefense.types import Attack, Images, Logits, PyTree

__all__ = ["Diverged", "Interrupted", "Trainer", "train"]


class Diverged(RuntimeError):
    """A loss was not finite."""


class Trainer:
    """Trains one run, from its last checkpoint where there is one, to its end.

    A run is a list of segments (`plan.Segment`): a phase between two steps. A segment is computed
    in dispatches of several steps; each ends where a validation, a checkpoint or the segment does,
    and has a line in the log. Where its steps are slow it is sent in pieces (`Pace`), between which
    the run can be interrupted.

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
        augment = make_augment(options["augment"])
        # Not a method: what is compiled should not refer to the trainer and its data.
        self.augment_view: base.View = lambda key, images: {"image": augment(key, images)}
        self.judged = run.judging_batch(arrays.images.shape)  # images at once
        asked = run.config["evaluation"].get("batch_size")
        if asked and jax.default_backend() != "cpu":  # where memory may be too short for so many
            self.judged = min(self.judged, asked)
        self.evaluator = Evaluator(
            run.apply(run.defense.primary),
            run.threat,
            batch_size=self.judged,
            before_dispatch=self._leave_if_asked,
        )
        self.requests = Requests()
        self._compiled: dict[Any, RunSteps] = {}
        self._zeros: dict[Any, Metrics] = {}  # metric sums, by what is compiled
        self._paces: dict[Any, Pace] = {}
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
        self.candidates: Candidates | None = None
        if run.second_attack is not None:
            self.candidates = Candidates(workdir / "candidates", keep=best_of(options))
        self.watch = collapse.Watch(len(self.held_out), arrays.num_classes)
        self.one_class: int | None = None  # that the last network validated answers
        self.devices: list[dict[str, Any]] = []  # of `devices.history`
        self.pretrained_scores: dict[str, Any] = {}
        self.seconds = 0.0
        self.memory: int | None = None  # of `memory.peak_memory`
        self.unfinished: dict[str, Any] = {}  # what the last checkpoint has begun, see `_keep`
        self.logged = ""  # the log's checksum at the last checkpoint

    def run_to_end(self, *, progress: bool) -> dict[str, Any]:
        """Trains until the last segment ends.

        Args:
          progress: show a bar.

        Returns:
          What `train` returns.

        Raises:
          Diverged: a loss that is not finite.
          Interrupted: after SIGTERM or SIGHUP, when the state is saved.
          KeyboardInterrupt: after Ctrl-C, likewise.
          OSError: the disk is full or read-only; the last checkpoint is whole.
        """
        with self.requests:
            try:
                return self._run_segments(progress=progress)
            except _LeftValidation:  # one that no checkpoint waits for
                self._stop()

    def _run_segments(self, *, progress: bool) -> dict[str, Any]:
        """`run_to_end`, signals being collected."""
        with recovery.offering_best(self.workdir):
            state = self.restore_state()
        self._check_best(state)
        step = int(state.step)
        self._print_notes(step)
        with (
            contextlib.closing(Log(self.workdir, step, self.unfinished, self.logged)) as log,
            tqdm(total=self.total, initial=step, disable=not progress, unit="step") as bar,
        ):
            if len(self.devices) > 1 and self.devices[-1]["step"] == step:
                log.write(step, {}, **devices.count())
            if self.unfinished.get("validation"):
                self._validate_unfinished(state, log, bar)
            for segment in self.segments:
                if segment.end > int(state.step):
                    state = self._run_segment(segment, state, log, bar)
        if self.candidates is not None and self.run.second_attack is not None:
            self.choose_candidate(self.candidates, self.run.second_attack)
        summary = {
            "steps": self.total,
            "seconds": self.seconds,
            "best": self.best,
            "warnings": self.watch.told(),
        }
        return {**summary, "given": self.pretrained_scores} if self.pretrained_scores else summary

    def _run_segment(self, segment: plan.Segment, state: State, log: Log, bar: tqdm) -> State:
        """The state at a segment's end, on the host, from one at its start or inside it.

        Args:
          segment: of the run.
          state: on the host.
          log: of the run.
          bar: shows the steps.
        """
        step = int(state.step)
        if segment.start == step:
            state = self.begin_segment(state, segment)
        state = replicate(distributed.broadcast(state))  # equal by construction
        # A dispatch goes from `first` to `stop`; `sums` are of its steps so far.
        first, sums = self._unfinished_dispatch(step, state)
        while step < segment.end:
            began = time.monotonic()
            stop = self._next_stop(first, segment)
            end = step + self._piece(segment, stop - step)
            state, sums = self._advance(state, segment, step, end, sums)
            bar.update(end - step)
            self._pace(segment).measured(end - step, time.monotonic() - began)
            step = end
            if step < stop:
                self.seconds += time.monotonic() - began
                if self.requests.asked():
                    dispatch = {"first": first, "sums": _to_lists(sums)}
                    self._keep(state, {"dispatch": dispatch})
                continue
            self._report(log, bar, segment, step, sums)
            first, sums = step, None
            if self._due("validate_every", step):
                try:
                    self._validate_at(step, segment, state, log, bar)
                except _LeftValidation:
                    self._keep(state, {"validation": True})
            self.seconds += time.monotonic() - began
            if self.requests.asked():
                self._keep(state, {})
            if self._due("checkpoint_every", step):
                self.save_checkpoint("last", state)
        return unreplicate(state)

    # Interruptions: what was asked, and how the run goes on.

    def _leave_if_asked(self) -> None:
        """Called between two dispatches of a validation, which a request ends at once."""
        if self.requests.asked():
            raise _LeftValidation

    def _keep(self, state: State, unfinished: Mapping[str, Any]) -> NoReturn:
        """Saves a state and ends the run.

        Args:
          state: replicated.
          unfinished: what was begun at its step: a "validation" that is due, or a "dispatch", of
            which "first" is the first step and "sums" are the metrics' sums since.

        Raises:
          Interrupted: always, or KeyboardInterrupt: see `Requests.stop`.
        """
        self.save_checkpoint("last", state, unfinished)
        self._stop()

    def _stop(self) -> NoReturn:
        """Ends the run; says from where the same command goes on."""
        steps = self.stores["last"].steps()
        kept = f"step {steps[-1]} is saved in {self.workdir}" if steps else "no step is done yet"
        self.requests.stop(f"{kept}: the same command goes on from there")

    def _unfinished_dispatch(self, step: int, state: State) -> tuple[int, Metrics | None]:
        """The first step and the metrics' sums of the dispatch that a checkpoint lies in."""
        dispatch = self.unfinished.pop("dispatch", None)
        if dispatch is None:
            return step, None
        return dispatch["first"], replicate_like(_from_lists(dispatch["sums"]), state.step)

    def _validate_unfinished(self, state: State, log: Log, bar: tqdm) -> None:
        """The validation that an interruption left, at the step of the last checkpoint."""
        step = int(state.step)
        segment = next(one for one in self.segments if one.start < step <= one.end)
        self._validate_at(step, segment, replicate(state), log, bar)
        self.unfinished = {}
        self.stores["last"].replace_meta(self._meta("last"))

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
            recovery.note_lost_last(self.workdir)
            self.devices = devices.history([], 0)
            self.pretrained_scores = self.score_pretrained()
            return self.initial_state()
        meta = last.meta()
        self.best, self.seconds = meta["best"], meta["seconds"]
        self.memory = meta.get("memory")
        self.pretrained_scores = meta.get("given", {})
        self.devices = devices.history(meta.get("devices", []), meta["step"])
        self.unfinished, self.logged = meta.get("unfinished", {}), meta.get("log", "")
        self.watch.restore(meta)
        if self.candidates is not None:
            self.candidates.scores = meta["kept"]

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

    def _check_best(self, state: State) -> None:
        """Says so if the best checkpoint is lost; one of the step of `last` is written again."""
        if self.candidates is not None:  # `best` is chosen at the end
            return
        if not (lost := recovery.explain_lost_best(self.stores["best"], self.best)):
            return
        if self.best["step"] == int(state.step):
            self.save_checkpoint("best", replicate(state))
            recovery.note(f"{lost}: written again from `last`, which is of the same step")
            return
        self.best = {}
        way = "the next validation makes a new one"
        if int(state.step) == self.total:
            way = "no validation is left to make a new one; evaluate with --checkpoint=last"
        recovery.note(f"{lost}: {way}")

    def save_checkpoint(
        self, kind: str, state: State, unfinished: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint, without the pretrained networks.

        Args:
          kind: "last", with the optimisers, to go on from; or "best", to deploy.
          state: replicated.
          unfinished: of an interrupted run, see `_keep`.
        """
        host = unreplicate(state)
        own = self.run.defense.without_pretrained
        items = {"model": {"params": own(host.params), "carry": own(host.carry)}}
        if kind == "last":
            items["optimizer"] = host.opt
        self.stores[kind].save(int(host.step), items, self._meta(kind, unfinished))
        if kind == "last" and self.candidates is not None:
            self.candidates.prune()
        if kind == "last":
            distributed.tell(
                f"the last checkpoint in {self.workdir} is that of step {int(host.step)}: the same "
                f"command, in every process, goes on from there"
            )

    def _meta(self, kind: str, unfinished: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A checkpoint's metadata."""
        self.memory = max(self.memory or 0, memory.peak_memory() or 0) or None
        meta: dict[str, Any] = {
            "best": self.best,
            "steps": self.total,
            "seconds": self.seconds,
            "memory": self.memory,
            "warnings": self.watch.told(),
            "devices": self.devices,
            "config": self.run.config,
        }
        if kind == "last":
            meta["log"] = distributed.from_writer(lambda: hash_log(self.workdir))
            meta["watch"] = self.watch.state()
            if self.candidates is not None:
                meta["kept"] = self.candidates.scores
        if self.pretrained_scores:
            meta["given"] = self.pretrained_scores
        if unfinished:
            meta["unfinished"] = dict(unfinished)
        return meta

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
        self, state: State, segment: plan.Segment, step: int, end: int, sums: Metrics | None
    ) -> tuple[State, Metrics]:
        """The replicated state after the steps step..end-1, their metrics added to `sums`."""
        items = self._padded_items(step, end - step)
        resident, count = self.batches.resident, jnp.int32(end - step)
        chunk = self.compiled_steps(segment)
        if sums is None:
            sums = self._zero_sums(segment, state, items)
        before, so_far, devices = state, sums, jax.device_count()
        with memory.explain_out_of_memory(
            "a step of training",
            self.batches.batch_size,
            lambda batch: chunk.lower(before, resident, items, count, so_far, batch // devices),
            multiple=devices,
            advice="--config.train.batch_size={batch}; training's results change with it",
        ):
            state, sums, bad = chunk(state, resident, items, count, sums)
            at = int(bad[0])
        if at >= 0:
            good = [
                f"{kind!r} of step {store.steps()[-1]}"
                for kind, store in self.stores.items()
                if store.steps()
            ]
            kept = f"checkpoints {' and '.join(good)}" if good else "no checkpoint yet"
            raise Diverged(
                f"the loss was not finite at step {at} (epoch {at / self.per_epoch:.2f}); "
                f"{self.workdir} has {kept}"
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
        name = _program(segment)
        if name not in self._compiled:
            self._compiled[name] = compile_steps(self._step(segment), self.batches.gather)
        return self._compiled[name]

    def _step(self, segment: plan.Segment) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """The pure step of a segment."""
        return make_step(
            segment.phase,
            segment.build(),
            segment.phase.view or self.augment_view,
            seed=self.run.seed,
            per_epoch=self.per_epoch,
            frozen=tuple(self.run.train["frozen"]),
        )

    def _zero_sums(self, segment: plan.Segment, state: State, items: PyTree) -> Metrics:
        """The metric sums that a dispatch of a segment begins with."""
        name = _program(segment)
        if name not in self._zeros:
            data = (self.batches.resident, items)
            shapes = metric_shapes(self._step(segment), self.batches.gather, state, *data)
            self._zeros[name] = zero_sums(shapes, state.step)
        return self._zeros[name]

    def _piece(self, segment: plan.Segment, most: int) -> int:
        """How many steps are sent at once; several processes, whose clocks differ, send all."""
        return most if jax.process_count() > 1 else self._pace(segment).steps(most)

    def _pace(self, segment: plan.Segment) -> Pace:
        """How many steps of a segment are sent at once."""
        return self._paces.setdefault(_program(segment), Pace())

    def release(self) -> None:
        """Frees the compiled steps, which JAX would keep as long as the process lives."""
        while self._compiled:
            self._compiled.popitem()[1].release()

    # Validation.

    def validate(self, state: State) -> dict[str, float]:
        """Clean and robust accuracy on the validation split, percent.

        Args:
          state: replicated.
        """
        host = unreplicate(state)
        return self.score_network(self.evaluator, {"params": host.params, "carry": host.carry})

    def score_network(
        self,
        evaluator: Evaluator,
        variables: PyTree,
        attacks: Mapping[str, Attack] | None = None,
    ) -> dict[str, float]:
        """Any network's clean and robust accuracy on the validation split, percent.

        Args:
          evaluator: of the network.
          variables: its weights.
          attacks: by name; default the config's validation attack, "robust".

        Returns:
          {"validation_clean", "validation_robust"}, or of other attacks the names.
        """
        arrays = self.held_out
        bits = evaluator.bits(
            variables,
            to_float(arrays.images),
            arrays.labels,
            arrays.ids,
            attacks or {"robust": self.run.validation},
            seed=self.run.seed,
        )
        self.one_class = collapse.constant_answer(bits["clean"], arrays.labels)
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

            evaluator = Evaluator(
                apply,
                self.run.threat,
                batch_size=self.judged,
                before_dispatch=self._leave_if_asked,
            )
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
        if distributed.is_writer():
            bar.write(f"epoch {epoch:.4g}: {_format_scores(scores)}")
        # What earlier phases have is not yet the defence.
        is_last = segment.phase is self.segments[-1].phase
        if is_last:
            self._warn_of_collapse(step, scores, log)
            is_best = self.update_best(scores, step)
            if self.candidates is not None:
                self._offer_candidate(self.candidates, step, scores, state)
            elif is_best:
                self.save_checkpoint("best", state)

    def _offer_candidate(
        self, candidates: Candidates, step: int, scores: Mapping[str, float], state: State
    ) -> None:
        """Keeps a state until the run's end where it is one of the best few."""
        if candidates.takes(step, scores):
            host = unreplicate(state)
            own = self.run.defense.without_pretrained
            candidates.save(step, {"params": own(host.params), "carry": own(host.carry)})

    def choose_candidate(self, candidates: Candidates, attack: Attack) -> None:
        """Scores the best few states by the second attack; the winner becomes `best`.

        Where `best` is there already, a run that had ended is asked again. A process that is killed
        before it is written scores all again, with the same bits.

        Args:
          candidates: all that the run has kept.
          attack: the second one.
        """
        store = self.stores["best"]
        if not store.steps():
            params, carry = jax.eval_shape(self.run.init, self.example_image)
            second = {"second": attack}
            compared = []
            for step, scores in candidates.in_order():
                with contextlib.closing(candidates.store(step)) as kept:
                    model = read_model(kept, self.run.defense, params, carry)
                found = self.score_network(self.evaluator, model, second)
                compared.append({"step": step, **scores, **found})
            best = choose_best(compared)
            meta = {**self._meta("best"), "best": best, "candidates": compared}
            with contextlib.closing(candidates.store(best["step"])) as kept:
                model = kept.restore_as_saved("model")
            store.save(best["step"], {"model": model}, meta)
        self.best = store.meta()["best"]
        scores = {name: v for name, v in self.best.items() if name != "step"}
        recovery.say(f"chosen by {attack!r}: step {self.best['step']}, {_format_scores(scores)}")
        candidates.clear()

    def _warn_of_collapse(self, step: int, scores: Mapping[str, float], log: Log) -> None:
        """Logs, and writes to stderr, what a validation of the last phase shows to be wrong."""
        end = step == self.total
        for warned in self.watch.add(step, step / self.per_epoch, scores, self.one_class, end):
            told = {"warning": warned.name, "evidence": warned.evidence}
            log.write(step, {}, epoch=warned.epoch, **told)
            recovery.say(str(warned))

    # What a reader sees.

    def _report(self, log: Log, bar: tqdm, segment: plan.Segment, step: int, sums: Metrics) -> None:
        """Logs and shows the means of a dispatch's metrics."""
        values = {n: float(s[0]) / max(float(c[0]), 1e-12) for n, (s, c) in sums.items()}
        self.watch.note_metrics(values)
        log.write(step, values, epoch=step / self.per_epoch, phase=segment.phase.name)
        bar.set_postfix_str(
            segment.phase.name + " " + " ".join(f"{n} {v:.3f}" for n, v in values.items())
        )

    def _print_notes(self, step: int) -> None:
        """Writes to stderr what a user should know of the data, devices and pretrained networks."""
        if len(self.devices) > 1 and self.devices[-1]["step"] == step:
            recovery.say(devices.describe_change(self.devices))
        for note in self.held_out.notes:
            recovery.say(f"{self.held_out.name}: {note}")
        for role, scores in self.pretrained_scores.items():
            accuracies = {name: v for name, v in scores.items() if name != "source"}
            recovery.say(f"{role} {scores['source']}: {_format_scores(accuracies)}")


class _LeftValidation(Exception):
    """The run was asked to end while it validated."""


def _program(segment: plan.Segment) -> tuple[Any, ...]:
    """Equal for segments that are computed by one program: equal phases and optimisers."""
    return (segment.phase, tuple(sorted(segment.optimizers.items())))


def _to_lists(sums: Metrics) -> dict[str, list[float]]:
    """Replicated sums of metrics as plain values, which give float32 back exactly."""
    return {
        name: [float(part.addressable_shards[0].data[0]) for part in pair]
        for name, pair in sums.items()
    }


def _from_lists(sums: Mapping[str, Sequence[float]]) -> PyTree:
    """The sums of `_to_lists`, on the host."""
    return {name: tuple(np.float32(part) for part in pair) for name, pair in sums.items()}


def _format_scores(scores: Mapping[str, float]) -> str:
    shown = ", ".join(f"{name.removeprefix('validation_')} {v:.2f} %" for name, v in scores.items())
    return f"validation {shown}"


def _check_config(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """The workdir belongs to this config, or is new."""
    path = workdir / config_file.NAME
    is_there = distributed.from_writer(path.exists)
    before = distributed.from_writer(lambda: config_file.read(workdir)) if is_there else None
    held = distributed.from_writer(lambda: refused.has_checkpoint(workdir))
    if before is None and held:  # the file is lost
        before = recovery.config_of_checkpoints(workdir)
    now = json.loads(json.dumps(config))
    if before is None or before == now:
        return
    changed = ", ".join(validate.describe_differences(before, now))
    if not held:  # it failed, or was killed, at its start
        recovery.note(f"{workdir} holds no checkpoint: it gets another config ({changed})")
        distributed.from_writer(path.unlink)
    else:
        way = "choose another workdir, or remove it"
        if all(before.get(key) == value for key, value in now.items() if key != "train"):
            way += "; to go on from it, give another workdir train.init_from"
        raise ValueError(
            f"{workdir} holds a run of another config (it differs in {changed}); {way}"
        )


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
      {"steps", "seconds", "best": {"step", "validation_clean", "validation_robust"}, "warnings":
      [{"step", "epoch", "name", "evidence"}] of `collapse`}, where "best" is empty if that
      checkpoint was lost; and where the config names pretrained networks, "given": {role:
      {"source", "validation_clean", "validation_robust"}}.

    Raises:
      ValueError: a wrong config, or a workdir of another config; before any compilation.
      Diverged: a loss that is not finite; names the step and the last good checkpoint.
      Interrupted: after SIGTERM or SIGHUP, when the state is saved.
      KeyboardInterrupt: after Ctrl-C, likewise. A second signal ends the process at once.
      OSError: the disk is full or read-only; the last checkpoint is whole.
    """
    distributed.check_same_values("config", config)
    workdir = validate.check_folder("workdir", workdir)
    config_file.check_places(workdir)
    run = build(config, workdir=workdir, model=model, data=data)
    with _claimed(workdir):
        return _train(run, workdir, progress=progress)


@contextlib.contextmanager
def _claimed(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a workdir for this run, rid of what a killed one may have left half-written.

    Raises:
      ValueError: another run trains there.
    """
    with distributed.claimed(workdir / "train.lock", "training", workdir):
        for kind in ("last", "best"):
            checkpoint.remove_leftovers(workdir / kind)
        yield


def _write_config(run: Run, workdir: pathlib.Path) -> None:
    """Makes a workdir that of a run: with its config, and copies of the networks that it names."""
    if not (workdir / config_file.NAME).exists():
        config_file.write(workdir, run.config)
    sources.copy_sources(run.sources, workdir)


@refused.leaves_nothing
def _train(run: Run, workdir: pathlib.Path, *, progress: bool) -> dict[str, Any]:
    """`train` in a workdir that is claimed."""
    _check_config(run.config, workdir)
    trainer = Trainer(run, workdir)  # refuses what it cannot train, before the workdir is claimed
    try:
        distributed.from_writer(lambda: _write_config(run, workdir))
        summary = trainer.run_to_end(progress=progress and distributed.is_writer())
        distributed.barrier("trained")  # or another process would look for what is not written yet
        return summary
    finally:
        trainer.release()
        for store in trainer.stores.values():
            store.close()
