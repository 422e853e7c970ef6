"""SupCon against NumPy, over two devices, and what the phases of the contrastive defences move."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train
from conftest import import_script

from jaxdefense import attacks, defenses, losses, models, runs, threat
from jaxdefense.defenses import base, claf
from jaxdefense.models import layers
from jaxdefense.models.projector import Projector
from jaxdefense.runs import run
from jaxdefense.train import loop, optim, plan
from jaxdefense.train.step import State, make_step
from jaxdefense.types import example_keys, fold_in

pytestmark = pytest.mark.usefixtures("autodiff_convolutions")

claf_literal = import_script("papers.claf_literal")

KEY = jax.random.key(0)
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (8, 8, 8, 1)))
LABELS = np.array([0, 1, 0, 2, 3, 3, 1, 0], np.int32)
BALL = threat.Linf(0.1)
SMALL = dict(dataset="digits", steps=2, projection=8)


def units(shape, seed=2):
    z = jax.random.normal(jax.random.key(seed), shape)
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


# Compiled as one: op by op each test would compile a dozen programs.
SUPCON = jax.jit(losses.supcon, static_argnames=("temperature", "axis_name"))


def supcon(z, groups, temperature, real=None):
    """The loss of every example, anchor by anchor in float64."""
    views, batch, _ = z.shape
    z = np.asarray(z, np.float64)
    real = np.ones(batch, bool) if real is None else real
    anchors = [(v, b) for v in range(views) for b in range(batch) if real[b]]
    losses_of = np.zeros((views, batch))
    for v, b in anchors:
        others = [a for a in anchors if a != (v, b)]
        positives = [a for a in others if groups[a[1]] == groups[b]]
        exp = [np.exp(z[v, b] @ z[a] / temperature) for a in others]
        terms = [z[v, b] @ z[a] / temperature - np.log(np.sum(exp)) for a in positives]
        losses_of[v, b] = -np.mean(terms) if terms else 0.0
    return losses_of.mean(0)


class TestSupCon:
    def test_against_numpy(self):
        z = units((3, 8, 5))
        expected = supcon(z, np.asarray(LABELS), 0.1)
        np.testing.assert_allclose(SUPCON(z, LABELS, temperature=0.1), expected, rtol=1e-5)

    def test_distinct_labels_and_two_views_are_nt_xent(self):
        """SimCLR's own form: row i of 2B against its partner i + B, the diagonal left out."""
        z = units((2, 6, 4))
        flat = np.asarray(z, np.float64).reshape(12, 4)
        similar = flat @ flat.T / 0.5
        np.fill_diagonal(similar, -np.inf)
        partner = (np.arange(12) + 6) % 12
        nt_xent = np.log(np.exp(similar).sum(1)) - similar[np.arange(12), partner]
        expected = nt_xent.reshape(2, 6).mean(0)
        for labels in (None, jnp.arange(6)):
            got = SUPCON(z, labels, temperature=0.5)
            np.testing.assert_allclose(got, expected, rtol=1e-5)

    @pytest.mark.parametrize("batch", [1, 8])
    def test_an_anchor_without_positives_gives_zero_and_a_finite_gradient(self, batch):
        z, labels = units((1, batch, 5)), LABELS[:batch]
        loss, back = jax.vjp(lambda z: SUPCON(z, labels), z)
        (grad,) = back(jnp.ones(batch))
        alone = np.asarray([int(jnp.sum(labels == y)) == 1 for y in labels])
        np.testing.assert_array_equal(np.asarray(loss) == 0, alone)
        assert np.all(np.isfinite(loss))
        assert np.all(np.isfinite(grad))

    def test_padding_is_in_no_sum(self):
        z, real = units((2, 8, 5)), jnp.arange(8) < 5
        got = SUPCON(z, LABELS, temperature=0.2, mask=real)
        np.testing.assert_allclose(
            got[:5], SUPCON(z[:, :5], LABELS[:5], temperature=0.2), rtol=1e-5
        )
        np.testing.assert_array_equal(got[5:], 0)
        moved = z.at[:, 5:].set(units((2, 3, 5), seed=9))
        np.testing.assert_array_equal(got, SUPCON(moved, LABELS, temperature=0.2, mask=real))

    def test_half_precision_is_computed_in_float32(self):
        half = units((2, 8, 5)).astype(jnp.bfloat16)
        got = SUPCON(half, LABELS)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, SUPCON(half.astype(jnp.float32), LABELS))

    @pytest.mark.slow
    def test_two_devices_equal_one(self):
        """Loss and gradient: own anchors against all views, then the mean over devices."""
        x = jax.random.normal(jax.random.key(5), (2, 8, 6))
        weights = jax.random.normal(jax.random.key(6), (6, 5))

        def mean(weights, x, labels, **kwargs):
            z = x @ weights
            z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
            return losses.supcon(z, labels, temperature=0.1, **kwargs).mean()

        @functools.partial(jax.pmap, axis_name="d", in_axes=(None, 1, 0))
        def gathered(weights, x, labels):
            value = jax.value_and_grad(mean)(weights, x, labels, axis_name="d")
            return jax.lax.pmean(value, "d")

        split = gathered(weights, x.reshape(2, 2, 4, 6), LABELS.reshape(2, 4))
        whole = jax.jit(jax.value_and_grad(mean))(weights, x, LABELS)
        for part, expected in zip(split, whole, strict=True):
            for device in (0, 1):
                np.testing.assert_allclose(part[device], expected, rtol=1e-4, atol=1e-6)

    def test_errors(self):
        with pytest.raises(ValueError, match="views"):
            losses.supcon(units((8, 5)), LABELS)
        with pytest.raises(ValueError, match="temperature"):
            losses.supcon(units((2, 8, 5)), LABELS, temperature=0.0)


def test_projector_ends_on_the_sphere_and_has_a_finite_gradient_at_zero():
    module = Projector(features=6)
    h = jax.random.normal(KEY, (3, 5))
    z, variables = jax.jit(module.init_with_output)(KEY, h)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1, rtol=1e-5)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes["fc1"] == {"kernel": (5, 5), "bias": (5,)}
    assert shapes["fc2"] == {"kernel": (5, 6), "bias": (6,)}
    dead = jax.tree.map(jnp.zeros_like, variables)
    grad = jax.jit(jax.grad(lambda h: module.apply(dead, h).sum()))(h)
    assert np.all(np.isfinite(grad))


class Tiny(nn.Module):
    """One linear layer with BatchNorm, and the head: compiles in a fraction of a ResNet's time."""

    num_classes: int = 4
    dtype: str = "float32"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bn_axis: str | None = None
    bn_sets: int = 1

    @nn.compact
    def __call__(self, x, *, train=False, features=False, bn_set=0):
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        x = layers.dense(16, x[0].size, name="fc1")(x.reshape(len(x), -1))
        x = nn.relu(layers.batch_norm(self, x, "bn1", train=train, which=bn_set))
        return layers.classify(x, self.num_classes, features)


TINY, CNN = Tiny(), models.make("cnn", 4, width=0.25)


def advance(defense, phase, steps=2, devices=1):
    """(params, carry) before and after some steps of a phase, on the mapped axis."""
    params, carry = defense.init(KEY, IMAGES[:1])
    roles = {role for update in phase.updates for role in update.roles}
    txs = {role: optim.make({"name": "sgd", "lr": 0.1}, total=9, per_epoch=3) for role in roles}
    opt = {role: tx.init(params[role]) for role, tx in txs.items()}
    step = make_step(phase, txs, phase.view, seed=0, per_epoch=3)
    batch = {"image": IMAGES, "label": LABELS, "id": jnp.arange(8)}
    batch = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), batch)
    state = State(jnp.int32(0), params, carry, opt)
    mapped = jax.pmap(
        step, axis_name=base.AXIS, in_axes=(None, 0), devices=jax.local_devices()[:devices]
    )
    for _ in range(steps):
        state, _ = jax.tree.map(lambda leaf: leaf[0], mapped(state, batch))
    return (params, carry), (state.params, state.carry)


def same(a, b):
    equal = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(equal))


class TestClaf:
    @pytest.mark.parametrize("refresh_bn", ["eval", "train"])
    def test_a_refresh_moves_the_head_and_not_a_bit_of_the_encoder(self, refresh_bn):
        defense = defenses.make("claf", TINY, BALL, **SMALL, cycles=1, refresh_bn=refresh_bn)
        _, refresh, _, _ = defense.phases
        (params, carry), (after, carry_after) = advance(defense, refresh)
        assert same(params["encoder"], after["encoder"])
        assert same(params["projector"], after["projector"])
        assert not same(params["head"], after["head"])
        assert same(carry, carry_after) == (refresh_bn == "eval")

    def test_the_attack_is_pgd_through_the_head_and_moves_no_statistics(self):
        defense = defenses.make("claf", TINY, BALL, **SMALL, cycles=1)
        params, carry = defense.init(KEY, IMAGES[:1])
        (update,) = defense.phases[2].updates
        batch = {"image": IMAGES, "label": LABELS}

        @jax.jit
        def both(params, carry):
            attack = attacks.pgd(BALL, steps=2, step_size=0.025)
            predict = defense.predictors["classifier"](params, carry)
            expected = attack(predict, KEY, IMAGES, LABELS)
            return update.craft(params, carry, batch, KEY), expected

        crafted, expected = both(params, carry)
        assert set(crafted) == {"image", "label", "adversarial"}
        np.testing.assert_allclose(crafted["adversarial"], expected, atol=1e-6)

    def test_phases_share_one_schedule_and_one_compilation(self):
        defense = defenses.make(
            "claf",
            CNN,
            BALL,
            **SMALL,
            cycles=3,
            refresh_epochs=2,
            refresh_every=1,
            final_epochs=4,
        )
        spec = {"name": "sgd", "lr": 0.05, "schedule": {"name": "cosine"}}
        segments = plan.make(defense.phases, spec, length=20, per_epoch=5)
        names = [s.phase.name for s in segments]
        assert names == ["contrast", *["refresh", "encode"] * 3, "final head"]
        assert segments[0].end == (20 - 3 * 3 - 4) * 5  # what the others leave
        encoder = {s.optimizers["encoder"] for s in segments if "encoder" in s.optimizers}
        assert [json.loads(text)[1:] for text in encoder] == [[(7 + 3) * 5, 5]]
        assert [s.fresh for s in segments[1:]] == [("head",), ()] * 3 + [("head",)]
        compiled = {(s.phase, tuple(s.optimizers.items())) for s in segments}
        assert len(compiled) == 4
        assert [s.phase.fresh_params for s in segments[1::2]] == [(), (), (), ("head",)]
        renewed = defenses.make("claf", CNN, BALL, **SMALL, cycles=1, keep_head=False)
        assert renewed.phases[1].fresh_params == ("head",)

    @pytest.mark.slow
    def test_two_devices_equal_one(self):
        """The first phase of one step on given views: the pool of a device is all devices'."""
        defense = defenses.make("claf", CNN, BALL, **SMALL, cycles=1)

        def view(key, images):
            return {"image": images, "view1": images, "view2": images[:, ::-1]}

        (update,) = defense.phases[0].updates
        phase = base.Phase("contrast", (update,), view=view)
        _, (one, _) = advance(defense, phase, steps=1, devices=1)
        (params, _), (two, _) = advance(defense, phase, steps=1, devices=2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)
        assert not same(params["encoder"], one["encoder"])

    def test_the_literal_attack_is_the_released_codes(self):
        """torchattacks' PGD on images that its loader has normalised, in NumPy."""
        mean, std, eps, alpha = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 0.2, 0.07
        x = jax.random.uniform(jax.random.key(3), (6, 4, 4, 3))
        weights = np.asarray(jax.random.normal(jax.random.key(4), (48, 4)), np.float64)
        labels = np.arange(6) % 4

        def predict(images):
            n = (images - jnp.asarray(mean).reshape(1, 1, 1, 3)) / jnp.asarray(std).reshape(
                1, 1, 1, 3
            )
            return n.reshape(len(n), -1) @ jnp.asarray(weights, jnp.float32)

        attack = claf.literal_pgd(threat.Linf(eps), mean=mean, std=std, steps=3, step_size=alpha)
        got = jax.jit(lambda x: attack(predict, KEY, x, jnp.asarray(labels)))(x)
        got = (np.asarray(got) - mean) / std

        n = (np.asarray(x, np.float64) - mean) / std
        keys = fold_in(example_keys(KEY, 6), 0)  # of the first restart
        noise = np.asarray(threat.Linf(eps).sample(keys, 0.5 + jnp.zeros(n.shape))) - 0.5
        adversarial = np.clip(n + noise, 0, 1)
        for _ in range(3):
            logits = adversarial.reshape(6, -1) @ weights
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            grad = (p - np.eye(4)[labels]) @ weights.T
            adversarial = adversarial + alpha * np.sign(grad).reshape(n.shape)
            adversarial = np.clip(n + np.clip(adversarial - n, -eps, eps), 0, 1)
        np.testing.assert_allclose(got, adversarial, atol=1e-5)
        assert np.abs(got - n).max() > 2 * eps  # no ball of that radius, in any unit

    def test_what_the_literal_clamp_leaves_of_images(self):
        """Values below the mean are frozen low, above mean + std high, the others movable."""
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        images = np.full((1, 2, 2, 3), 0.6, np.float32)
        images[0, 0, 0], images[0, 1] = 0.1, 0.9
        clamped, numbers = claf_literal.geometry(images, mean, std)
        expected = np.full((1, 2, 2, 3), 0.6)
        expected[0, 0, 0], expected[0, 1] = 0.5, 0.75
        np.testing.assert_allclose(clamped, expected, rtol=1e-6)
        assert numbers == {
            "frozen_low_percent": 25.0,
            "frozen_high_percent": 50.0,
            "movable_percent": 25.0,
            "mean_pixel_movement_of_the_clamp": round(255 * (0.4 + 0.15 * 2) / 4, 2),
            "eps_in_pixels": 2.0,
        }

    def test_literal_mode_trains_on_that_attack(self):
        model = Tiny(mean=(0.4,), std=(0.25,))
        defense = defenses.make("claf", model, BALL, **SMALL, cycles=1, mode="literal")
        params, carry = defense.init(KEY, IMAGES[:1])
        (update,) = defense.phases[2].updates
        moved = jax.jit(update.craft)(params, carry, {"image": IMAGES, "label": LABELS}, KEY)
        assert float(moved["adversarial"].min()) >= 0.4 - 1e-6
        assert float(moved["adversarial"].max()) <= 0.65 + 1e-6
        assert float(BALL.distance(moved["adversarial"], IMAGES).max()) > 0.3

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"mode": "pixels"}, "nearest: pixel"),
            ({"mode": "literal"}, "mean and std"),
            ({"refresh_bn": "trains"}, "nearest: train"),
            ({"final_head": "robust"}, "adv, clean"),
            ({"cycles": 0}, "cycles"),
            ({"temperature": 0.0}, "temperature"),
            ({"projection": 0}, "projection"),
            ({"steps": 0}, "steps"),
        ],
    )
    def test_errors(self, options, match):
        with pytest.raises(ValueError, match=match):
            defenses.make("claf", CNN, BALL, **options)


class TestRivals:
    @pytest.mark.parametrize("name", ["supcon", "rocl", "acl"])
    def test_the_head_phase_moves_the_head_only(self, name):
        options = {"dataset": "digits", **({} if name == "supcon" else {"steps": 2})}
        defense = defenses.make(name, TINY, BALL, **options)
        (params, carry), (after, carry_after) = advance(defense, defense.phases[1])
        assert same((params["encoder"], carry), (after["encoder"], carry_after))
        assert not same(params["head"], after["head"])

    def test_acl_takes_a_network_whose_batch_norm_is_off(self):
        defense = defenses.make("acl", models.make("mnist_net", 4, width=2), BALL, **SMALL)
        params, carry = defense.init(KEY, IMAGES[:1])
        assert defense.predictors["classifier"](params, carry)(IMAGES).shape == (len(IMAGES), 4)

    @pytest.mark.parametrize("branch", ["clean", "adversarial"])
    def test_acl_deploys_one_branch(self, branch):
        defense = defenses.make("acl", TINY, BALL, **SMALL, branch=branch)
        params, carry = defense.init(KEY, IMAGES[:1])
        predict = jax.jit(lambda carry: defense.predictors["classifier"](params, carry)(IMAGES))

        def shifted(of):
            def change(path, leaf):
                second = "_set1" in jax.tree_util.keystr(path)
                return leaf + 1 if second == (of == "adversarial") else leaf

            return jax.tree_util.tree_map_with_path(change, carry)

        other = {"clean": "adversarial", "adversarial": "clean"}[branch]
        np.testing.assert_array_equal(predict(shifted(other)), predict(carry))
        assert not np.array_equal(predict(shifted(branch)), predict(carry))

    def test_attacks_raise_the_contrast_within_the_ball(self):
        view = {"image": IMAGES, "view1": IMAGES, "view2": IMAGES[:, ::-1], "label": LABELS}
        for name, centre in (
            ("rocl", IMAGES),
            ("acl", jnp.concatenate([IMAGES, IMAGES[:, ::-1]])),
        ):
            defense = defenses.make(name, TINY, BALL, **{**SMALL, "steps": 5})
            params, carry = defense.init(KEY, IMAGES[:1])
            (update,) = defense.phases[0].updates

            def both(_, update=update, params=params, carry=carry, centre=centre):
                crafted = update.craft(params, carry, view, KEY)
                still = update.loss(params, carry, {**view, "moved": centre}, KEY)[0]
                return crafted["moved"], still, update.loss(params, carry, crafted, KEY)[0]

            moved, still, attacked = jax.jit(jax.vmap(both, axis_name=base.AXIS))(jnp.zeros(1))
            assert attacked[0] > still[0], name
            assert float(BALL.distance(moved[0], centre).max()) <= 0.1 + 1e-6

    @pytest.mark.parametrize(
        ("name", "options", "match"),
        [
            ("acl", {"branch": "adversary"}, "nearest: adversarial"),
            ("acl", {"head": "cleaned"}, "nearest: clean"),
            ("rocl", {"head": "cleaned"}, "nearest: clean"),
            ("rocl", {"steps": 0}, "steps"),
            ("rocl", {"temperature": -1.0}, "temperature"),
            ("supcon", {"temperature": -1.0}, "temperature"),
        ],
    )
    def test_errors(self, name, options, match):
        with pytest.raises(ValueError, match=match):
            defenses.make(name, CNN, BALL, **options)


@pytest.mark.slow
def test_claf_trains_with_weight_perturbation_and_averages(tmp_path, tfds_dir):
    """All phases twice over, through the loop, and the averaged classifier is the deployed one."""
    defense = {
        "name": "claf",
        **SMALL,
        "cycles": 2,
        "refresh_epochs": "1s",
        "refresh_every": "1s",
        "final_epochs": "2s",
        "transforms": {"ema": {"decay": 0.9}, "weight_perturbation": {"gamma": 5e-3}},
    }
    train = {"train.length": "8s", "train.validate_every": "4s", "train.checkpoint_every": "8s"}
    config = test_train.config(tfds_dir, defense=defense, **train)
    summary = loop.train(config, tmp_path, progress=False)
    assert summary["steps"] == summary["best"]["step"] == 8
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    phases = [x["phase"] for x in lines if "phase" in x]
    assert phases == ["contrast"] + ["refresh", "encode"] * 2 + ["final head"]
    trained, variables, _ = runs.restore(tmp_path)
    assert isinstance(trained, run.Run)
    logits = [
        np.asarray(trained.apply(name)(variables, IMAGES))
        for name in ("classifier", "raw_classifier")
    ]
    assert np.all(np.isfinite(logits))
    assert not np.allclose(*logits)
