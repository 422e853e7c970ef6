"""A finished run frees what it compiled; a full device names the batch size that would fit."""

import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import config

from jaxdefense import attacks, threat, train
from jaxdefense.evaluation import Evaluator, memory
from jaxdefense.runs.run import build
from jaxdefense.train import loop
from jaxdefense.train.step import RunSteps

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."


def few_steps(tfds_dir, **changes):
    quick = {"train.length": "2s", "train.validate_every": "2s", "train.checkpoint_every": "2s"}
    values = config(tfds_dir, **quick, **changes)
    return {**values, "defense": {"name": "standard"}, "validation": {"name": "fgsm"}}


class TestFreed:
    def test_runs_leave_neither_objects_nor_arrays(self, tmp_path, tfds_dir, monkeypatch):
        made = []

        def noted(self, *args, **kwargs):
            original(self, *args, **kwargs)
            made.extend(weakref.ref(o) for o in (self, self.run, self.evaluator, self.batches))

        original = loop.Trainer.__init__
        monkeypatch.setattr(loop.Trainer, "__init__", noted)
        sizes = []
        for i in range(3):
            train.train(few_steps(tfds_dir), tmp_path / str(i), progress=False)
            gc.collect()
            sizes.append(sum(array.nbytes for array in jax.live_arrays()))
        assert len(made) == 12
        assert [ref() for ref in made] == [None] * 12
        assert sizes[-1] <= sizes[0]

    def test_a_trainer_that_is_let_go_frees_its_steps(self, tmp_path, tfds_dir):
        trainer = loop.Trainer(build(few_steps(tfds_dir)), tmp_path)
        chunk = trainer.compiled_steps(trainer.segments[0])
        state = loop.replicate(trainer.begin_segment(trainer.initial_state(), trainer.segments[0]))
        items = trainer._padded_items(0, 1)
        sums = trainer._zero_sums(trainer.segments[0], state, items)
        chunk(state, trainer.batches.resident, items, jnp.int32(1), sums)
        refs = [weakref.ref(trainer), weakref.ref(trainer.run), weakref.ref(chunk)]
        for store in trainer.stores.values():
            store.close()
        del trainer, chunk, state
        gc.collect()
        assert [ref() for ref in refs] == [None] * 3

    def test_evaluators_and_jitted_attacks(self):
        ball, x = threat.Linf(0.1), np.full((4, 2, 2, 1), 0.5, np.float32)
        weights = np.eye(4, 3, dtype=np.float32)

        def apply(weights, images):
            return images.reshape(len(images), -1) @ weights

        evaluator = Evaluator(apply, ball, batch_size=8)
        evaluator.bits(weights, x, np.zeros(4, int), np.arange(4), {"fgsm": attacks.fgsm(ball)})
        attack = attacks.jitted(attacks.fgsm(ball), apply)
        attack(weights, jax.random.key(0), x, np.zeros(4, int))
        refs = [weakref.ref(evaluator), weakref.ref(attack), weakref.ref(apply)]
        del evaluator, attack, apply
        gc.collect()
        assert [ref() for ref in refs] == [None] * 3


class TestFittingBatch:
    def test_linear_between_what_was_measured(self):
        # 100 bytes and 10 for each image; 95 % of 2,100 are left for (1995 - 100) / 10 = 189.5.
        needs = {256: 2660, 128: 1380}
        assert memory.fitting_batch(256, needs, 2100) == 189
        assert memory.fitting_batch(256, needs, 2100, multiple=8) == 184

    @pytest.mark.parametrize(
        ("needs", "limit"),
        [
            ({256: None, 128: 1380}, 2100),  # only one is known
            ({256: 2660, 128: 1380}, None),  # the device does not say
            ({256: 2660, 128: 1380}, 10**6),  # it fits: something else is in the memory
            ({256: 500, 128: 500}, 2100),  # the batch is not what takes the memory
            ({}, None),
        ],
    )
    def test_half_where_the_numbers_do_not_say(self, needs, limit):
        assert memory.fitting_batch(256, needs, limit, multiple=8) == 128

    def test_the_smaller_two_where_the_largest_does_not_compile(self):
        assert memory.fitting_batch(256, {256: None, 128: 1380, 64: 740}, 2100) == 189

    def test_nothing_fits(self):
        assert memory.fitting_batch(256, {256: 2660, 128: 1380}, 90) == 0


class TestOutOfMemory:
    def batch_named(self, message):
        return int(re.search(r"(\d+) would fit", message)[1])

    def test_training_names_the_batch_size(self, tmp_path, tfds_dir, monkeypatch):
        def full(self, *args):
            raise jax.errors.JaxRuntimeError(FULL)

        values = few_steps(tfds_dir)
        trainer = loop.Trainer(build(values), tmp_path / "probe")
        state = loop.replicate(trainer.begin_segment(trainer.initial_state(), trainer.segments[0]))
        chunk, items = trainer.compiled_steps(trainer.segments[0]), trainer._padded_items(0, 1)
        resident, devices = trainer.batches.resident, jax.device_count()
        sums = trainer._zero_sums(trainer.segments[0], state, items)

        def needed(batch):
            def lower(size):
                return chunk.lower(state, resident, items, np.int32(1), sums, size // devices)

            return memory.bytes_needed(lower, batch)

        assert needed(16) < needed(32)
        limit = needed(24) / 0.95
        monkeypatch.setattr(memory, "bytes_limit", lambda device: limit)
        monkeypatch.setattr(RunSteps, "__call__", full)
        with pytest.raises(memory.OutOfMemory, match=r"train\.batch_size=\d+; .*change") as caught:
            train.train(values, tmp_path / "run", progress=False)
        assert "\n" not in str(caught.value)
        assert abs(self.batch_named(str(caught.value)) - 24) <= 2

    def test_evaluation_names_the_batch_size(self, monkeypatch):
        ball = threat.Linf(0.1)
        evaluator = Evaluator(lambda w, x: x.reshape(len(x), -1) @ w, ball, batch_size=256)
        weights, x = np.eye(4, 3, dtype=np.float32), np.full((256, 2, 2, 1), 0.5, np.float32)
        evaluator.logits(weights, x)
        (compiled,) = evaluator._compiled.values()

        class Full:
            lower = staticmethod(compiled.lower)

            def __call__(self, *args):
                raise jax.errors.JaxRuntimeError(FULL)

        evaluator._compiled = dict.fromkeys(evaluator._compiled, Full())
        with pytest.raises(memory.OutOfMemory, match=r"evaluation\.batch_size=128"):
            evaluator.logits(weights, x)  # the CPU does not say how much it has: half
        monkeypatch.setattr(memory, "bytes_limit", lambda device: 10)
        with pytest.raises(memory.OutOfMemory, match="not even the smallest batch"):
            evaluator.logits(weights, x)

    def test_a_program_that_does_not_compile_for_its_size(self):
        class Lowered:
            def __init__(self, batch):
                self.batch = batch

            def compile(self):
                if self.batch > 100:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of hbm")
                raise jax.errors.JaxRuntimeError("INTERNAL: another fault")

        assert memory.bytes_needed(Lowered, 128) is None
        with pytest.raises(jax.errors.JaxRuntimeError, match="another fault"):
            memory.bytes_needed(Lowered, 64)

    def test_other_errors_pass(self):
        with (
            pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
            memory.explain_out_of_memory("it", 8, None, multiple=1, advice="{batch}"),
        ):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
