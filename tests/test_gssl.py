"""GSSL: where its gradients go and where not, its BatchNorm sets, its budget, its ablations."""

import functools
import json

import configs
import jax
import jax.numpy as jnp
import numpy as np
import paired
import pytest
import scipy.special
from configs import gssl_baseline

from jaxdefense import defenses, losses, models, threat
from jaxdefense.defenses import base, gssl
from jaxdefense.runs import run
from jaxdefense.train import plan

pytestmark = pytest.mark.usefixtures("autodiff_convolutions")

KEY = jax.random.key(0)
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (8, 8, 8, 1)))
LABELS = np.arange(8, dtype=np.int32) % 4
BALL = threat.Linf(0.1)
OPTIONS = dict(eps=0.05, steps=1, generator_options=dict(width=0.125, latent=4), patch=2)


def batch(**more):
    return {"image": IMAGES, "label": LABELS, "epoch": jnp.float32(1), **more}


@functools.cache
def network():
    return models.make("mnist_net", 4, width=2, bn=True)


def build(**options):
    return defenses.make("gssl", network(), BALL, **{**OPTIONS, **options})


@functools.cache
def start():
    """(params, carry) of both roles, the same for every option that keeps the networks."""
    return build().init(KEY, IMAGES[:1])


def update(defense, stage):
    return next(phase.updates[0] for phase in defense.phases if phase.name == stage)


def on_axis(function, *args):
    """function(*args) inside the mapped axis, compiled, on one device."""
    mapped = jax.vmap(lambda _, a: function(*a), in_axes=(0, None), axis_name=base.AXIS)
    return jax.tree.map(lambda leaf: leaf[0], jax.jit(mapped)(jnp.zeros(1), args))


@functools.cache
def crafted(stage):
    """The batch of a stage of the default defence, its adversarial examples made."""
    craft = update(build(), stage).craft
    return on_axis(lambda p, c: craft(p, c, batch(), KEY), *start())


def value_and_gradient(defense, stage, given):
    """((value, carry), gradient to all roles) of a stage's loss."""
    loss = update(defense, stage).loss

    def value(params, carry):
        total, (carry, _) = loss(params, carry, given, KEY)
        return total, carry

    return on_axis(jax.value_and_grad(value, has_aux=True), *start())


@functools.cache
def screening():
    return value_and_gradient(build(), "screening", crafted("screening"))


def forward(params, carry, x, bn_set):
    """Training-mode logits and statistics of the classifier with two sets."""
    module = network().clone(bn_sets=2)
    variables = {"params": params["classifier"], "batch_stats": carry["classifier"]}
    return module.apply(variables, x, train=True, bn_set=bn_set, mutable=["batch_stats"])


def close(got, expected, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-6, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def test_examples_are_screened_and_in_their_ball():
    given = crafted("screening")
    assert 0 < BALL.distance(given["adversarial"], IMAGES).max() <= 0.05 + 1e-6
    purify = build().purifiers["screened"].purify(*start())
    close(given["screened"], jax.jit(purify)(given["adversarial"]))
    assert "screened" not in crafted("joint")  # made in the loss, where G has a gradient


def test_screening_loss_is_the_published_sum():
    (value, _), _ = screening()
    clean, seen = (
        np.asarray(jax.jit(forward, static_argnums=3)(*start(), crafted("screening")[k], s)[0])
        for s, k in enumerate(("image", "screened"))
    )
    log_p, log_q = (scipy.special.log_softmax(z.astype(np.float64), -1) for z in (clean, seen))
    rows, y = np.arange(8), np.asarray(LABELS)
    gate = np.exp(log_q[rows, y])
    kl = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    expected = -log_p[rows, y] + gate * (-0.5 * log_q[rows, y] + 0.5 * kl)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)


def test_gate_and_teacher_carry_no_gradient():
    """The gradient is that of the loss with gate and F_c(x) in the KL frozen at their values."""
    params, carry = start()
    given = crafted("screening")

    def reference(moving, frozen):
        clean, _ = forward(moving, carry, IMAGES, 0)
        seen, _ = forward(moving, carry, given["screened"], 1)
        teacher, _ = forward(frozen, carry, IMAGES, 0)
        was, _ = forward(frozen, carry, given["screened"], 1)
        gate = jax.nn.softmax(was)[jnp.arange(8), LABELS]
        lesson = losses.cross_entropy(seen, LABELS) + losses.kl(teacher, seen)
        return jnp.mean(losses.cross_entropy(clean, LABELS) + 0.5 * gate * lesson)

    frozen, leaking = jax.jit(jax.grad(reference, (0, 1)))(params, params)
    close(screening()[1]["classifier"], frozen["classifier"], rtol=1e-3, atol=1e-4)
    # What would flow through gate and teacher is not small: the test could have failed.
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(leaking["classifier"])) > 1e-3


def test_screened_loss_does_not_reach_the_generator_in_stage_three():
    _, gradient = screening()
    assert all(not np.any(g) for g in jax.tree.leaves(gradient["generator"]))
    assert update(build(), "screening").roles == ("classifier",)


def test_screened_loss_reaches_the_generator_in_the_joint_stage():
    """By finite differences along one direction of the generator's weights.

    The loss has no gate, which moves it but carries no gradient; screened terms that outweigh the
    generator's own; and the residual screen, since an untrained G(x') is the same gray for all x'
    and BatchNorm would divide by nearly nothing. The step is small: ReLU and maximum have kinks.
    """
    defense = build(screen="residual", gate=False, screened_weight=1.0, kl_weight=10.0)
    loss, given = update(defense, "joint").loss, crafted("joint")
    params, carry = start()
    direction = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape) / p.size**0.5,
        params["generator"],
    )

    def along(h):
        moved = jax.tree.map(lambda p, d: p + h * d, params["generator"], direction)
        value, (_, metrics) = loss({**params, "generator": moved}, carry, given, KEY)
        own = [metrics[name][0] / 8 for name in ("reconstruction", "restoration")]
        return value, sum(own) + 0.01 * metrics["latent"][0] / 8

    @jax.jit
    def ask(h):
        mapped = jax.vmap(lambda _: jax.value_and_grad(along, has_aux=True)(h), axis_name=base.AXIS)
        return jax.tree.map(lambda leaf: leaf[0], mapped(jnp.zeros(1)))

    h = 1e-3
    (_, _), slope = ask(0.0)
    ((up, own_up), _), ((down, own_down), _) = ask(h), ask(-h)
    total, own = (up - down) / (2 * h), (own_up - own_down) / (2 * h)
    assert abs(total - own) > 10 * abs(own)
    np.testing.assert_allclose(slope, total, rtol=0.05)


def test_two_sets_of_statistics_do_not_mix():
    """The clean pass leaves the screened statistics alone, and the other way round."""
    params, carry = start()
    (_, after), _ = screening()
    for bn_set, key in ((0, "image"), (1, "screened")):
        _, alone = jax.jit(forward, static_argnums=3)(
            params, carry, crafted("screening")[key], bn_set
        )
        for path, was in jax.tree.leaves_with_path(carry["classifier"]):
            mine = ("_set1" in jax.tree_util.keystr(path)) == bool(bn_set)
            now, lone = (
                functools.reduce(lambda tree, k: tree[k.key], path, tree)
                for tree in (after["classifier"], alone["batch_stats"])
            )
            if mine:
                assert not np.array_equal(now, was)
                np.testing.assert_allclose(now, lone, rtol=1e-5)
            else:
                np.testing.assert_array_equal(lone, was)


def test_predictors():
    params, carry = start()
    defense = build()
    assert list(defense.predictors) == ["classifier", "auxiliary", "screened"]
    purifier = defense.purifiers["screened"]
    ask = {name: p(params, carry) for name, p in defense.predictors.items()}
    clean = purifier.purify(params, carry)(IMAGES)
    close(ask["screened"](IMAGES), ask[purifier.base](clean))
    assert float(jnp.abs(ask["screened"](IMAGES) - ask["auxiliary"](IMAGES)).max()) > 1e-4
    residual = build(screen="residual").purifiers["screened"].purify(params, carry)
    close(residual(IMAGES), IMAGES - clean)
    shared = build(bn="shared")
    assert list(shared.predictors) == ["classifier", "screened"]
    assert shared.purifiers["screened"].base == "classifier"


@pytest.mark.parametrize(
    ("options", "stages", "roles"),
    [
        (dict(screen="none", stages={"screening": None, "standard": "50%"}), 2, 1),
        (dict(screen="residual", corruption="mask"), 4, 2),
        (dict(generator="mae", generator_options=dict(width=16, heads=2, patch=2)), 4, 2),
        (dict(bn="shared", gate=False, corruption="none", attacked="clean"), 4, 2),
        (dict(attacked="screened", stages={"joint": None}), 1, 2),
    ],
)  # fmt: skip
def test_ablations_trace(options, stages, roles):
    """Each ablation's stages keep the shapes of what they train and carry; nothing is compiled."""
    defense = build(**options)
    assert len(defense.phases) == stages

    def all_stages(key):
        params, carry = defense.init(key, IMAGES[:1])
        assert len(params) == roles
        for phase in defense.phases:
            (step,) = phase.updates
            given = step.craft(params, carry, batch(), key)
            value, (after, metrics) = step.loss(params, carry, given, key)
            assert value.shape == ()
            assert jax.tree.structure(after) == jax.tree.structure(carry)
            assert all(total.shape == () for total, _ in metrics.values())
        return [predictor(params, carry)(IMAGES) for predictor in defense.predictors.values()]

    mapped = jax.vmap(lambda _: all_stages(KEY), axis_name=base.AXIS)
    assert all(z.shape == (1, 8, 4) for z in jax.eval_shape(mapped, jnp.zeros(1)))


def test_stages_keep_their_order():
    """A config.json has sorted keys; the stages run in the paper's order all the same."""
    shuffled = {"joint": None, "standard": 2, "screening": "10%", "self_supervised": 1}
    phases = build(stages=shuffled).phases
    assert [(p.name, p.length) for p in phases] == [
        ("self_supervised", 1), ("standard", 2), ("screening", "10%"), ("joint", None),
    ]  # fmt: skip


@pytest.mark.slow
def test_composes_with_trades_from_a_config(tfds_dir, monkeypatch):
    """robust_loss adds exactly what that defence's own loss would be, on its own examples."""
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    robust = dict(name="trades", steps=1, step_size=0.1)
    config = json.loads(configs.load("gssl", "digits_debug").to_json())
    config["model"] = dict(name="cnn", width=0.25)
    config["defense"] |= dict(bn="shared", steps=1, robust_loss=dict(robust, weight=0.5))
    config["defense"]["generator_options"] = dict(width=0.125, latent=4)
    composed = run.build(config)
    del config["defense"]["robust_loss"]
    config_of_trades = dict(config, defense=robust)
    stages = [update(run.build(config).defense, "screening")]
    stages.append(run.build(config_of_trades).defense.phases[0].updates[0])
    stage = update(composed.defense, "screening")

    def values(key):
        params, carry = composed.defense.init(key, IMAGES[:1])
        given = stage.craft(params, carry, batch(), key)
        sum_of_both, _ = stage.loss(params, carry, given, key)
        plain, trades = stages
        alone, _ = plain.loss(params, carry, given, key)
        added, _ = trades.loss(params, carry, given["robust"], key)
        return sum_of_both, alone, added, given["robust"]["adversarial"], given["adversarial"]

    sum_of_both, alone, added, theirs, ours = on_axis(values, KEY)
    np.testing.assert_allclose(sum_of_both, alone + 0.5 * added, rtol=1e-5)
    assert float(composed.threat.distance(ours, IMAGES).max()) <= 0.05 + 1e-6
    assert float(composed.threat.distance(theirs, IMAGES).max()) > 0.09  # within the threat's eps


def test_mask_patches():
    images = jnp.ones((16, 8, 8, 3))
    masked = np.asarray(gssl.mask_patches(KEY, images, share=0.5, patch=2))
    squares = masked.reshape(16, 4, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(16, 16, -1)
    assert set(np.unique(masked)) == {0.0, 1.0}
    assert (squares.min(-1) == squares.max(-1)).all()  # whole squares
    assert (squares.sum(1) == 8).all()  # half of the 16, in every image
    assert len({tuple(row) for row in squares[..., 0].tolist()}) > 12  # each image its own
    for share, left in ((0.0, 16), (0.3, 11), (1.0, 0)):
        kept = gssl.mask_patches(KEY, images, share=share, patch=2).reshape(16, -1).sum(1) / 12
        assert kept.tolist() == [left] * 16
    with pytest.raises(ValueError, match=r"patch \(3\) must divide"):
        gssl.mask_patches(KEY, images, share=0.5, patch=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "unet"}, r"unknown generator of gssl 'unet'.*known: mae, vae"),
        ({"screen": "generate"}, "nearest: generated"),
        ({"corruption": "blur"}, "known: mask, noise, none"),
        ({"bn": "double"}, "known: dual, shared"),
        ({"attacked": "both"}, "known: clean, screened"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be 0 or more, got -1"),
        ({"mask": 1.0}, r"mask must be in \[0, 1\), got 1"),
        ({"patch": 0}, "patch must be at least 1"),
        ({"steps": -1}, "steps"),
        ({"generator_options": {"latnt": 3}}, "nearest: latent"),
        ({"stages": {"joined": None}}, "nearest: joint"),
        ({"stages": {"standard": None}}, "no stage trains the generator"),
        ({"stages": {"self_supervised": None}}, "no stage shows screened images"),
        ({"screen": "none"}, "allowed: standard, screening"),
        ({"robust_loss": {"name": "gssl"}}, "robust_loss needs a defence of one phase"),
        ({"robust_loss": {"name": "trade"}}, "nearest: trades"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_two_sets_need_a_network_that_has_them():
    for model in (models.make("cnn", 4), models.make("mnist_net", 4)):
        with pytest.raises(ValueError, match="allowed for it: bn='shared'"):
            defenses.make("gssl", model, BALL)
        assert defenses.make("gssl", model, BALL, bn="shared").phases


@pytest.mark.parametrize("row", gssl_baseline.ROWS)
def test_baseline_has_the_same_budget(row):
    """Steps and images in training mode, counted over the segments that the loop would run."""
    ours, other = (configs.load(name, row) for name in ("gssl", "gssl_baseline"))
    rows = gssl_baseline.IMAGES[row.partition("_")[0]]
    segments = plan.make(
        [base.Phase(name, (), ours.defense.stages[name]) for name in gssl.STAGES],
        ours.train.optimizer.to_dict(),
        length=ours.train.length,
        per_epoch=rows // ours.train.batch_size,
    )
    steps = {s.phase.name: s.end - s.start for s in segments}
    passes = {"self_supervised": 1, "standard": 1, "screening": 2, "joint": 2}
    images = ours.train.batch_size * sum(steps[name] * passes[name] for name in steps)
    assert other.train.length == f"{sum(steps.values())}s"
    got = other.train.batch_size * sum(steps.values())
    assert 0.999 * images <= got <= 1.03 * images  # in the baseline's favour, if at all
    assert other.model == ours.model


def test_baseline_counts_the_digits(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    config = json.loads(configs.load("gssl", "digits").to_json())
    assert len(run.build(config).arrays("train").labels) == gssl_baseline.IMAGES["digits"]


def record(name, seed, clean):
    results = {"classifier": {"clean": {"accuracy": clean}}, "other": {"clean": {"accuracy": 0.0}}}
    return {"name": name, "seed": seed, "results": results}


class TestPaired:
    """By hand: differences 1, 2, 3 have mean 2, error 1 / sqrt(3), t = 2 sqrt(3) = 3.46."""

    found = (
        *(record("a", s, 90.0 + s) for s in (1, 2, 3, 4)),
        *(record("b", s, 90.0) for s in (3, 2, 1)),
    )

    def test_table(self):
        table = paired.table(self.found, "a", "b")
        assert (
            "| clean | – | 92.00 ± 1.00 (3) | 90.00 ± 0.00 (3) | +2.000 | 0.577 | 3.46 | 0.074 |"
            in (table)
        )
        assert "3 pairs, seeds 1, 2, 3" in table

    def test_equal_differences_have_no_test(self):
        assert "| +0.000 | 0.000 | – | – |" in paired.table(self.found, "b", "b[classifier]")

    def test_predictors_and_errors(self):
        assert "| +92.000 |" in paired.table(self.found, "a", "b[other]")
        for arguments, message in (
            (("a", "c"), r"no row 'c'; known: .*b\[other\]"),
            (("a", "b", ["pgd"]), "no column 'pgd'; both have clean"),
        ):
            with pytest.raises(ValueError, match=message):
                paired.table(self.found, *arguments)
        with pytest.raises(ValueError, match="two seeds that both rows have"):
            paired.table(self.found[:5], "a", "b")
