"""Cost-sensitive training by hand, its parts in combine, and stacks equal to their members."""

import types

import configs
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from conftest import import_script
from papers import metric_i, min_max

from jaxdefense import attacks, defenses, losses, runs, threat
from jaxdefense.defenses import base, transforms
from jaxdefense.evaluation import cascade, protocols, tables
from jaxdefense.models import layers
from jaxdefense.train import loop, plan
from jaxdefense.train.step import State, make_step

pytestmark = pytest.mark.usefixtures("autodiff_convolutions")

cost_sensitive = import_script("papers.cost_sensitive")

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).uniform(size=(8, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(8) % 4
BALL = threat.Linf(0.1)
LR = 0.3


class Linear(nn.Module):
    """Softmax regression, whose gradients are short enough to write down."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


class Tiny(nn.Module):
    """Two convolutions and a linear layer."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, x, *, train=False):
        for name in ("conv1", "conv2"):
            x = nn.relu(layers.Conv(2, (3, 3), strides=2, name=name)(x))
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


def stepped(defense, n=1, phase=-1):
    """(params before, state after n SGD steps, metrics) of one phase."""
    phase = defense.phases[phase]
    params, carry = defense.init(KEY, IMAGES[:1])
    tx = optax.sgd(LR)
    state = State(jnp.int32(0), params, carry, {"classifier": tx.init(params["classifier"])})
    step = make_step(phase, {"classifier": tx}, lambda k, x: {"image": x}, seed=0, per_epoch=2)
    given = {"image": jnp.asarray(IMAGES), "label": jnp.asarray(LABELS), "id": jnp.arange(8)}

    @jax.jit
    def run(state):
        for _ in range(n):
            one = jax.vmap(lambda _, s: step(s, given), (0, None), axis_name=base.AXIS)
            state, metrics = jax.tree.map(lambda leaf: leaf[0], one(jnp.zeros(1), state))
        return state, metrics

    return params, *run(state)


def on_axis(function, *args):
    mapped = jax.vmap(lambda _, a: function(*a), (0, None), axis_name=base.AXIS)
    return jax.tree.map(lambda leaf: leaf[0], jax.jit(mapped)(jnp.zeros(1), args))


def batch(**more):
    given = {"image": IMAGES, "label": LABELS, "step": np.int32(3), "epoch": np.float32(1.5)}
    return jax.tree.map(jnp.asarray, {**given, **more})


def close(got, expected, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-6, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def test_csa_takes_two_steps_the_second_on_fgsm_of_the_first():
    """Both updates in NumPy: gradients of CE + l1 sum_j C[j, y] p_j for softmax regression."""
    defense = defenses.make(
        "csa", Linear(), BALL, protect=[1, 2], cost=6.0, cost_weight=0.7, pretrain=0
    )
    before, state, _ = stepped(defense)
    x = IMAGES.reshape(8, -1).astype(np.float64)
    hot = np.eye(4)[LABELS]
    cost = np.array([[0, 6, 6, 1], [6, 0, 6, 6], [6, 6, 0, 6], [1, 6, 6, 0]])
    w, b = (np.asarray(before["classifier"]["head"][k], np.float64) for k in ("kernel", "bias"))

    def of_logits(x):
        """(8, 4): the gradient of each example's loss to its logits."""
        p = scipy.special.softmax(x @ w + b, -1)
        c = cost[:, LABELS].T
        return (p - hot) + 0.7 * p * (c - np.sum(c * p, -1, keepdims=True))

    g = of_logits(x)
    w, b = w - LR * x.T @ g / 8, b - LR * g.mean(0)
    x_adv = np.clip(x + 0.1 * np.sign(of_logits(x) @ w.T), 0, 1)
    g = of_logits(x_adv)
    w, b = w - LR * x_adv.T @ g / 8, b - LR * g.mean(0)
    close(state.params["classifier"]["head"], {"kernel": w, "bias": b})


def test_phases_begin_with_a_warm_start_and_a_fresh_optimizer():
    adam = {"name": "adam", "lr": 1e-3}
    for name, options, expected in (
        ("cse", {}, [("normal", 1), ("cse", 1)]),
        ("cse", {"adversarial": True}, [("adv", 2), ("cse", 2)]),
        ("csa", {}, [("adv", 2), ("cse", 2)]),
        ("csa", {"start": "normal"}, [("normal", 1), ("cse", 2)]),
        ("fgsm_at", {}, [("adv", 2)]),
        ("fgsm_at", {"clean_step": False, "pretrain": "50%"}, [("normal", 1), ("adv", 1)]),
    ):
        defense = defenses.make(name, Tiny(), BALL, **options)
        assert [(p.name, len(p.updates)) for p in defense.phases] == expected
        for segment in plan.make(defense.phases, adam, length="4e", per_epoch=3):
            assert segment.fresh == ("classifier",)


def test_unclipped_images_leave_the_box_and_clipped_ones_do_not():
    def crafted(**options):
        defense = defenses.make("fgsm_at", Linear(), BALL, **options)
        params, carry = defense.init(KEY, IMAGES[:1])
        craft = defense.phases[0].updates[1].craft
        return on_axis(lambda p, c: craft(p, c, batch(), KEY), params, carry)["adversarial"]

    inside, free = crafted(), crafted(bounds=[-1, 2])
    assert inside.min() >= 0
    assert inside.max() <= 1
    np.testing.assert_allclose(np.abs(free - IMAGES), 0.1, rtol=1e-4)
    assert free.min() < 0


def test_cse_adds_the_regularizer_once():
    options = dict(protect=2, cost=4.0, cost_weight=0.5, layers={"conv1": 0.3, "conv2": 0.2})
    defense = defenses.make("cse", Tiny(), BALL, kurtosis={"conv1": 0.05}, **options)
    params, carry = defense.init(KEY, IMAGES[:1])
    loss = defense.phases[-1].updates[0].loss
    value = on_axis(lambda p, c: loss(p, c, batch(), KEY)[0], params, carry)
    logits = defense.predictors["classifier"](params, carry)(IMAGES)
    natural = losses.cross_entropy(logits, LABELS)
    expected = natural + 0.5 * losses.expected_cost(logits, LABELS, losses.cost_matrix(4, 2, 4.0))
    one, two = (params["classifier"][k]["kernel"] for k in ("conv1", "conv2"))
    penalty = 0.3 * losses.min_max(one) + 0.2 * losses.min_max(two)
    penalty -= 0.05 * losses.excess_kurtosis(one)
    np.testing.assert_allclose(value, expected.mean() + penalty, rtol=1e-5)


def test_combine_takes_min_max_as_a_term():
    """Two defences in one step, the regulariser beside an adversarial part."""
    parts = {"pgd_at": {"weight": 2.0, "steps": 2}, "min_max": {"weight": 0.1}}
    both = defenses.make("combine", Tiny(), BALL, parts=parts)
    params, carry = both.init(KEY, IMAGES[:1])
    alone = defenses.make("combine", Tiny(), BALL, parts={"pgd_at": {"weight": 2.0, "steps": 2}})

    def value(defense):
        update = defense.phases[0].updates[0]

        def of(p, c):
            return update.loss(p, c, update.craft(p, c, batch(), KEY), KEY)[0]

        return on_axis(of, params, carry)

    term = 0.1 * losses.min_max(params["classifier"]["conv1"]["kernel"])
    np.testing.assert_allclose(value(both), value(alone) + term, rtol=1e-5)


def test_zhang_evans_weighs_each_class_the_same():
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    defense = defenses.make(
        "zhang_evans", Linear(), BALL, protect=1, cost=3.0, others=0.5, alpha=0.7, steps=2
    )
    params, carry = defense.init(KEY, IMAGES[:1])
    update = defense.phases[0].updates[0]

    def run(p, c):
        crafted = update.craft(p, c, batch(label=labels), KEY)
        return update.loss(p, c, crafted, KEY)[0], crafted["adversarial"]

    value, x_adv = on_axis(run, params, carry)
    predict = defense.predictors["classifier"](params, carry)
    z, z_adv = (np.asarray(predict(x), np.float64) for x in (IMAGES, x_adv))
    cost = np.full((4, 4), 0.5)
    cost[1] = 3.0
    total = np.mean(scipy.special.logsumexp(z, -1) - z[np.arange(8), labels])
    for k in range(3):
        rows = z_adv[labels == k]
        others = [j for j in range(4) if j != k]
        inner = sum(cost[k, j] * np.exp(rows[:, j] - rows[:, k]) for j in others)
        total += 0.7 * np.mean(np.log1p(inner))
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_frl_begins_as_trades_and_follows_the_class_errors():
    options = dict(beta=2.0, steps=2, step_size=0.05)
    frl = defenses.make("frl", Linear(), BALL, memory=0.5, margin_rate=2.0, **options)
    trades = defenses.make("trades", Linear(), BALL, **options)
    params, carry = frl.init(KEY, IMAGES[:1])

    def one(defense):
        update = defense.phases[0].updates[0]

        def run(p, c, given):
            crafted = update.craft(p, c, given, KEY)
            return update.loss(p, c, crafted, KEY), crafted["adversarial"]

        return run

    (value, (after, _)), x_adv = on_axis(one(frl), params, carry, batch())
    (plain, _), _ = on_axis(one(trades), params, {"classifier": {}}, batch())
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    predict = frl.predictors["classifier"](params, carry)
    clean, moved = (np.asarray(predict(x)) for x in (IMAGES, x_adv))
    right, kept = clean.argmax(-1) == LABELS, moved.argmax(-1) == LABELS
    now = np.array(
        [[np.sum(bad[k == LABELS]) / 2 for k in range(4)] for bad in (~right, right & ~kept)]
    )
    errors = now * (1 - min(0.5, 4 / 13))  # at step 3
    close(after["frl"]["errors"], errors)
    gap = errors - errors.mean(1, keepdims=True) - 0.05
    expected = 1.5 * np.array([0.05, 0.1, 2.0])[:, None] * gap[[0, 1, 1]]
    expected = np.clip(expected, 0, np.array([[np.inf], [np.inf], [np.log(2)]]))
    assert expected[0].max() > 0
    close(after["frl"]["multipliers"], expected)

    # Weights and radii of given multipliers.
    multipliers = np.array([[0.2, 0, 0, 0.1], [0, 0.3, 0, 0], [np.log(2), 0, 0, 0]], np.float32)
    carry = {**carry, "frl": {**after["frl"], "multipliers": jnp.asarray(multipliers)}}
    (value, _), x_adv = on_axis(one(frl), params, carry, batch())
    reach = np.asarray(BALL.distance(x_adv, IMAGES))
    assert np.all(reach[LABELS == 0] > 0.11)
    assert np.all(reach[LABELS != 0] < 0.1 + 1e-6)
    natural = np.array([1.5, 0.7, 0.7, 1.1])[LABELS]
    robust = np.array([0.7, 1.9, 0.7, 0.7])[LABELS]
    expected = natural * losses.cross_entropy(clean, LABELS) + 2 * robust * losses.kl(
        jnp.asarray(clean), predict(x_adv)
    )
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)


def test_a_stack_over_protected_classes_equals_its_members():
    """Models in one program are so many models: both steps of CSE+AT, crafts included."""
    options = dict(adversarial=True, layers={"conv1": 0.05}, pretrain=0)
    chosen = {"stacked": {"members": 4, "prefix": "protect", "same_keys": True}}
    each = defenses.make("cse", Tiny(), BALL, protect="each", transforms=chosen, **options)
    assert list(each.predictors) == [f"protect{i}" for i in range(4)]
    before, state, metrics = stepped(each)
    assert float(metrics["update0_accuracy"][1]) == 32
    assert float(metrics["update0_loss"][1]) == 4
    alone = defenses.make("cse", Tiny(), BALL, protect=3, **options)
    first, last, _ = stepped(alone)
    close(jax.tree.map(lambda leaf: leaf[3], before), first)
    close(jax.tree.map(lambda leaf: leaf[3], state.params), last.params)
    predict = each.predictors["protect3"](state.params, state.carry)
    logits = alone.predictors["classifier"](last.params, last.carry)(IMAGES)
    close(predict(IMAGES), logits)
    kernel = state.params["classifier"]["conv1"]["kernel"]
    assert float(jnp.abs(kernel[0] - kernel[3]).max()) > 1e-4


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_warm_start_is_computed_once_for_all_members(adversarial):
    options = dict(adversarial=adversarial, layers={"conv1": 0.05}, transforms={})
    chosen = {"stacked": {"members": 4, "prefix": "protect", "same_keys": True}}
    each = defenses.make("cse", Tiny(), BALL, protect="each", **{**options, "transforms": chosen})
    assert [phase.shared_by_variants for phase in each.phases] == [True, False]
    before, state, metrics = stepped(each, n=2, phase=0)
    accuracy = "update0_accuracy" if adversarial else "accuracy"
    assert float(metrics[accuracy][1]) == 8  # of one member
    alone = defenses.make("cse", Tiny(), BALL, protect=3, **options)
    first, last, _ = stepped(alone, n=2, phase=0)
    for stack, member in ((before, first), (state.params, last.params)):
        close(stack, jax.tree.map(lambda leaf: np.stack(4 * [leaf]), member))
    np.testing.assert_array_equal(state.carry["member"], np.eye(4))
    # Members that draw different keys are not equal, and each does its own.
    differ = {"stacked": {"members": 4, "prefix": "protect"}}
    own = defenses.make("cse", Tiny(), BALL, protect="each", **{**options, "transforms": differ})
    assert float(stepped(own, phase=0)[2][accuracy][1]) == 32


def test_each_member_of_a_stack_declares_the_class_it_is_judged_on():
    stack = {"stacked": {"members": 4, "prefix": "protect"}}
    expected = {f"protect{i}": i for i in range(4)}
    options = {"cse": {"layers": {}}, "csa": {}}
    for name, more in options.items():
        each = defenses.make(name, Linear(), BALL, protect="each", **more)
        assert each.judged == {}
        chosen = {**stack, "ema": {}, "weight_perturbation": {}}
        each = defenses.make(name, Linear(), BALL, protect="each", transforms=chosen, **more)
        assert each.judged == expected
        assert set(expected) < set(each.predictors)
        seeds = defenses.make(name, Linear(), BALL, protect=2, transforms=stack, **more)
        assert seeds.judged == {}
    for parts in (
        {"cse": {"protect": "each", "layers": {}, "pretrain": 0}, "standard": 0.5},
        {"standard": 0.5, "cse": {"protect": "each", "layers": {}, "pretrain": 0}},
    ):
        both = defenses.make("combine", Linear(), BALL, parts=parts, transforms=stack)
        assert both.judged == expected
    parts = {"csa": {"protect": "each", "pretrain": 0, "transforms": stack}}
    assert defenses.make("combine", Linear(), BALL, parts=parts).judged == expected


def test_a_stack_of_seeds_differs_and_errors_say_why():
    standard = defenses.make("standard", Linear(), BALL)
    params, _ = transforms.stacked(standard, members=3).init(KEY, IMAGES[:1])
    kernel = params["classifier"]["head"]["kernel"]
    alone, _ = standard.init(jax.random.fold_in(KEY, 2), IMAGES[:1])
    np.testing.assert_array_equal(kernel[2], alone["classifier"]["head"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1])
    with pytest.raises(ValueError, match="at least one"):
        transforms.stacked(standard, members=0)
    each = defenses.make("cse", Linear(), BALL, protect="each", layers={})
    with pytest.raises(ValueError, match="4 variants, and 3 members"):
        transforms.stacked(each, members=3).init(KEY, IMAGES[:1])


def test_stacks_are_made_last():
    """Averages and perturbations are each member's own, whatever the order in the config."""
    chosen = {"stacked": {"members": 2}, "weight_perturbation": {"gamma": 0.1}, "ema": {}}
    stack = defenses.make("standard", Linear(), BALL, transforms=chosen)
    del chosen["stacked"]
    alone = defenses.make("standard", Linear(), BALL, transforms=chosen)
    assert list(stack.predictors)[:2] == ["member0", "member0_raw_classifier"]
    same = transforms.stacked(alone, members=2, same_keys=True)
    close(jax.tree.map(lambda leaf: leaf[1], stepped(same)[1].params), stepped(alone)[1].params)
    assert stepped(stack)[1].carry["ema"]["params"]["classifier"]["head"]["bias"].shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cse", {"protect": 4}, r"\[0, 4\), got 4"),
        ("cse", {"protect": "all"}, '"each"'),
        ("cse", {"cost_weight": -1.0}, "cost_weight"),
        ("cse", {"layers": {"conv1": -1.0}}, "weight of conv1"),
        ("cse", {"start": "normals"}, "nearest: normal"),
        ("csa", {"bounds": [1.0, 0.0]}, "bounds"),
        ("fgsm_at", {"bounds": [0.0]}, "bounds"),
        ("min_max", {"cross_entropy": -1.0}, "cross_entropy"),
        ("zhang_evans", {"alpha": -1.0}, "alpha"),
        ("frl", {"total_limit": 1.0}, "total_limit"),
        ("frl", {"largest_margin": 0.5}, "largest_margin"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        defenses.make(name, Tiny(), BALL, **options)


def test_an_unknown_layer_is_named_with_the_nearest():
    for name in ("cse", "min_max"):
        defense = defenses.make(name, Tiny(), BALL, layers={"conv9": 1.0})
        with pytest.raises(ValueError, match="nearest: conv"):
            defense.init(KEY, IMAGES[:1])


def test_normalised_protocol_has_no_box_and_deepfool_no_budget():
    x = (IMAGES - 0.5) / 0.25
    w = jax.random.normal(KEY, (64, 4))

    def predict(x):
        return x.reshape(x.shape[0], -1) @ w

    labels = predict(x).argmax(-1)
    anywhere = threat.L2(1600.0, cost_sensitive.WIDE)
    chosen = cost_sensitive.protocol(losses.cross_entropy, 0.3, anywhere, inside=False)
    assert list(chosen) == [
        "normalised fgsm",
        "normalised deepfool3",
        "normalised pgd40 (invalid)",
    ]
    images = {name: attack(predict, KEY, jnp.asarray(x), labels) for name, attack in chosen.items()}
    np.testing.assert_allclose(np.abs(images["normalised fgsm"] - x), 0.3, rtol=1e-4)
    deepfool = images["normalised deepfool3"]
    assert not np.any(predict(deepfool).argmax(-1) == labels)  # linear: one step is enough
    # It leaves the predicted class, whatever the label: a wrong image may become right.
    again = chosen["normalised deepfool3"](predict, KEY, jnp.asarray(x), (labels + 1) % 4)
    np.testing.assert_array_equal(again, deepfool)
    assert np.any(predict(again).argmax(-1) == (labels + 1) % 4)
    # The nearest boundary of a linear network, with the overshoot.
    gaps, normals = predict(x)[0] - predict(x)[0][labels[0]], w - w[:, labels[0]][:, None]
    distances = np.abs(gaps) / np.maximum(np.linalg.norm(normals, axis=0), 1e-9)
    nearest = np.sort(distances)[1]
    length = float(jnp.linalg.norm((deepfool - x)[0]))
    assert length == pytest.approx(1.02 * nearest, rel=1e-2)
    far = images["normalised pgd40 (invalid)"]
    assert np.abs(far - x).max() > 0.5  # -2 is clipped to MNIST's black: no ball around x
    assert far.min() == np.float32(cost_sensitive.CLIPPED[0])
    bright = x > cost_sensitive.CLIPPED[0] + 0.3
    assert np.abs(far - x)[bright].max() == pytest.approx(0.3, rel=1e-4)


def test_min_max_report():
    kernel = np.zeros((2, 2, 1, 25), np.float32)
    kernel.flat[0], kernel.flat[1] = 1.0, -0.5
    told = min_max.report(
        {"conv1": {"kernel": jnp.asarray(kernel)}, "fc": {"kernel": jnp.ones((3, 2))}}
    )
    assert list(told) == ["conv1"]
    assert told["conv1"]["small"] == 98
    assert told["conv1"]["kurtosis"] > 50
    assert told["conv1"]["min_max"] == pytest.approx(1.5 - 1.25**0.5)
    assert sum(told["conv1"]["histogram"]["counts"]) == 100
    both = {"before": told, "after": told}
    assert "| conv1, before |" in min_max.table(both)
    assert len(min_max.figure(both).axes) == 1
    with pytest.raises(ValueError, match="no convolution"):
        min_max.report({"fc": {"kernel": jnp.ones((3, 2))}})


def test_metric_i_takes_each_class_from_its_protector():
    def result(*per_class):
        return {"clean": {"accuracy": 0.0, "per_class": list(per_class)}}

    stack = {"results": {"protect0": result(90.0, 10.0), "protect1": result(20.0, 80.0)}}
    assert metric_i.means(stack) == {"clean": 85.0}
    single = {"results": {"classifier": result(90.0, 10.0)}}
    assert metric_i.means(single) == {"clean": 50.0}
    other = {"results": {"protect0": result(60.0, 0.0), "protect1": result(0.0, 40.0)}}
    seeds = [dict(name="cse", seed=seed, **some) for seed, some in enumerate((stack, other))]
    table = metric_i.table(seeds)
    assert table.splitlines()[2] == "| cse | – | – | 67.50 ± 24.75 (2) |"


@pytest.mark.slow
def test_a_stack_trains_validates_and_is_recorded(tmp_path, tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    config = configs.load("standard", "digits_debug").to_dict()
    config["defense"]["transforms"] = {"stacked": {"members": 2, "prefix": "protect"}}
    config["validation"] = {"name": "fgsm"}
    config["evaluation"]["attacks"] = {}
    loop.train(config, tmp_path, progress=False)
    run, variables, meta = runs.restore(tmp_path, kind="last")
    record = protocols.configured(run, variables, training=meta, examples=64)
    assert list(record["results"]) == ["protect0", "protect1"]
    assert "[protect1]" in tables.accuracy_table([record])
    bits = [record["results"][f"protect{i}"]["clean"]["bits"] for i in range(2)]
    assert bits[0] != bits[1]
    weak = cascade.Stage("apgd-ce", attacks.apgd(threat.Linf(0.15), steps=3), 4, 3)
    monkeypatch.setattr(cascade, "stages", lambda *_, **__: [weak])
    honest = protocols.autoattack(run, variables, training=meta, examples=64)
    assert list(honest["results"]) == ["protect0"]  # seeds of one defence: the deployed one
    assert honest["results"]["protect0"]["clean"]["bits"] == bits[0]
    assert list(honest["cascade"]) == ["protect0", "flags"]
    weights = cost_sensitive.weights(run, variables["params"])
    assert list(min_max.report(weights)) == ["conv1", "conv2"]


@pytest.mark.slow
def test_autoattack_judges_each_member_on_its_own_class(tmp_path, tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    weak = cascade.Stage("apgd-ce", attacks.apgd(threat.Linf(0.15), steps=3), 4, 3)
    monkeypatch.setattr(cascade, "stages", lambda *_, **__: [weak])
    config = configs.load("cse", "digits_debug").to_dict()
    config["defense"] |= dict(
        protect="each", transforms={"stacked": {"members": 10, "prefix": "protect"}}
    )
    loop.train(config, tmp_path, progress=False)
    run, variables, meta = runs.restore(tmp_path, kind="last")
    assert run.defense.judged == {f"protect{i}": i for i in range(10)}
    record = protocols.autoattack(run, variables, training=meta, folder=tmp_path / "honest")
    labels, images = (getattr(run.arrays("test"), name) for name in ("labels", "images"))
    for i, (name, result) in enumerate(record["results"].items()):
        assert (name, result["clean"]["n"]) == (f"protect{i}", (labels == i).sum())
        predict = run.defense.predictors[name](variables["params"], variables["carry"])
        logits = predict(jnp.asarray(images[labels == i] / np.float32(255)))
        assert result["clean"]["accuracy"] == pytest.approx(100 * np.mean(logits.argmax(-1) == i))
        assert result["autoattack"]["accuracy"] <= result["clean"]["accuracy"]
    assert [*record["results"], "flags"] == list(record["cascade"])
    assert (tmp_path / "honest" / "protect9").exists()
    assert set(metric_i.means(record)) == {"clean", "aa-fast", "autoattack"}


def test_the_member_of_a_stack_of_one_is_judged_on_its_class():
    def take(rows):
        return LABELS[rows]

    arrays = types.SimpleNamespace(labels=LABELS, take=take)
    run = types.SimpleNamespace(defense=types.SimpleNamespace(judged={"protect0": 3}))
    stack = IMAGES[None]
    ((name, (weights, own)),) = protocols._judged(run, stack, arrays).items()
    np.testing.assert_array_equal(weights, stack)
    assert (name, list(own)) == ("protect0", [3, 3])


def test_each_member_is_judged_by_its_own_loss():
    """The paper's protocol on a stack: normalised images, pixels for the network."""
    config = {
        "defense": {"name": "cse", "protect": "each", "cost": 3.0},
        "model": {"mean": [0.5], "std": [0.25]},
    }
    stack = {"stacked": {"members": 2, "prefix": "protect"}}
    model, labels = Linear(2), LABELS % 2
    defense = defenses.make("cse", model, BALL, protect="each", layers={}, transforms=stack)
    params, carry = defense.init(KEY, IMAGES[:1])
    pixels = np.round(IMAGES * 255).astype(np.uint8)
    held = types.SimpleNamespace(images=pixels, labels=labels, ids=np.arange(8), num_classes=2)
    held.take = lambda rows: held
    run = types.SimpleNamespace(
        config=config,
        seed=0,
        module=model,
        defense=defense,
        arrays=lambda split: held,
        apply=lambda name: lambda v, x: defense.predictors[name](v["params"], v["carry"])(x),
    )
    chosen = cost_sensitive.own_losses(run)
    logits = jax.random.normal(KEY, (8, 2))
    expected = losses.cross_entropy(logits, labels) + losses.expected_cost(
        logits, labels, losses.cost_matrix(2, 1, 3.0)
    )
    np.testing.assert_allclose(chosen["protect1"](logits, labels), expected, rtol=1e-6)
    variables = {"params": params, "carry": carry}
    judged = cost_sensitive.judge(run, variables, eps=0.3, pgd=False)
    predict = defense.predictors["protect1"](params, carry)
    right = np.asarray(predict(pixels / np.float32(255)).argmax(-1) == labels)
    assert judged["protect1"]["clean"]["accuracy"] == 100 * right.mean()
    assert list(judged["protect1"]) == ["clean", "normalised fgsm", "normalised deepfool3"]
