"""M2AT, AVmixup, IAT and MART: what they train on and their losses, against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxdefense import defenses, threat
from jaxdefense.defenses import base
from jaxdefense.train.step import State, make_step

pytestmark = pytest.mark.usefixtures("autodiff_convolutions")

KEY = jax.random.key(0)
EPS = 0.1
BALL = threat.Linf(EPS)
# Some pixels at the box's ends, where clipping acts; row 7 stays inside.
IMAGES = jnp.round(jax.random.uniform(jax.random.key(1), (8, 8, 8, 1)) * 1.4 - 0.2, 3).clip(0, 1)
IMAGES = IMAGES.at[7].set(IMAGES[7] * 0.5 + 0.25)
LABELS = np.arange(8, dtype=np.int32) % 4
BATCH = {"image": IMAGES, "label": LABELS, "step": jnp.int32(0), "epoch": jnp.float32(9.0)}
SOFT = np.asarray(jax.nn.softmax(jax.random.normal(jax.random.key(2), (8, 4))))


class Linear(nn.Module):
    """Enough of a network for what is tested here, and compiled in no time."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(4, kernel_init=nn.initializers.normal(0.5))(x.reshape(len(x), -1))


@functools.cache
def build(name, **options):
    defense = defenses.make(name, Linear(), BALL, steps=2, **options)
    return defense, *defense.init(jax.random.key(3), IMAGES[:1])


@functools.cache
def crafted(name, **options):
    """What the defence adds to the batch, as NumPy arrays."""
    defense, params, carry = build(name, **options)
    craft = jax.jit(defense.phases[0].updates[0].craft)
    return jax.tree.map(np.asarray, craft(params, carry, BATCH, KEY))


def loss_of(name, batch, **options):
    defense, params, carry = build(name, **options)
    value, (_, metrics) = jax.jit(defense.phases[0].updates[0].loss)(params, carry, batch, KEY)
    for total, count in metrics.values():
        assert 0 <= total <= count == 8
    return value


@functools.cache
def predict(name):
    defense, params, carry = build(name)
    return jax.jit(defense.predictors["classifier"](params, carry))


def logits(name, images):
    """Float64, and of the same weights under all options."""
    return np.asarray(predict(name)(images), np.float64)


def cross_entropy(z, targets):
    return -np.sum(targets * scipy.special.log_softmax(z, -1), -1)


def smooth(targets, share):
    return share * targets + (1 - share) * (1 - targets) / (targets.shape[-1] - 1)


def column(values, ndim):
    return np.asarray(values).reshape((-1,) + (1,) * (ndim - 1))


HOT = np.eye(4)[np.asarray(LABELS)]
X = np.asarray(IMAGES)


# Each craft is compiled once; what only the loss reads is varied on top of it.
R1 = {"pairing": "complement", "gamma": 1.0}
R2 = {"pairing": "shuffle", "gamma": 2.0, "mask_per_sample": False}


@pytest.mark.parametrize("options", [R1, R2])
def test_m2at_mixes_two_partially_perturbed_images(options):
    batch, gamma = crafted("m2at", **options), options["gamma"]
    mask, lam, order = batch["mask"], column(batch["lam"], 4), batch["order"]
    d = batch["adversarial"] - X
    first = np.clip(X + gamma * mask * d, 0, 1)
    second = np.clip(X + gamma * (1 - mask) * d, 0, 1)
    expected = lam * first + (1 - lam) * second[order]
    np.testing.assert_allclose(batch["mixed"], expected, atol=1e-6)
    assert batch["mixed"].min() >= 0
    assert batch["mixed"].max() <= 1
    assert sorted(order) == list(range(8))
    assert (list(order) == list(range(8))) == (options is R1)
    assert np.all(mask == mask[:1]) == (options is R2)
    assert np.ptp(lam) > 0.1


def test_reading_one_is_a_perturbation_inside_the_ball():
    """gamma 1: x_m = x + [lam M + (1 - lam)(1 - M)] d, and nothing is clipped."""
    batch = crafted("m2at", **R1)
    mask, lam = batch["mask"], column(batch["lam"], 4)
    strength = lam * mask + (1 - lam) * (1 - mask)
    d = batch["adversarial"] - X
    np.testing.assert_allclose(batch["mixed"], X + strength * d, atol=1e-6)
    assert np.abs(batch["mixed"] - X).max() <= EPS + 1e-6
    assert np.abs(crafted("m2at", **R2)["mixed"] - X).max() > 2 * EPS  # R2 leaves it


def m2at_targets(batch, targets, labels, l1, l2):
    area, lam = column(batch["mask"].mean((1, 2, 3)), 2), column(batch["lam"], 2)

    def soft(s):
        if labels == "onehot":
            return targets
        return (1 - s) * smooth(targets, l1) + s * smooth(targets, l2)

    return lam * soft(area) + (1 - lam) * soft(1 - area)[batch["order"]]


@pytest.mark.parametrize("labels", ["area", "onehot"])
@pytest.mark.parametrize("reading", [R1, R2])
def test_m2at_loss(reading, labels):
    batch, options = crafted("m2at", **reading), {**reading, "labels": labels, "l1": 0.9, "l2": 0.4}
    z = logits("m2at", batch["mixed"])
    target = m2at_targets(batch, HOT, labels, 0.9, 0.4)
    np.testing.assert_allclose(target.sum(-1), 1)
    found = loss_of("m2at", batch, **options)
    np.testing.assert_allclose(found, cross_entropy(z, target).mean(), rtol=1e-5)
    given = m2at_targets(batch, np.asarray(SOFT), labels, 0.9, 0.4)
    found = loss_of("m2at", {**batch, "target": SOFT}, **options)
    np.testing.assert_allclose(found, cross_entropy(z, given).mean(), rtol=1e-5)


@pytest.mark.parametrize("filled", [0.0, 1.0])
def test_empty_and_full_boxes(filled):
    """The box's area divides nothing: one half carries no perturbation and label l1."""
    batch = crafted("m2at", **R1)
    batch = {**batch, "mask": np.full_like(batch["mask"], filled)}
    defense, params, carry = build("m2at", **R1)
    loss = defense.phases[0].updates[0].loss
    value, grad = jax.jit(jax.value_and_grad(lambda p: loss(p, carry, batch, KEY)[0]))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grad))
    lam = column(batch["lam"], 2)
    share = lam * (0.55 if filled else 1.0) + (1 - lam) * (1.0 if filled else 0.55)
    z = logits("m2at", batch["mixed"])
    np.testing.assert_allclose(value, cross_entropy(z, smooth(HOT, share)).mean(), rtol=1e-5)


def test_avmixup():
    batch = crafted("avmixup")
    w = column(batch["lam"], 4)
    vertex = np.clip(X + 2 * (batch["adversarial"] - X), 0, 1)
    np.testing.assert_allclose(batch["mixed"], w * X + (1 - w) * vertex, atol=1e-6)
    assert np.abs(batch["mixed"] - X).max() > EPS  # the vertex lies beyond the ball
    w = w[..., 0, 0]
    target = w * HOT + (1 - w) * smooth(HOT, 0.3)
    z = logits("avmixup", batch["mixed"])
    found = loss_of("avmixup", batch, l2=0.3)
    np.testing.assert_allclose(found, cross_entropy(z, target).mean(), rtol=1e-5)


@pytest.mark.parametrize("lam_per_sample", [False, True])
def test_iat(lam_per_sample):
    batch = crafted("iat", lam_per_sample=lam_per_sample)
    expected, draws = 0.0, []
    for kind in ("image", "adversarial"):
        mixture, x = batch["mixtures"][kind], batch[kind]
        lam, order = column(mixture["lam"], 4), mixture["order"]
        assert (np.ptp(lam) > 0) == lam_per_sample
        assert sorted(order) == list(range(8))
        np.testing.assert_allclose(mixture["image"], lam * x + (1 - lam) * x[order], atol=1e-6)
        z = logits("iat", mixture["image"])
        lam = lam[:, 0, 0, 0]
        # lam CE(y) + (1 - lam) CE(y of the other image), as the paper writes it
        pair = lam * cross_entropy(z, HOT) + (1 - lam) * cross_entropy(z, HOT[order])
        expected += pair.mean() / 2
        draws.append((lam[0], *order))
    assert draws[0][0] != draws[1][0]
    assert draws[0][1:] != draws[1][1:]
    found = loss_of("iat", batch, lam_per_sample=lam_per_sample)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mart():
    batch = crafted("mart")
    clean, moved = (logits("mart", batch[k]) for k in ("image", "adversarial"))
    p, q = scipy.special.softmax(clean, -1), scipy.special.softmax(moved, -1)
    boosted = cross_entropy(moved, HOT) - np.log(1 - np.where(HOT > 0, 0, q).max(-1))
    kl = scipy.special.rel_entr(p, q).sum(-1) * (1 - np.sum(HOT * p, -1))
    found = loss_of("mart", batch, beta=3.0)
    np.testing.assert_allclose(found, (boosted + 3 * kl).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["m2at", "avmixup", "iat", "mart"])
def test_what_is_crafted_carries_no_gradient(name):
    defense, params, carry = build(name)
    craft = defense.phases[0].updates[0].craft

    def total(params, images):
        batch = craft(params, carry, {**BATCH, "image": images}, KEY)
        return jnp.sum(batch["adversarial"] * 3.0)

    to_params, to_images = jax.jit(jax.grad(total, (0, 1)))(params, IMAGES)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_params))
    assert not np.any(to_images)
    assert np.abs(crafted(name)["adversarial"] - X).max() == pytest.approx(EPS, rel=1e-4)


def unmapped(*trees):
    return jax.tree.map(lambda leaf: leaf[0], trees)


@pytest.mark.slow
def test_m2at_beside_another_defence_averaged_at_perturbed_weights():
    parts = {"m2at": {"pairing": "shuffle", "steps": 1}, "mart": {"weight": 0.5, "steps": 1}}
    defense = defenses.make(
        "combine",
        Linear(),
        BALL,
        parts=parts,
        transforms={"ema": {"decay": 0.5}, "weight_perturbation": {"gamma": 0.01}},
    )
    params, carry = jax.jit(defense.init)(KEY, IMAGES[:1])
    tx = {"classifier": optax.sgd(0.05)}
    opt = {"classifier": tx["classifier"].init(params["classifier"])}
    step = make_step(defense.phases[0], tx, lambda key, x: {"image": x}, seed=0, per_epoch=4)
    images = {"image": IMAGES, "label": LABELS}
    mapped = jax.jit(jax.vmap(lambda s: step(s, images), axis_name=base.AXIS))
    before = state = jax.tree.map(lambda leaf: leaf[None], State(jnp.int32(0), params, carry, opt))
    for _ in range(3):
        state, metrics = mapped(state)
        assert np.isfinite(metrics["loss"][0])
    assert {"0_mixed_accuracy", "1_robust_accuracy"} <= set(metrics)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.params, state.params)
    assert all(jax.tree.leaves(moved))
    raw = defense.predictors["raw_classifier"](*unmapped(state.params, state.carry))(IMAGES)
    averaged = defense.predictors["classifier"](*unmapped(state.params, state.carry))(IMAGES)
    assert 0 < float(jnp.abs(raw - averaged).max()) < 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m2at", {"pairing": "complete"}, "unknown pairing 'complete'; nearest: complement"),
        ("m2at", {"labels": "hard"}, "unknown labels 'hard'.*known: area, onehot"),
        ("m2at", {"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        ("m2at", {"mask_alpha": -1.0}, "mask_alpha must be positive and finite, got -1.0"),
        ("m2at", {"lam_alpha": 0.0}, "lam_alpha must be positive and finite, got 0.0"),
        ("m2at", {"l2": 1.5}, r"l2 must be in \[0, 1\], got 1.5"),
        ("m2at", {"steps": 0}, "steps must be an integer >= 1, got 0"),
        ("avmixup", {"l1": -0.1}, r"l1 must be in \[0, 1\], got -0.1"),
        ("avmixup", {"step_size": -1.0}, "step_size must be finite and not negative"),
        ("iat", {"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ("mart", {"beta": -5.0}, "beta must not be negative, got -5.0"),
        ("mart", {"ramp_epochs": -1.0}, "ramp_epochs must not be negative, got -1.0"),
        ("pgd_at", {"attack_loss": "hinge"}, "unknown loss 'hinge'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(name, options, message):
    with pytest.raises(ValueError, match=message):
        defenses.make(name, Linear(), BALL, **options)
