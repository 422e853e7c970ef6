"""Optimisers against torch's formulas, plans, the mapped step, and the loop: resume to the bit."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdefense import data, defenses, models, runs, threat, train
from jaxdefense.defenses import base
from jaxdefense.runs import checkpoint
from jaxdefense.runs.run import build
from jaxdefense.train import loop, optim, plan
from jaxdefense.train.step import (
    State,
    compile_steps,
    make_step,
    metric_shapes,
    unreplicate,
    zero_sums,
)

ROOT = pathlib.Path(__file__).parents[1]


def config(tfds_dir, **changes):
    """A run of seconds on digits; `changes` maps "section.key" to values."""
    values = {
        "seed": 0,
        "name": "tiny",
        "dataset": {"name": "digits", "validation": 64, "limit": 192, "data_dir": tfds_dir},
        "model": {"name": "cnn", "width": 0.25},
        "threat": {"norm": "linf", "eps": 0.1},
        "defense": {"name": "pgd_at", "steps": 2},
        "train": {
            "length": "12s",
            "batch_size": 32,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            "augment": "none",
            "validate_every": "6s",
            "checkpoint_every": "3s",
            "steps_per_dispatch": 2,
        },
        "validation": {"name": "pgd", "steps": 2},
        "evaluation": {"attacks": {"pgd2": {"name": "pgd", "steps": 2}}},
    }
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[key] = value
    return values


class TestOptim:
    @pytest.mark.parametrize(
        ("length", "steps"),
        [(3, 30), ("3e", 30), ("3", 30), ("45s", 45), ("50%", 100), (0.25, 2), (" 10 % ", 20)],
    )
    def test_lengths(self, length, steps):
        assert optim.steps_of(length, total=200, per_epoch=10) == steps

    @pytest.mark.parametrize("length", ["", "e", "ten", "-1e", None, "5 epochs", "nan%"])
    def test_bad_lengths(self, length):
        with pytest.raises(ValueError, match="length"):
            optim.steps_of(length, total=200, per_epoch=10)

    def rates(self, spec, total=100):
        schedule = optim.schedule(spec, 2.0, total=total, per_epoch=10)
        return np.asarray([schedule(i) for i in range(total + 1)])

    def test_piecewise(self):
        rates = self.rates({"name": "piecewise", "at": ["50%", "80s", 9], "factor": 0.1})
        np.testing.assert_allclose(rates[[0, 49, 51, 79, 81, 91]], [2, 2, 0.2, 0.2, 0.02, 0.002])

    def test_cosine(self):
        rates = self.rates({"name": "cosine", "warmup": 1, "final": 0.1})
        np.testing.assert_allclose(rates[[0, 5, 10, 100]], [0, 1, 2, 0.2], atol=1e-6)
        np.testing.assert_allclose(self.rates({"name": "cosine"})[50], 1.0, atol=1e-6)

    @pytest.mark.parametrize("shape", ["linear", "cosine"])
    def test_one_cycle(self, shape):
        rates = self.rates({"name": "one_cycle", "peak": "40%", "start": 0.1, "shape": shape})
        assert rates.argmax() == 40
        np.testing.assert_allclose(rates[[0, 40, 100]], [0.2, 2.0, 2e-4], rtol=1e-3)
        np.testing.assert_allclose(rates[20], 1.1, rtol=1e-3)

    def test_exponential(self):
        rates = self.rates({"name": "exponential", "factor": 0.5, "every": 1})
        np.testing.assert_allclose(rates[[0, 9, 10, 25]], [2, 2, 1, 0.5])

    def updates(self, spec, weights, grads, steps=3):
        tx = optim.make(spec, total=10, per_epoch=5)
        state = tx.init(weights)
        for _ in range(steps):
            change, state = tx.update(grads, state, weights)
            weights = optax.apply_updates(weights, change)
        return weights

    def test_sgd_decays_before_momentum(self):
        """g <- g + d w; m <- mu m + g; w <- w - lr m, as torch writes it."""
        w, g = np.array([1.0, -2.0]), np.array([0.5, 0.25])
        spec = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        got = self.updates(spec, jnp.asarray(w), jnp.asarray(g))
        m = np.zeros(2)
        for _ in range(3):
            m = 0.9 * m + g + 0.01 * w
            w = w - 0.1 * m
        np.testing.assert_allclose(got, w, rtol=1e-6)

    def test_adam_decays_by_l2(self):
        w, g = np.array([1.0, -2.0]), np.array([0.5, 0.25])
        spec = {"name": "adam", "lr": 0.1, "weight_decay": 0.5}
        got = self.updates(spec, jnp.asarray(w), jnp.asarray(g))
        m, v = np.zeros(2), np.zeros(2)
        for t in range(1, 4):
            d = g + 0.5 * w
            m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
            w = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(got, w, rtol=1e-5)

    def test_clipping_and_decay_of_kernels_only(self):
        weights = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        grads = jax.tree.map(lambda w: 10.0 * jnp.ones_like(w), weights)
        moved = self.updates({"name": "sgd", "lr": 1.0, "clip_norm": 1.0}, weights, grads, steps=1)
        length = optax.tree.norm(jax.tree.map(jnp.subtract, moved, weights))
        np.testing.assert_allclose(length, 1.0, rtol=1e-5)
        zeros = jax.tree.map(jnp.zeros_like, weights)
        spec = {"name": "sgd", "lr": 1.0, "weight_decay": 0.5, "decay_kernels_only": True}
        moved = self.updates(spec, weights, zeros, steps=1)
        assert float(moved["bias"][0]) == 1.0
        assert float(moved["kernel"][0, 0]) == 0.5

    @pytest.mark.parametrize(
        ("spec", "match"),
        [
            ({"name": "sdg", "lr": 0.1}, "nearest: sgd"),
            ({"name": "sgd", "lr": 0.0}, "positive lr"),
            ({"name": "sgd"}, "positive lr"),
            ({"name": "sgd", "lr": 0.1, "momentums": 0.9}, "nearest: momentum"),
            ({"name": "sgd", "lr": 0.1, "schedule": {"name": "cosin"}}, "nearest: cosine"),
            (
                {"name": "sgd", "lr": 0.1, "schedule": {"name": "piecewise", "at": ["9s", "5s"]}},
                "increasing",
            ),
        ],
    )
    def test_errors(self, spec, match):
        with pytest.raises(ValueError, match=match):
            optim.make(spec, total=10, per_epoch=5)


def phase(name, *roles, **options):
    return base.Phase(name, tuple(base.Update(None, (role,)) for role in roles), **options)


class TestPlan:
    default = {"name": "sgd", "lr": 0.1}  # noqa: RUF012

    def make(self, *phases, length=10, per_epoch=5):
        return plan.make(phases, self.default, length=length, per_epoch=per_epoch)

    def totals(self, segments, role):
        return [json.loads(s.optimizers[role])[1:] for s in segments if role in s.optimizers]

    def test_one_phase_takes_the_run(self):
        (segment,) = self.make(phase("a", "f"))
        assert (segment.start, segment.end, segment.fresh) == (0, 50, ("f",))
        assert self.totals([segment], "f") == [[50, 5]]

    def test_lengths_and_shares(self):
        ends = [
            s.end for s in self.make(phase("a", "f", length=2), phase("b", "f"), phase("c", "f"))
        ]
        assert ends == [10, 30, 50]
        ends = [
            s.end for s in self.make(phase("a", "f", length="20%"), phase("b", "f", length="7s"))
        ]
        assert ends == [10, 17]

    def test_an_optimiser_lives_on_until_it_changes_or_is_renewed(self):
        adam = {"name": "adam", "lr": 1e-3}
        head = phase("head", "c", length=1, optimizers={"c": adam}, fresh_optimizers=("c",))
        encoder = phase("encoder", "f", length=2)
        segments = self.make(encoder, head, encoder, head)
        assert [s.fresh for s in segments] == [("f",), ("c",), (), ("c",)]
        assert self.totals(segments, "f") == [[20, 5], [20, 5]]  # one cosine over both
        assert self.totals(segments, "c") == [[5, 5], [5, 5]]

    def test_two_updates_per_batch_are_two_steps(self):
        (segment,) = self.make(phase("a", "f", "f", "g"))
        assert self.totals([segment], "f") == [[100, 10]]
        assert self.totals([segment], "g") == [[50, 5]]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"raise train\.length"):
            self.make(phase("a", "f", length=20), phase("b", "f"))
        with pytest.raises(ValueError, match="at least one step"):
            self.make(phase("a", "f", length="0s"))
        with pytest.raises(ValueError, match="epochs"):
            self.make(phase("a", "f"), length="50%")
        with pytest.raises(ValueError, match="nearest: sgd"):
            self.make(phase("a", "f", optimizers={"f": {"name": "sgdd", "lr": 1.0}}))


def gather(resident, item):
    return jax.tree.map(lambda leaf: leaf[item], resident)


class TestStep:
    """The mapped chunk on two devices against one device with the whole batch."""

    images = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1))
    labels = jnp.arange(16) % 4

    def chunk(self, devices, loss_scale=1.0, traced=None, net=None):
        net = net or models.make("cnn", 4, width=0.25)
        defense = defenses.make("standard", net, threat.Linf(0.1))
        one = defense.phases[0]
        if loss_scale != 1.0:
            inner = one.updates[0].loss

            def loss(params, carry, batch, key):
                value, rest = inner(params, carry, batch, key)
                return value * jnp.where(batch["step"] >= 2, loss_scale, 1.0), rest

            one = base.Phase("scaled", (base.Update(loss),))
        tx = optim.make({"name": "sgd", "lr": 0.1, "momentum": 0.9}, total=9, per_epoch=3)
        step = make_step(one, {"classifier": tx}, lambda k, x: {"image": x}, seed=0, per_epoch=3)
        params, carry = defense.init(jax.random.key(1), self.images[:1])
        state = State(jnp.int32(0), params, carry, {"classifier": tx.init(params["classifier"])})
        devices = jax.local_devices()[:devices]
        resident = {"image": self.images, "label": self.labels, "id": jnp.arange(16)}

        def counted(state, batch):
            if traced is not None:
                traced.append(batch["image"].shape)
            return step(state, batch)

        compiled = compile_steps(counted, gather)

        def run(state, resident, items, count, sums=None):
            if sums is None:
                shapes = metric_shapes(step, gather, state, resident, items)
                sums = zero_sums(shapes, state.step)
            return compiled(state, resident, items, count, sums)

        return (
            run,
            flax.jax_utils.replicate(state, devices, axis_name=base.AXIS),
            flax.jax_utils.replicate(resident, devices, axis_name=base.AXIS),
        )

    def items(self, devices, n=4):
        order = np.stack([np.random.default_rng(i).permutation(16)[:8] for i in range(n)])
        return order.reshape(n, devices, -1).transpose(1, 0, 2)

    def test_two_devices_equal_one(self):
        results = []
        for devices in (1, 2):
            chunk, state, resident = self.chunk(devices)
            state, sums, bad = chunk(state, resident, self.items(devices), jnp.int32(4))
            assert int(bad[0]) == -1
            assert int(state.step[0]) == 4
            results.append((unreplicate(state).params, sums["loss"][0][0]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)

    def test_devices_hold_equal_states(self):
        chunk, state, resident = self.chunk(2, net=models.make("mnist_net", 4, width=2, bn=True))
        state, *_ = chunk(state, resident, self.items(2), jnp.int32(2))
        assert jax.tree.leaves(state.carry)
        jax.tree.map(
            lambda x: np.testing.assert_array_equal(x[0], x[1]), (state.params, state.carry)
        )

    def test_chunks_of_any_length_give_the_same_bits_and_one_compilation(self):
        traced = []
        chunk, state, resident = self.chunk(2, traced=traced)
        items = self.items(2)
        whole, whole_sums, _ = chunk(state, resident, items, jnp.int32(4))
        times = len(traced)
        state, sums = self.chunk(2)[1], None
        for i in range(4):
            rolled = np.roll(items, -i, 1)
            state, sums, _ = chunk(state, resident, rolled, jnp.int32(1), sums)
        jax.tree.map(np.testing.assert_array_equal, (state, sums), (whole, whole_sums))
        assert len(traced) == times

    def test_stops_at_a_loss_that_is_not_finite(self):
        chunk, state, resident = self.chunk(2, loss_scale=float("nan"))
        state, _, bad = chunk(state, resident, self.items(2), jnp.int32(4))
        assert int(bad[0]) == 2
        assert int(state.step[0]) == 3


def leaves(folder):
    _, model, meta = runs.restore(folder, kind="last")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)], meta


class TestLoop:
    def test_trains_selects_and_logs(self, tmp_path, tfds_dir):
        summary = train.train(config(tfds_dir), tmp_path, progress=False)
        assert summary["steps"] == 12
        lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        scores = {x["step"]: x["validation_robust"] for x in lines if "validation_robust" in x}
        assert set(scores) == {6, 12}
        assert summary["best"]["validation_robust"] == max(scores.values())
        assert [x["step"] for x in lines if "loss" in x] == [2, 3, 5, 6, 8, 9, 11, 12]
        assert list((tmp_path / "tensorboard").iterdir())
        run, model, meta = runs.restore(tmp_path)
        assert (meta["step"], meta["steps"]) == (summary["best"]["step"], 12)
        assert meta["memory"] > 1e8  # of this process, which has loaded JAX
        assert [point[2] for point in meta["validation"]] == [round(scores[n], 4) for n in (6, 12)]
        images = jnp.asarray(run.arrays("test").images[:4] / 255.0, jnp.float32)
        assert run.apply("classifier")(model, images).shape == (4, 10)

    def test_the_test_set_is_never_read(self, tmp_path, tfds_dir, monkeypatch):
        @functools.wraps(data.load)
        def load(name, split, **options):
            assert split != "test"
            return real(name, split, **options)

        real = data.load
        monkeypatch.setattr(data, "load", load)
        train.train(config(tfds_dir), tmp_path, progress=False)

    @pytest.mark.slow
    def test_killed_at_a_random_step_it_ends_with_the_same_bits(self, tmp_path, tfds_dir):
        """SIGKILL, twice, at moments that a seed from the clock chooses; all arrays equal."""
        values = config(
            tfds_dir,
            **{
                "defense.name": "trades",
                "train.length": "40s",
                "train.optimizer": {"name": "adam", "lr": 1e-3},
            },
        )
        values["defense"]["transforms"] = {"ema": {"decay": 0.9}}
        train.train(values, tmp_path / "whole", progress=False)
        (tmp_path / "config.json").write_text(json.dumps(values))
        seed = time.time_ns()
        chance = np.random.default_rng(seed)
        killed_at = []
        for _ in range(2):
            process = self.start(tmp_path)
            low, high = (1 + killed_at[-1], 38) if killed_at else (1, 16)  # it runs on a little
            target = int(chance.integers(low, high))
            killed_at.append(self.kill_after(process, tmp_path / "killed", target))
        assert self.start(tmp_path).wait(timeout=300) == 0
        whole, meta = leaves(tmp_path / "whole")
        resumed, meta_resumed = leaves(tmp_path / "killed")
        assert meta["step"] == meta_resumed["step"] == 40
        assert meta["best"] == meta_resumed["best"]
        for a, b in zip(whole, resumed, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"seed {seed}, killed at {killed_at}")
        logs = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "killed")]
        assert logs[0] == logs[1]

    def start(self, folder, code="train.train(values, sys.argv[2], progress=False)"):
        script = (
            "import json, sys, jax\n"
            "from jaxdefense import train\n"
            f"jax.config.update('jax_compilation_cache_dir', {str(ROOT / '.cache' / 'xla')!r})\n"
            "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)\n"
            f"values = json.load(open(sys.argv[1]))\n{code}\n"
        )
        command = [
            sys.executable,
            "-c",
            script,
            str(folder / "config.json"),
            str(folder / "killed"),
        ]
        return subprocess.Popen(command, cwd=ROOT, env=dict(os.environ))

    def kill_after(self, process, folder, target):
        """Kills when the log has reached the step `target`; returns the last step logged."""
        path = folder / "metrics.jsonl"
        until = time.monotonic() + 240
        while time.monotonic() < until and process.poll() is None:
            lines = path.read_text().splitlines() if path.exists() else []
            steps = [json.loads(x)["step"] for x in lines if x.endswith("}")]
            if steps and steps[-1] >= target:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return steps[-1]

    @pytest.mark.slow
    def test_sigterm_saves_and_says_how_to_go_on(self, tmp_path, tfds_dir):
        values = config(tfds_dir, **{"train.length": "40s"})
        train.train(values, tmp_path / "whole", progress=False)
        (tmp_path / "config.json").write_text(json.dumps(values))
        code = (
            "import os, signal\n"
            "from jaxdefense.train import loop\n"
            "report = loop.Trainer._report\n"
            "def stop(self, log, bar, segment, step, sums):\n"
            "    report(self, log, bar, segment, step, sums)\n"
            "    if step == 20: os.kill(os.getpid(), signal.SIGTERM)\n"
            "loop.Trainer._report = stop\n"
            "try: train.train(values, sys.argv[2], progress=False)\n"
            "except loop.Interrupted as error: print(error); sys.exit(7)"
        )
        assert self.start(tmp_path, code).wait(timeout=300) == 7
        assert leaves(tmp_path / "killed")[1]["step"] == 20
        train.train(values, tmp_path / "killed", progress=False)
        for a, b in zip(leaves(tmp_path / "whole")[0], leaves(tmp_path / "killed")[0], strict=True):
            np.testing.assert_array_equal(a, b)

    def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_checkpoint(
        self, tmp_path, tfds_dir
    ):
        values = config(tfds_dir, **{"train.optimizer": {"name": "sgd", "lr": 1e20}})
        values["defense"] = {"name": "standard"}
        with pytest.raises(loop.Diverged, match=r"not finite at step \d+ .* has (no )?checkpoint"):
            train.train(values, tmp_path, progress=False)

    def test_a_workdir_belongs_to_one_config(self, tmp_path, tfds_dir):
        train.train(config(tfds_dir), tmp_path, progress=False)
        with pytest.raises(
            ValueError, match=r"another config \(it differs in seed: 0 there, 1 here"
        ):
            train.train(config(tfds_dir, seed=1), tmp_path, progress=False)
        longer = config(tfds_dir, **{"train.length": "24s"})
        wanted = (
            r"in train\.length: '12s' there, '24s' here\).*give another workdir train\.init_from"
        )
        with pytest.raises(ValueError, match=wanted):
            train.train(longer, tmp_path, progress=False)
        again = train.train(config(tfds_dir), tmp_path, progress=False)
        assert again["steps"] == 12

    @pytest.mark.slow
    def test_streaming_gives_the_same_bits(self, tmp_path, tfds_dir):
        train.train(config(tfds_dir), tmp_path / "device", progress=False)
        streaming = config(tfds_dir, **{"train.streaming": True})
        train.train(streaming, tmp_path / "stream", progress=False)
        for a, b in zip(
            leaves(tmp_path / "device")[0], leaves(tmp_path / "stream")[0], strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_damaged_and_foreign_checkpoints(self, tmp_path, tfds_dir):
        train.train(config(tfds_dir), tmp_path, progress=False)
        (step,) = (tmp_path / "best").glob("[0-9]*")
        store = checkpoint.Store(tmp_path / "best")
        other = build(config(tfds_dir, **{"model.width": 0.5}))
        params, carry = jax.eval_shape(other.init, jnp.zeros((1, 8, 8, 1)))
        with pytest.raises(ValueError, match="another model"):
            store.restore("model", {"params": params, "carry": carry})
        store.close()
        for file in (step / "model").rglob("*"):
            if file.is_file():
                file.write_bytes(b"damaged")
        with pytest.raises(ValueError, match="damaged"):
            runs.restore(tmp_path)
        with pytest.raises(ValueError, match="holds no run"):
            runs.restore(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("path", "value", "match"),
        [
            ("defense.name", "pgdat", "nearest: pgd_at"),
            ("model.name", "resnets", "nearest: resnet"),
            ("dataset.name", "digit", "nearest: digits"),
            ("dataset.rows", 3, "option of dataset"),
            ("threat.norm", "l3", "unknown norm"),
            ("threat.eps", 8, "8/255"),
            ("validation.name", "pgdd", "nearest: pgd"),
            ("train.epochs", 3, "unknown train option"),
            ("train.optimizer", None, "optimizer"),
            ("train.batch_size", 7, "batch_size"),
            ("train.augment", "flop", "flop"),
            ("train.select", "best", "select"),
            ("seed", -1, "seed"),
            ("trian", {}, "nearest: train"),
        ],
    )
    def test_bad_configs(self, tmp_path, tfds_dir, path, value, match):
        with pytest.raises(ValueError, match=match):
            train.train(config(tfds_dir, **{path: value}), tmp_path, progress=False)
        assert not (tmp_path / "last").exists() or not list((tmp_path / "last").iterdir())
