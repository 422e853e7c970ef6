"""Purifying defences: who moves and who stays, what each loss is, and their audit."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import configs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdefense import attacks, defenses, losses, models, threat
from jaxdefense.defenses import _purifying, base
from jaxdefense.evaluation import evaluator, protocols, records, report, tables
from jaxdefense.runs.run import build
from jaxdefense.train import train
from jaxdefense.train.step import State, make_step

pytestmark = pytest.mark.usefixtures("autodiff_convolutions")

KEY = jax.random.key(0)
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (6, 8, 8, 1)))
LABELS = np.arange(6, dtype=np.int32) % 4
BATCH = {"image": IMAGES, "label": LABELS, "id": jnp.arange(6)}
BALL = threat.Linf(0.1)
SMALL = {"generator_options": {"width": 2, "depth": 1}, "steps": 2}


def cnn():
    return models.make("cnn", 4, width=0.25)


@functools.cache
def normed():
    return models.make("mnist_net", 4, width=2, bn=True)


def ipg(model=None, **options):
    return defenses.make("ipg", model or cnn(), BALL, **{**SMALL, **options})


@functools.cache
def started(name, **options):
    """(defence, params, carry): the first weights, G's last layer moved off zero."""
    made = {"ipg": ipg, "ape_gan": ape_gan}[name](**options)
    params, carry = made.init(KEY, IMAGES[:1])
    if "out" in params["generator"]:
        out = params["generator"]["out"]
        kernel = 0.5 * jax.random.normal(KEY, out["kernel"].shape)
        generator = {**params["generator"], "out": {**out, "kernel": kernel}}
        params = {**params, "generator": generator}
    return made, params, carry


def ape_gan(**options):
    small = {"generator_options": {"width": 0.05}, "generator_updates": 1}
    return defenses.make("ape_gan", cnn(), BALL, **{**small, **options})


def on_axis(function, *args):
    mapped = jax.vmap(lambda _, a: function(*a), in_axes=(0, None), axis_name=base.AXIS)
    return jax.tree.map(lambda leaf: leaf[0], jax.jit(mapped)(jnp.zeros(1), args))


def stepped(defense, phase, params, carry, rate=0.1):
    """The state after one batch of a phase, by plain SGD."""
    roles = {role for update in phase.updates for role in update.roles}
    txs = {role: optax.sgd(rate) for role in roles}
    opt = {role: tx.init(params[role]) for role, tx in txs.items()}
    step = make_step(phase, txs, lambda key, x: {"image": x}, seed=0, per_epoch=4)
    return on_axis(step, State(jnp.int32(0), params, carry, opt), BATCH)[0]


def same(a, b):
    return jax.tree.leaves(jax.tree.map(np.array_equal, a, b))


def test_the_generator_begins_by_changing_nothing():
    defense = ipg()
    params, carry = defense.init(KEY, IMAGES[:1])
    purify = defense.purifiers["purified"].purify(params, carry)
    np.testing.assert_array_equal(purify(IMAGES), IMAGES)


@pytest.mark.parametrize("reach", [1.0, 1.5])
def test_what_is_added_stays_within_reach_and_box(reach):
    _, params, carry = started("ipg")
    big = jax.tree.map(lambda w: 100 * w, params["generator"])
    purify = ipg(reach=reach).purifiers["purified"].purify({**params, "generator": big}, carry)
    cleaned = purify(IMAGES)
    assert float(jnp.abs(cleaned - IMAGES).max()) == pytest.approx(0.1 * reach, rel=1e-3)
    assert float(cleaned.min()) >= 0
    assert float(cleaned.max()) <= 1


def test_the_classifier_is_frozen_to_the_bit_after_its_own_phase():
    defense = ipg(normed())
    params, carry = defense.init(KEY, IMAGES[:1])
    names = [phase.name for phase in defense.phases]
    assert names == ["classifier", "oblivious", "end_to_end"]
    state = stepped(defense, defense.phases[0], params, carry)
    assert not any(same(state.params["classifier"], params["classifier"]))
    assert all(same(state.params["generator"], params["generator"]))
    for phase in defense.phases[1:]:
        after = stepped(defense, phase, state.params, state.carry)
        assert all(same(after.params["classifier"], state.params["classifier"]))
        assert all(same(after.carry["classifier"], state.carry["classifier"]))
        assert not all(same(after.params["generator"], state.params["generator"]))


def test_a_trained_classifier_is_taken_as_it_is():
    net = normed()
    variables = jax.jit(net.init)(jax.random.key(7), IMAGES[:1])
    given = base.Trained(net, variables["params"], variables["batch_stats"])
    defense = ipg(classifier=given)
    params, carry = defense.init(KEY, IMAGES[:1])
    assert [phase.name for phase in defense.phases] == ["oblivious", "end_to_end"]
    assert all(same(params["classifier"], given.params))
    assert all(same(carry["classifier"], given.batch_stats))
    assert defense.pretrained == {"classifier": given}
    predict = defense.predictors["purified"](params, carry)
    np.testing.assert_allclose(predict(IMAGES), net.apply(variables, IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="trained network"):
        ipg(classifier="runs/f")
    with pytest.raises(ValueError, match="unknown phase in lengths 'classifier'"):
        ipg(classifier=given, lengths={"classifier": "2e"})


@pytest.mark.slow
def test_phases_craft_on_the_classifier_and_on_the_whole():
    """A gradient step's shares: FGSM on that phase's own target, PGD in the ball, clean."""
    defense, params, carry = started("ipg")
    crafted = {}
    for phase, target in zip(defense.phases[1:], ("classifier", "purified"), strict=True):
        craft = phase.updates[0].craft
        x_adv = crafted[target] = jax.jit(craft)(params, carry, BATCH, KEY)["adversarial"]
        predict = defense.predictors[target](params, carry)
        alone = attacks.fgsm(BALL)(predict, KEY, IMAGES[:2], LABELS[:2])
        np.testing.assert_allclose(x_adv[:2], alone, atol=1e-6)
        assert float(jnp.abs(x_adv[2:4] - IMAGES[2:4]).max()) == pytest.approx(0.1, rel=0.2)
        np.testing.assert_array_equal(x_adv[4:], IMAGES[4:])
    assert not np.array_equal(crafted["classifier"], crafted["purified"])


def test_ipg_loss_by_hand():
    weights = {"clean_weight": 2.0, "feature_weight": 3.0, "pixel_weight": 5.0}
    _, params, carry = started("ipg")
    defense = ipg(**weights)
    x_adv = jnp.clip(IMAGES + 0.1 * jnp.sign(jnp.sin(100 * IMAGES)), 0, 1)
    loss = defense.phases[1].updates[0].loss
    value = jax.jit(loss)(params, carry, {**BATCH, "adversarial": x_adv}, KEY)[0]

    purify = defense.purifiers["purified"].purify(params, carry)
    net = base.Net(cnn())

    def ask(x):
        return net.predict(params, carry, features=True)(x)

    restored, kept = purify(x_adv), purify(IMAGES)
    expected = losses.cross_entropy(ask(restored)[0], LABELS).mean()
    expected += 2 * losses.cross_entropy(ask(kept)[0], LABELS).mean()
    expected += 3 * jnp.abs(ask(restored)[1] - ask(IMAGES)[1]).mean()
    expected += 5 * jnp.abs(restored - IMAGES).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("layer", ["logits", "features", "conv2", "head"])
def test_activations_of_a_layer(layer):
    net = base.Net(cnn())
    params, carry = net.init(KEY, IMAGES[:1])
    logits, got = _purifying.activations(net, params, carry, IMAGES, layer)
    plain, features = net.predict(params, carry, features=True)(IMAGES)
    np.testing.assert_array_equal(logits, plain)
    shapes = {"logits": (6, 4), "head": (6, 4), "features": (6, 25), "conv2": (6, 2, 2, 8)}
    assert got.shape == shapes[layer]
    if layer != "conv2":
        np.testing.assert_array_equal(got, features if layer == "features" else plain)


@pytest.mark.parametrize(("name", "options"), [("ape_gan", {}), ("ipg", {"adversarial_weight": 1})])
@pytest.mark.slow
def test_the_discriminator_raises_what_the_generator_lowers(name, options):
    """Each role's own step, on BCE(D(purify(x')), 1)."""
    # Nothing else in the generator's loss, so that its step must lower this.
    only = {"pixel_weight": 0.0}
    if name == "ipg":
        only |= {"clean_weight": 0.0, "feature_weight": 0.0}
    defense = (ipg if name == "ipg" else ape_gan)(**only, **options)
    params, carry = defense.init(KEY, IMAGES[:1])
    discriminate, generate = defense.phases[1].updates
    assert discriminate.roles == ("discriminator",)
    assert generate.roles == ("generator",)
    given = jax.jit(generate.craft)(params, carry, BATCH, KEY)

    def moved(update, rate):
        """The weights after one step of one update on the given batch."""

        def loss(trained):
            return update.loss({**params, **trained}, carry, given, KEY)[0]

        trained = {role: params[role] for role in update.roles}
        grads = jax.grad(loss)(trained)
        return {**params, **jax.tree.map(lambda w, g: w - rate * g, trained, grads)}

    def doubt(params):
        """The generator's aim, as its own loss measures it."""
        loss, _ = generate.loss(params, carry, given, KEY)
        if name == "ipg":
            logits = defense.predictors["purified"](params, carry)(given["adversarial"])
            loss -= losses.cross_entropy(logits, LABELS).mean()
        return loss

    @jax.jit
    def values(params):
        after = [doubt(moved(update, 0.05)) for update in (discriminate, generate)]
        return doubt(params), *after

    before, raised, lowered = values(params)
    assert raised > before
    if name == "ape_gan":
        assert lowered < before


def test_hgd_compares_features_and_asks_for_no_label():
    defense = defenses.make("hgd", cnn(), BALL, **SMALL)
    params, carry = defense.init(KEY, IMAGES[:1])
    x_adv = jnp.clip(IMAGES + 0.1, 0, 1)
    loss = defense.phases[1].updates[0].loss
    value = jax.jit(loss)(params, carry, {**BATCH, "adversarial": x_adv}, KEY)[0]
    predict = defense.predictors["classifier"](params, carry)
    # G adds nothing yet.
    np.testing.assert_allclose(value, jnp.abs(predict(x_adv) - predict(IMAGES)).mean(), rtol=1e-5)


def test_the_detour_has_the_same_values_and_passes_clip_and_tanh():
    """All of the tanh is saturated: d = -.1, and where the image is darker the clip cuts."""
    defense, params, carry = started("ipg")
    out = {**params["generator"]["out"], "bias": jnp.full((1,), -50.0)}
    params = {**params, "generator": {**params["generator"], "out": out}}
    detour = defense.purifiers["purified"].detours["around tanh and clip"](params, carry)
    predict = defense.predictors["purified"](params, carry)

    def both(x):
        def total(function):
            return lambda x: jnp.sum(losses.cross_entropy(function(x), LABELS))

        return predict(x), detour(x), jax.grad(total(predict))(x), jax.grad(total(detour))(x)

    value, same_value, through, around = jax.jit(both)(IMAGES)
    np.testing.assert_allclose(same_value, value, rtol=1e-5)
    dark = np.asarray(IMAGES < 0.1)
    assert dark.any()
    np.testing.assert_array_equal(np.asarray(through)[dark], 0)
    assert np.all(np.asarray(around)[dark] != 0)


def test_anti_adversary_makes_the_classifier_surer():
    defense = defenses.make("anti_adversary", cnn(), BALL, steps=2, step_size=0.02)
    params, carry = defense.init(KEY, IMAGES[:1])
    params = jax.tree.map(lambda w: 3 * w, params)
    predict = defense.predictors["classifier"](params, carry)
    clean = defense.purifiers["anti_adversary"].purify(params, carry)
    guess = jnp.argmax(predict(IMAGES), -1)
    doubt = losses.cross_entropy(predict(IMAGES), guess)
    moved = jax.jit(clean)(IMAGES)
    assert jnp.all(losses.cross_entropy(predict(moved), guess) < doubt)
    assert float(jnp.abs(moved - IMAGES).max()) <= 2 * 0.02 + 1e-6
    # Its gradient is that of the classifier at the moved image: BPDA's.
    got = jax.jit(jax.grad(lambda x: jnp.sum(predict(clean(x))[:, 0])))(IMAGES)
    expected = jax.jit(jax.grad(lambda x: jnp.sum(predict(x)[:, 0])))(moved)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_bad_options():
    with pytest.raises(ValueError, match="nearest: oblivious"):
        ipg(phases=["obliviuos"])
    with pytest.raises(ValueError, match="oblivious then end_to_end"):
        ipg(phases=["end_to_end", "oblivious"])
    with pytest.raises(ValueError, match="nearest: clean"):
        ipg(attacks=["cleen"])
    with pytest.raises(ValueError, match="at least one of fgsm"):
        ipg(attacks=[])
    with pytest.raises(ValueError, match="reach must be positive"):
        ipg(reach=0.0)
    with pytest.raises(ValueError, match="pixel_weight must be finite"):
        ipg(pixel_weight=-1.0)
    with pytest.raises(ValueError, match="nearest: end_to_end"):
        ipg(lengths={"end_two_end": "3e"})
    with pytest.raises(ValueError, match="unknown generator 'unett'; nearest: unet"):
        ipg(generator="unett")
    with pytest.raises(ValueError, match=r"argument of UNet.*nearest: width"):
        ipg(generator_options={"widht": 3})
    with pytest.raises(ValueError, match="width must be larger than 0"):
        ipg(generator_options={"width": 0})
    with pytest.raises(ValueError, match="unknown layer 'conv9'; nearest: conv"):
        ipg(layer="conv9").init(KEY, IMAGES[:1])
    with pytest.raises(ValueError, match="generator_updates"):
        ape_gan(generator_updates=0)
    with pytest.raises(ValueError, match="steps must be an integer"):
        defenses.make("anti_adversary", cnn(), BALL, steps=0)


def debug_config():
    config = json.loads(configs.load("ipg", "digits_debug").to_json())
    config["model"]["width"] = 0.25
    config["defense"]["generator_options"] = {"width": 2, "depth": 1}
    config["dataset"]["limit"] = 64
    return config


@pytest.mark.slow
def test_a_trained_run_is_audited_by_the_script(tmp_path, tfds_dir):
    train(debug_config(), tmp_path, progress=False)
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, str(root / "experiments" / "evaluate.py"), "--noprogress"]
    command += [f"--workdir={tmp_path}", "--protocol=audit", "--examples=64"]
    env = {**os.environ, "TFDS_DATA_DIR": tfds_dir}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "| T0 oblivious pgd (not white-box) |" in result.stdout
    assert records.load(tmp_path / "audit-64.json")["training"]["step"] == 6
    assert "not white-box" in (tmp_path / "audit-64.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [protocols.configured, protocols.audit])
def test_a_killed_evaluation_goes_on(protocol, tmp_path, monkeypatch):
    """Killed at its second dispatch; then only the missing ones are computed."""
    config = debug_config()
    config["evaluation"] |= dict(attacks={"fgsm": {"name": "fgsm"}})
    config["evaluation"]["audit"] = dict(steps=2, restarts=1, stages=(), queries=4)
    run = build(config)
    params, carry = run.init(np.zeros((1, 8, 8, 1), np.float32))
    variables = {"params": params, "carry": carry}
    judge = functools.partial(protocol, run, variables, training={}, examples=8)
    calls, end = [], []
    dispatch = evaluator.Evaluator._dispatch

    def watched(self, key, *arguments):
        if key[0] in ("attack", "curve"):
            calls.append(key[0])
            if len(calls) in end:
                raise KeyboardInterrupt
        return dispatch(self, key, *arguments)

    monkeypatch.setattr(evaluator.Evaluator, "_dispatch", watched)
    whole, count = judge()["results"], len(calls)
    calls.clear()
    end.append(2)
    with pytest.raises(KeyboardInterrupt):
        judge(folder=tmp_path / "kept")
    calls.clear()
    end.clear()
    assert judge(folder=tmp_path / "kept")["results"] == whole
    assert len(calls) == count - 1 > 0
    other = jax.tree.map(lambda leaf: leaf + 1, variables)
    with pytest.raises(ValueError, match=r"holds another evaluation \(weights was"):
        protocol(run, other, training={}, examples=8, folder=tmp_path / "kept")


@pytest.mark.slow
def test_audit_writes_record_and_page(tmp_path):
    """Every tier, T0 labelled and left out of the worst case."""
    run, meta = build(debug_config()), {}
    params, carry = run.init(np.zeros((1, 8, 8, 1), np.float32))
    variables = {"params": params, "carry": carry}
    record = protocols.audit(run, variables, training=meta, examples=64)
    records.save(record, tmp_path / "audit.json")
    record = records.load(tmp_path / "audit.json")
    assert list(record["audit"]) == ["purified"]
    tiers = record["results"]["purified"]
    found = {name: records.unpack_bits(tier["bits"], 64) for name, tier in tiers.items()}
    assert list(found) == [
        "clean",
        "T0 oblivious pgd (not white-box)",
        "T1 pgd-10",
        "T1 pgd",
        "T1 apgd-ce",
        "T1 pgd around tanh and clip",
        "T2 bpda pgd",
        "T3 square",
        "T3 transfer from base",
        "worst",
    ]
    counted = [bits for name, bits in found.items() if name[:2] not in ("T0", "wo")]
    np.testing.assert_array_equal(found["worst"], np.all(counted, axis=0))
    examples = record["audit"]["purified"]["examples"]
    clean, moved = (records.unpack_images(examples[k]) for k in ("clean", "adversarial"))
    assert np.abs(moved - clean).max() <= run.threat.eps + 1 / 255
    page = report.audit_page(record)
    assert "not white-box" in page
    assert "purified image of class" in page
    assert record["parameters"]["purified"] > 0
    assert "worst class" in tables.tier_table(record, "purified")
    run.config["evaluation"]["audit"] = {"querries": 3}
    with pytest.raises(ValueError, match="nearest: queries"):
        protocols.audit(run, variables, training=meta, examples=64)
