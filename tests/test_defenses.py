"""The contract, over every file in defenses/; the losses of each against NumPy and each other."""

import dataclasses
import functools

import configs
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdefense import defenses, losses, models, threat
from jaxdefense.defenses import base, combine, transforms
from jaxdefense.models import adapt
from jaxdefense.train.step import State, make_step

pytestmark = pytest.mark.usefixtures("autodiff_convolutions")

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1))
LABELS = jnp.arange(8) % 4
BALL = threat.Linf(0.1)

# The options of defences that have no config of their own.
OPTIONS = {
    "combine": {"parts": {"trades": {"weight": 1.0, "steps": 2}, "standard": 0.5}},
    "min_max": {"cross_entropy": 1.0},
}


@functools.cache
def small(name):
    """(model, options) of a defence: what its config's digits_debug says, 4 classes, tiny."""
    if name not in configs.names():
        return cnn(), OPTIONS.get(name, {})
    config = configs.load(name, "digits_debug").to_dict()
    model = dict(config["model"], width={"cnn": 0.25}.get(config["model"]["name"], 4))
    options = {k: v for k, v in config["defense"].items() if k != "name"}
    return models.make(model.pop("name"), 4, **model), options


@functools.cache
def cnn():
    return models.make("cnn", 4, width=0.25)


class Own(nn.Module):
    """A user's network that knows nothing of this package: each test compiles it anew."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), (2, 2), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")(x))
        return nn.Dense(4)(x.reshape(len(x), -1))


def normed():
    return adapt.adapt(Own(), IMAGES, 4)


def build(name, model=None, **options):
    its_model, its_options = small(name)
    return defenses.make(name, model or its_model, BALL, **{**its_options, **options})


def batch(**more):
    return {
        "image": IMAGES,
        "label": LABELS,
        "id": jnp.arange(8),
        "step": jnp.int32(3),
        "epoch": jnp.float32(1.5),
        **more,
    }


def on_axis(function, *args):
    """function(*args) inside the mapped axis, on one device."""
    mapped = jax.vmap(lambda _, a: function(*a), in_axes=(0, None), axis_name=base.AXIS)
    return jax.tree.map(lambda leaf: leaf[0], mapped(jnp.zeros(1), args))


@functools.cache
def started(name):
    """(defence, first parameters, first carry), of a user's own network with BatchNorm."""
    defense = build(name, normed())
    return defense, *defense.init(KEY, IMAGES[:1])


def unlike(a, b):
    """Which leaves differ; on the host, where no shape needs a program of its own."""
    return jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), a, b)


def run_steps(defense, phase, start=None, n=2, view=lambda key, x: {"image": x}):
    params, carry = start or defense.init(KEY, IMAGES[:1])
    roles = {role for update in phase.updates for role in update.roles}
    txs = {role: optax.adam(0.01) for role in roles}  # moves by tiny gradients too
    opt = jax.jit(lambda params: {role: tx.init(params[role]) for role, tx in txs.items()})(params)
    step = make_step(phase, txs, phase.view or view, seed=0, per_epoch=4)
    state = State(jnp.int32(0), params, carry, opt)
    one = jax.jit(lambda s: on_axis(step, s, {k: batch()[k] for k in ("image", "label", "id")}))
    for _ in range(n):
        after, metrics = one(state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        state = after
    return params, state, metrics


@pytest.mark.parametrize("name", defenses.names())
def test_contract(name):
    """init, every phase's step, finite metrics, moved parameters, working predictors.

    A phase may leave some of a role's parameters alone (another BatchNorm set), but not all, and
    each moves in one phase at least.
    """
    defense, *start = started(name)
    ever = {}
    for phase in dict.fromkeys(defense.phases):
        before, state, metrics = run_steps(defense, phase, start)
        for metric, (total, count) in metrics.items():
            assert np.isfinite(total), metric
            assert count > 0, metric
        for update in phase.updates:
            for role in update.roles:
                moved = unlike(before[role], state.params[role])
                assert any(jax.tree.leaves(moved)), (phase.name, role)
                ever[role] = jax.tree.map(lambda a, b: a or b, moved, ever.get(role, moved))
    assert all(jax.tree.leaves(ever)), ever
    assert defense.primary in defense.predictors

    def predict(params, carry):
        return {name: make(params, carry)(IMAGES) for name, make in defense.predictors.items()}

    for name, logits in jax.jit(predict)(state.params, state.carry).items():
        assert logits.shape == (8, 4), name
        assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", defenses.names())
def test_crafting_leaves_statistics_alone_and_training_moves_them(name):
    defense, params, carry = started(name)
    phase = defense.phases[0]
    update = phase.updates[0]

    def both(params, carry):
        given = batch(**(phase.view(KEY, IMAGES) if phase.view else {}))
        crafted = update.craft(params, carry, given, KEY)
        _, (after, _) = update.loss(params, carry, crafted, KEY)
        return crafted, after

    crafted, after = jax.jit(functools.partial(on_axis, both))(params, carry)
    assert "image" in crafted
    if "adversarial" in crafted:
        moved = BALL.distance(crafted["adversarial"], crafted["image"])
        assert np.all(np.asarray(moved) <= 0.1 + 1e-6)
    changed = unlike(carry, after)
    assert all(jax.tree.leaves([changed[role] for role in update.roles]))


def losses_of(name, **options):
    defense = build(name, **options)
    params, carry = defense.init(KEY, IMAGES[:1])
    update = defense.phases[0].updates[0]

    def both(params, carry):
        crafted = update.craft(params, carry, batch(), KEY)
        value, (_, metrics) = update.loss(params, carry, crafted, KEY)
        predict = defense.predictors[defense.primary](params, carry)
        moved = predict(crafted["adversarial"]) if "adversarial" in crafted else None
        return value, predict(IMAGES), moved, metrics

    return on_axis(both, params, carry)


def test_standard_is_the_mean_cross_entropy():
    value, logits, _, metrics = losses_of("standard")
    np.testing.assert_allclose(value, losses.cross_entropy(logits, LABELS).mean(), rtol=1e-5)
    assert metrics["accuracy"][0] == jnp.sum(logits.argmax(-1) == LABELS)


def test_pgd_at_is_the_cross_entropy_of_what_pgd_finds():
    value, clean, moved, _ = losses_of("pgd_at", steps=5)
    np.testing.assert_allclose(value, losses.cross_entropy(moved, LABELS).mean(), rtol=1e-5)
    assert losses.cross_entropy(moved, LABELS).mean() > losses.cross_entropy(clean, LABELS).mean()


def test_trades_is_the_natural_loss_and_beta_times_the_kl():
    value, clean, moved, _ = losses_of("trades", beta=3.0, steps=5)
    kl = losses.kl(clean, moved)
    expected = (losses.cross_entropy(clean, LABELS) + 3 * kl).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert kl.min() > 0


def test_ramp_scales_eps():
    def reach(ramp_epochs):
        defense = build("pgd_at", steps=3, step_size=0.2, ramp_epochs=ramp_epochs)
        params, carry = defense.init(KEY, IMAGES[:1])
        craft = defense.phases[0].updates[0].craft
        crafted = on_axis(lambda p, c: craft(p, c, batch(), KEY), params, carry)
        return float(BALL.distance(crafted["adversarial"], IMAGES).max())

    assert reach(0.0) == pytest.approx(0.1, rel=1e-4)
    assert reach(6.0) == pytest.approx(0.025, rel=1e-3)  # epoch 1.5 of 6


def test_soft_targets_replace_labels():
    defense = build("standard")
    params, carry = defense.init(KEY, IMAGES[:1])
    soft = jnp.full((8, 4), 0.25)
    loss = defense.phases[0].updates[0].loss
    value = on_axis(lambda p, c: loss(p, c, batch(target=soft), KEY)[0], params, carry)
    logits = defense.predictors["classifier"](params, carry)(IMAGES)
    np.testing.assert_allclose(value, losses.cross_entropy(logits, soft).mean(), rtol=1e-5)


def test_combine_adds_whole_defences():
    parts = {"trades": {"weight": 2.0, "beta": 1.0, "steps": 2}, "standard": 0.25}
    value = losses_of("combine", parts=parts)[0]
    alone = losses_of("standard")[0]
    trades = build("combine", parts={"trades": {"beta": 1.0, "steps": 2}})
    params, carry = trades.init(KEY, IMAGES[:1])
    update = trades.phases[0].updates[0]

    def one(params, carry):
        return update.loss(params, carry, update.craft(params, carry, batch(), KEY), KEY)[0]

    expected = 2.0 * on_axis(one, params, carry) + 0.25 * alone
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_combine_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="at least one"):
        build("combine", parts={})
    one = build("standard")
    two = dataclasses.replace(one, phases=(one.phases[0], one.phases[0]))
    other = dataclasses.replace(
        one, phases=tuple(dataclasses.replace(p, name="other") for p in two.phases)
    )
    assert len(combine.combine([(1.0, two), (1.0, one)]).phases) == 2
    with pytest.raises(ValueError, match="cannot combine"):
        combine.combine([(1.0, two), (1.0, other)])


def test_ema_averages_parameters_and_batch_statistics():
    plain = build("standard", normed())
    defense = transforms.with_ema(plain, decay=0.5)
    start, state, _ = run_steps(defense, defense.phases[0], n=1)
    # d = min(.5, 1 / 10) at the first batch
    average = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, start, state.params)
    close(state.carry["ema"]["params"], average)
    _, carry = defense.init(KEY, IMAGES[:1])
    moved = state.carry["classifier"]
    statistics = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, carry["classifier"], moved)
    close(state.carry["ema"]["carry"]["classifier"], statistics)
    predict = defense.predictors["classifier"](state.params, state.carry)
    raw = defense.predictors["raw_classifier"](state.params, state.carry)
    assert float(jnp.abs(predict(IMAGES) - raw(IMAGES)).max()) > 1e-4


def close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_weight_perturbation_is_the_gradient_at_the_perturbed_weights():
    plain = build("standard")
    awp = transforms.with_weight_perturbation(plain, gamma=0.05, warmup_epochs=1.0)
    params, carry = plain.init(KEY, IMAGES[:1])
    loss = plain.phases[0].updates[0].loss

    def gradient(of, params, epoch):
        given = batch(epoch=jnp.float32(epoch))
        return on_axis(jax.grad(lambda p, c: of(p, c, given, KEY)[0]), params, carry)

    def shift(w, g):
        if w.ndim < 2:
            return w
        return w + 0.05 * jnp.linalg.norm(w.ravel()) * g / jnp.linalg.norm(g.ravel())

    worst = jax.tree.map(shift, params, gradient(loss, params, 2.0))
    wrapped = awp.phases[0].updates[0].loss
    close(gradient(wrapped, params, 2.0), gradient(loss, worst, 2.0))
    close(gradient(wrapped, params, 0.5), gradient(loss, params, 0.5))  # before the warm-up


def teacher():
    variables = jax.jit(cnn().init)(KEY, IMAGES)
    return base.Trained(cnn(), variables["params"], {})


@pytest.mark.parametrize("transform", transforms.names())
def test_transforms_keep_the_contract(transform):
    options = {"soft_labels": {"teacher": teacher()}}
    defense = build("trades", transforms={transform: options.get(transform, {})})
    _, state, metrics = run_steps(defense, defense.phases[0])
    assert np.isfinite(metrics["loss"][0])
    assert defense.predictors[defense.primary](state.params, state.carry)(IMAGES).shape == (8, 4)


def test_averages_and_soft_labels_of_one_defence():
    """The average is of the defence's own roles, not of the teacher that is added later."""
    chosen = {"ema": {}, "soft_labels": {"teacher": teacher()}}
    defense = build("standard", transforms=chosen)
    _, state, metrics = run_steps(defense, defense.phases[0])
    assert np.isfinite(metrics["loss"][0])
    assert list(state.carry["ema"]["params"]) == ["classifier"]


def test_errors_name_the_nearest():
    with pytest.raises(ValueError, match="nearest: trades"):
        build("trade")
    with pytest.raises(ValueError, match="nearest: beta"):
        build("trades", betta=1.0)
    with pytest.raises(ValueError, match="nearest: ema"):
        build("standard", transforms={"emma": {}})
    with pytest.raises(ValueError, match="decay"):
        build("standard", transforms={"ema": {"decay": 1.5}})
    with pytest.raises(ValueError, match="gamma"):
        build("standard", transforms={"weight_perturbation": {"gamma": -1.0}})
