"""Bits per example: whole sets, order, batch size, re-checks, records, tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdefense import attacks, losses, threat
from jaxdefense.evaluation import Evaluator, protocols, records, summarize, tables
from jaxdefense.evaluation.journal import Journal

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(23, 6, 6, 1)).astype(np.float32)
IDS = np.arange(100, 123)
BALL = threat.Linf(0.05)
WEIGHTS = jnp.asarray(RNG.normal(size=(36, 4)), jnp.float32)


def apply(variables, x):
    return x.reshape(x.shape[0], -1) @ variables


LABELS = np.array(jnp.argmax(apply(WEIGHTS, jnp.asarray(IMAGES)), -1))
LABELS[::5] = (LABELS[::5] + 1) % 4
ATTACKS = {"pgd": attacks.pgd(BALL, steps=3), "fgsm": attacks.fgsm(BALL)}


def bits(rows=slice(None), batch_size=8, named=ATTACKS, function=apply, **options):
    evaluator = Evaluator(function, BALL, batch_size=batch_size)
    return evaluator.bits(WEIGHTS, IMAGES[rows], LABELS[rows], IDS[rows], named, **options)


def test_every_example_counts_once():
    found = bits()
    logits = IMAGES.reshape(23, -1) @ np.asarray(WEIGHTS)
    np.testing.assert_array_equal(found["clean"], logits.argmax(-1) == LABELS)
    assert 0 < found["pgd"].sum() < found["clean"].sum()
    assert not np.any(found["pgd"] & ~found["clean"])


def test_everywhere_counts_what_an_attack_mends():
    def mend(predict, key, images, labels):
        """Towards the label: FGSM on the cross-entropy, turned round."""
        attack = attacks.fgsm(BALL, loss=lambda z, y: -losses.cross_entropy(z, y))
        return attack(predict, key, images, labels)

    alone, both = bits(named={"mend": mend}), bits(named={"mend": mend}, everywhere=True)
    np.testing.assert_array_equal(both["mend"][both["clean"]], alone["mend"][alone["clean"]])
    assert not np.any(alone["mend"] & ~alone["clean"])
    assert np.any(both["mend"] & ~both["clean"])


def test_bits_do_not_depend_on_batch_size_order_or_company():
    expected = bits()
    for size in (1, 5, 23, 100):
        for name, value in bits(batch_size=size).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{name}, {size}")
    order = RNG.permutation(23)
    for name, value in bits(order).items():
        np.testing.assert_array_equal(value, expected[name][order])
    for name, value in bits(slice(7, 12)).items():
        np.testing.assert_array_equal(value, expected[name][7:12])


def test_what_fills_a_batch_up_is_finished_already():
    right = np.flatnonzero(np.asarray(apply(WEIGHTS, IMAGES)).argmax(-1) == LABELS)[:7]
    left = []

    def count(predict, key, images, labels):
        unfinished = jnp.sum(~attacks.fooled(predict(images), labels))
        jax.debug.callback(lambda n: left.append(int(n)), unfinished)
        return images

    bits(right, named={"count": count})
    jax.effects_barrier()
    assert sum(left) == 7


def test_a_journal_keeps_what_attacks_find(tmp_path, monkeypatch):
    """Killed at the third batch; then the other batches alone are computed."""
    expected, dispatch, calls, end = bits(), Evaluator._dispatch, [], [3]
    clean = np.asarray(apply(WEIGHTS, IMAGES.reshape(23, -1)))

    def watched(self, key, *arguments):
        if key[0] == "attack":
            calls.append(key[1].name)
            if len(calls) in end:
                raise KeyboardInterrupt
        return dispatch(self, key, *arguments)

    def again():
        journal = Journal(tmp_path, {"seed": 0}, clean)
        evaluator = Evaluator(apply, BALL, batch_size=8, journal=journal)
        return evaluator.bits(WEIGHTS, IMAGES, LABELS, IDS, ATTACKS)

    monkeypatch.setattr(Evaluator, "_dispatch", watched)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert calls == ["pgd", "pgd", "pgd"]
    calls.clear()
    end.clear()
    for name, value in again().items():
        np.testing.assert_array_equal(value, expected[name])
    assert calls == ["pgd", "fgsm", "fgsm", "fgsm"]
    damaged = max(tmp_path.glob("*.npz"), key=lambda path: path.stem != "clean")
    damaged.write_bytes(damaged.read_bytes()[:-40])
    calls.clear()
    for name, value in again().items():
        np.testing.assert_array_equal(value, expected[name])
    assert len(calls) == 1


def sometimes(predict, key, images, labels):
    """FGSM for the examples whose key says so."""
    chosen = jax.vmap(jax.random.bernoulli)(key)
    x_adv = attacks.fgsm(BALL)(predict, key, images, labels)
    return jnp.where(chosen[:, None, None, None], x_adv, images)


def test_seeds_and_names_are_part_of_the_key():
    first = bits(named={"a": sometimes})["a"]
    np.testing.assert_array_equal(first, bits(named={"a": sometimes})["a"])
    assert np.any(first != bits(named={"a": sometimes}, seed=1)["a"])
    assert np.any(first != bits(named={"b": sometimes})["b"])


def test_eps_zero_is_clean_accuracy_and_more_eps_is_less():
    def robust(eps):
        evaluator = Evaluator(apply, threat.Linf(eps), batch_size=23)
        named = {"pgd": attacks.pgd(threat.Linf(eps), steps=10)}
        return evaluator.bits(WEIGHTS, IMAGES, LABELS, IDS, named)

    nothing = robust(0.0)
    np.testing.assert_array_equal(nothing["pgd"], nothing["clean"])
    curve = [robust(eps)["pgd"].sum() for eps in (0.0, 0.02, 0.05, 0.2, 1.0)]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == 0


def leaves_ball(predict, key, images, labels):
    return jnp.clip(images + 0.06, 0, 1)


def leaves_box(predict, key, images, labels):
    return images * 0 + 1.001


def returns_nan(predict, key, images, labels):
    return images * jnp.nan


@pytest.mark.parametrize("attack", [leaves_ball, leaves_box, returns_nan])
def test_an_attack_that_cheats_is_found(attack):
    with pytest.raises(ValueError, match=r"attack cheat left the ball or the box.*examples \[101"):
        bits(named={"cheat": attack})


def test_bad_models_and_inputs_are_refused():
    with pytest.raises(ValueError, match="probabilities"):
        bits(function=lambda v, x: jax.nn.softmax(apply(v, x)))
    with pytest.raises(ValueError, match="NaN"):
        bits(function=lambda v, x: apply(v, x) * jnp.nan)
    with pytest.raises(ValueError, match="batch_size"):
        Evaluator(apply, BALL, batch_size=0)
    evaluator = Evaluator(apply, BALL)
    with pytest.raises(ValueError, match="must lie in"):
        evaluator.bits(WEIGHTS, IMAGES * 255, LABELS, IDS, {})
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        evaluator.bits(WEIGHTS, IMAGES, LABELS + 4, IDS, {})


def test_batch_norm_in_train_mode_is_refused():
    def normed(variables, x, axes):
        x = x.reshape(x.shape[0], -1)
        mean, std = jnp.mean(x, axes, keepdims=True), jnp.std(x, axes, keepdims=True)
        return ((x - mean) / std) @ variables

    with pytest.raises(ValueError, match="BatchNorm in train mode"):
        bits(function=lambda v, x: normed(v, x, 0))
    bits(function=lambda v, x: normed(v, x, 1))  # a norm of each example on its own is fine


def record(name="a", seed=0, shift=0.0, **more):
    found = summarize(bits(), LABELS, 4)
    for result in found.values():
        result["accuracy"] += shift
    return records.make(name, {"seed": seed}, {"main": found}, seed=seed, seconds=1.5, **more)


class TestRecords:
    def test_summary(self):
        found = bits()
        result = summarize(found, LABELS, 5)["pgd"]
        assert result["accuracy"] == pytest.approx(100 * found["pgd"].mean())
        assert result["per_class"][1] == pytest.approx(100 * found["pgd"][LABELS == 1].mean())
        assert result["per_class"][4] is None
        np.testing.assert_array_equal(records.unpack_bits(result["bits"], 23), found["pgd"])

    def test_round_trip_and_provenance(self, tmp_path):
        written = record()
        records.save(written, tmp_path / "deep" / "r.json")
        assert records.load_all([tmp_path]) == [json.loads(json.dumps(written))]
        assert written["versions"]["jax"] == jax.__version__
        assert written["device"]["count"] == jax.device_count()
        assert written["git"]
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]  # no temporary file

    def test_nothing_half_written(self, tmp_path):
        path = tmp_path / "r.json"
        records.save(record(), path)
        before = path.read_text()
        with pytest.raises(TypeError):
            records.save({"bad": object()}, path)
        assert path.read_text() == before

    def test_errors(self, tmp_path):
        (tmp_path / "x.json").write_text("{}")
        with pytest.raises(ValueError, match="not a record"):
            records.load(tmp_path / "x.json")
        (tmp_path / "x.json").write_text("{")
        with pytest.raises(ValueError, match="not a record"):
            records.load(tmp_path / "x.json")
        with pytest.raises(ValueError, match="no such file"):
            records.load_all([tmp_path / "nothing"])


class TestTables:
    def test_mean_and_deviation_over_seeds(self):
        table = tables.accuracy_table([record(seed=0), record(seed=1, shift=2.0), record("b")])
        clean = 100 * bits()["clean"].mean()
        header, _, first, second = table.splitlines()
        assert header == "| accuracy, % | threat | n | clean | pgd | fgsm |"
        assert first.startswith(f"| a | – | 23 | {clean + 1:.2f} ± {2**0.5:.2f} (2) |")
        assert second.startswith(f"| b | – | 23 | {clean:.2f} |")

    def test_reported_numbers_carry_their_status(self):
        reported = {"pgd": {"value": 12.5, "status": "FOUND"}}
        assert "; reported 12.50 (FOUND) |" in tables.accuracy_table([record(reported=reported)])

    def test_one_seed_twice_is_an_error(self):
        with pytest.raises(ValueError, match="two records of a with seed 0"):
            tables.accuracy_table([record(), record()])

    def test_per_class(self):
        lines = tables.class_table([record()], "pgd").splitlines()
        expected = summarize(bits(), LABELS, 4)["pgd"]["per_class"]
        assert lines[0] == "| pgd, % | threat | n | 0 | 1 | 2 | 3 |"
        cells = " | ".join(f"{v:.2f}" for v in expected)
        assert lines[2] == f"| a [main] | – | 23 | {cells} |"

    def test_provenance(self):
        text = tables.provenance([record(), record(seed=3)])
        assert "2 records" in text
        assert "seeds 0, 3" in text
        assert jax.__version__ in text


class TestCountParameters:
    def test_only_what_the_predictor_reads_counts(self):
        variables = {
            "params": {"classifier": {"kernel": jnp.ones((36, 4))}, "teacher": jnp.ones(1000)},
            "carry": {"mean": jnp.ones(36), "var": jnp.ones(36)},
        }

        def apply(v, x):
            unused = v["params"]["teacher"] * 2
            del unused
            rows = (x.reshape(len(x), -1) - v["carry"]["mean"][None]) / v["carry"]["var"][None]
            return rows @ v["params"]["classifier"]["kernel"]

        assert protocols.count_parameters(apply, variables, IMAGES[:1]) == 36 * 4

    def test_a_stack_s_other_members_do_not_count(self):
        stack = {"params": jnp.ones((10, 36, 4)), "carry": {}}

        def apply(v, x):
            return x.reshape(len(x), -1) @ v["params"][3]

        assert protocols.count_parameters(apply, stack, IMAGES[:1]) == 36 * 4
