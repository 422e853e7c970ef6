"""The gradient attacks: equal to Foolbox, exact on linear models, pure, compiled once."""

import eagerpy
import flax.linen as nn
import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdefense import attacks, losses, threat

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(2), (12, 6, 6, 1))
MIDDLE = 0.3 + 0.4 * IMAGES  # no pixel comes near the box
WEIGHTS = (
    0.4 * jax.random.normal(jax.random.key(0), (36, 32)),
    0.4 * jax.random.normal(jax.random.key(1), (32, 10)),
)
THREATS = {"linf": threat.Linf(0.1), "l2": threat.L2(0.5), "l1": threat.L1(3.0)}


def apply(variables, x):
    first, second = variables
    return jnp.tanh(x.reshape(x.shape[0], -1) @ first) @ second


def predict(x):
    return apply(WEIGHTS, x)


LABELS = jnp.argmax(predict(IMAGES), -1)


def _foolbox_pairs():
    def pgd(ball, **kw):
        return attacks.pgd(ball, random_start=False, **kw)

    def mi(ball, **kw):
        return attacks.mi_fgsm(ball, accumulate="direction", **kw)

    their, linf, l2 = foolbox.attacks, THREATS["linf"], THREATS["l2"]
    steps = dict(abs_stepsize=0.02, steps=10)
    wide = dict(abs_stepsize=0.1, steps=10)
    mi_fgsm = their.mi_fgsm
    return {
        "fgsm-linf": (their.LinfFastGradientAttack(), attacks.fgsm(linf)),
        "fgsm-l2": (their.L2FastGradientAttack(), attacks.fgsm(l2)),
        "bim-linf": (
            their.LinfBasicIterativeAttack(**steps),
            attacks.bim(linf, steps=10, step_size=0.02),
        ),
        "bim-l2": (
            their.L2BasicIterativeAttack(**wide),
            attacks.bim(l2, steps=10, step_size=0.1),
        ),
        "pgd-linf": (
            their.LinfPGD(random_start=False, **steps),
            pgd(linf, steps=10, step_size=0.02),
        ),
        "pgd-l2": (their.L2PGD(random_start=False, **wide), pgd(l2, steps=10, step_size=0.1)),
        "mi_fgsm-linf": (
            mi_fgsm.LinfMomentumIterativeFastGradientMethod(**steps),
            mi(linf, steps=10, step_size=0.02),
        ),
        "mi_fgsm-l2": (
            mi_fgsm.L2MomentumIterativeFastGradientMethod(**wide),
            mi(l2, steps=10, step_size=0.1),
        ),
    }


@pytest.mark.parametrize("name", list(_foolbox_pairs()))
def test_equals_foolbox(name):
    """Below 1e-6. In L2 away from the box: at it, ours is the nearest point, Foolbox's is not."""
    theirs, ours = _foolbox_pairs()[name]
    images = IMAGES if name.endswith("linf") else MIDDLE
    eps = THREATS[name.split("-")[1]].eps
    model = foolbox.JAXModel(predict, bounds=(0, 1))
    expected = theirs.run(model, eagerpy.astensor(images), eagerpy.astensor(LABELS), epsilon=eps)
    got = attacks.jitted(ours, apply)(WEIGHTS, KEY, images, LABELS)
    assert float(jnp.abs(got - expected.raw).max()) < 1e-6
    assert float(jnp.abs(got - images).max()) > 1e-2


def test_mi_fgsm_is_the_papers_sum():
    """Against NumPy: m <- m + g / ||g||_1, x <- clip(x + a sign m)."""
    x = np.asarray(IMAGES)
    x_adv, memory = x.copy(), np.zeros_like(x)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(losses.cross_entropy(predict(z), LABELS))))
    for _ in range(5):
        g = np.asarray(gradient(jnp.asarray(x_adv)))
        memory = 0.9 * memory + g / np.abs(g).sum((1, 2, 3), keepdims=True)
        x_adv = np.clip(np.clip(x_adv + 0.02 * np.sign(memory), x - 0.1, x + 0.1), 0, 1)
    attack = attacks.mi_fgsm(THREATS["linf"], steps=5, step_size=0.02, decay=0.9)
    np.testing.assert_allclose(attack(predict, KEY, IMAGES, LABELS), x_adv, atol=1e-6)


@pytest.mark.parametrize("norm", sorted(THREATS))
@pytest.mark.parametrize("targeted", [False, True])
def test_reaches_the_exact_maximum_of_a_linear_margin(norm, targeted):
    """On two linear classes the margin's maximum over ball and box is a linear programme."""
    w = np.asarray(jax.random.normal(jax.random.key(5), (36,)))

    def linear(x):
        z = x.reshape(x.shape[0], -1) @ jnp.asarray(w)
        return jnp.stack([z, -z], -1)

    labels = jnp.ones(len(IMAGES), jnp.int32) if targeted else jnp.zeros(len(IMAGES), jnp.int32)
    attack = attacks.pgd(
        THREATS[norm],
        steps=30,
        loss="margin",
        random_start=False,
        best=True,
        step_size=THREATS[norm].eps,
        targeted=targeted,
    )
    x_adv = attack(linear, KEY, IMAGES, labels)
    x = np.asarray(IMAGES, np.float64).reshape(12, -1)
    room = np.where(-w > 0, 1 - x, x)  # either way class 1's logit rises
    for i in range(12):
        reached = float(jnp.sum((x_adv - IMAGES)[i].reshape(-1) * -w))
        assert reached == pytest.approx(_best_linear(norm, np.abs(w), room[i]), rel=1e-3)


def _best_linear(norm, size, room):
    """max <size, d> over 0 <= d <= room in the norm's ball, by hand."""
    eps = THREATS[norm].eps
    if norm == "linf":
        return np.sum(size * np.minimum(eps, room))
    if norm == "l1":
        total, left = 0.0, eps
        for i in np.argsort(-size):
            step = min(left, room[i])
            total, left = total + size[i] * step, left - step
        return total
    low, high = 0.0, 1e6  # d = min(t size, room): grow t until the ball is reached
    for _ in range(200):
        middle = (low + high) / 2
        inside = np.linalg.norm(np.minimum(middle * size, room)) <= eps
        low, high = (middle, high) if inside else (low, middle)
    return np.sum(size * np.minimum(low * size, room))


@pytest.mark.parametrize("batch", [4, 3])
def test_devices_share_a_batch_that_they_divide(batch):
    images, labels = IMAGES[:batch], LABELS[:batch]
    attack = attacks.pgd(THREATS["linf"], steps=3)
    x_adv = attacks.jitted(attack, apply, devices=jax.local_devices()[:2])(
        WEIGHTS, KEY, images, labels
    )
    assert len(x_adv.sharding.device_set) == (2 if batch == 4 else 1)
    want = attacks.jitted(attack, apply)(WEIGHTS, KEY, images, labels)
    np.testing.assert_allclose(x_adv, want, atol=1e-6)


@pytest.mark.parametrize("norm", sorted(THREATS))
@pytest.mark.parametrize("name", attacks.names())
def test_contract(name, norm):
    """Every attack: inside the set, pure, equal under jit, and independent of the batch."""
    ball = THREATS[norm]
    try:
        attack = attacks.make(name, ball)
    except ValueError as error:
        assert "norm" in str(error)  # the attack says which norms it knows  # noqa: PT017
        return
    keys = jax.random.split(KEY, len(IMAGES))
    fast = attacks.jitted(attack, apply)
    x_adv = fast(WEIGHTS, keys, IMAGES, LABELS)
    assert x_adv.shape == IMAGES.shape
    assert x_adv.dtype == IMAGES.dtype
    assert np.all(np.isfinite(x_adv))
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if not getattr(attack, "minimal", False):
        assert np.all(np.asarray(ball.distance(x_adv, IMAGES)) <= ball.eps * (1 + 1e-5))
    np.testing.assert_array_equal(fast(WEIGHTS, keys, IMAGES, LABELS), x_adv)
    some = fast(WEIGHTS, keys[4:7], IMAGES[4:7], LABELS[4:7])
    np.testing.assert_allclose(some, x_adv[4:7], atol=1e-5)


def test_restarts_never_lower_the_loss():
    def loss(restarts):
        attack = attacks.pgd(THREATS["linf"], steps=4, step_size=0.08, restarts=restarts)
        return losses.cross_entropy(predict(attack(predict, KEY, IMAGES, LABELS)), LABELS)

    assert np.all(np.asarray(loss(4) >= loss(1) - 1e-6))
    assert np.any(np.asarray(loss(4) > loss(1) + 1e-3))


def test_best_iterate_of_an_objective_that_the_last_step_leaves():
    """Steps of .15 past a top at x + .1: the first ends nearer to it than the second."""

    def value(x):
        return -jnp.sum(jnp.square(x - (MIDDLE + 0.1)), (1, 2, 3))

    def run(best):
        return attacks.maximize(
            value,
            MIDDLE,
            threat.Linf(0.5),
            KEY,
            steps=2,
            step_size=0.15,
            random_start=False,
            best=best,
        )

    np.testing.assert_allclose(run(False), MIDDLE, atol=1e-6)
    np.testing.assert_allclose(run(True), MIDDLE + 0.15, atol=1e-6)


def test_targeted_attacks_move_towards_the_target():
    targets = (LABELS + 3) % 10
    attack = attacks.pgd(THREATS["linf"], steps=10, targeted=True)
    before = losses.cross_entropy(predict(IMAGES), targets)
    after = losses.cross_entropy(predict(attack(predict, KEY, IMAGES, targets)), targets)
    assert np.all(np.asarray(after < before))


def test_maximize_takes_any_objective_and_start():
    clean = predict(IMAGES)
    start = IMAGES + 1e-3
    x_adv = attacks.maximize(
        lambda z: losses.kl(clean, predict(z)),
        IMAGES,
        THREATS["l2"],
        KEY,
        steps=5,
        step_size=0.2,
        start=start,
    )
    assert np.all(np.asarray(losses.kl(clean, predict(x_adv))) > 1e-2)
    stay = attacks.maximize(
        lambda z: losses.kl(clean, predict(z)),
        IMAGES,
        THREATS["l2"],
        KEY,
        steps=0,
        step_size=0.2,
        start=start,
    )
    np.testing.assert_allclose(stay, jnp.clip(start, 0, 1), atol=1e-7)


def test_attacks_take_no_gradient_and_give_none():
    attack = attacks.pgd(THREATS["linf"], steps=2)
    grad = jax.grad(lambda x: jnp.sum(attack(predict, KEY, x, LABELS)))(IMAGES)
    assert np.all(np.asarray(grad) == 0)


def test_compiles_once_for_all_batches_and_weights():
    traces = []

    def counted(variables, x):
        traces.append(x.shape)
        return apply(variables, x)

    fast = attacks.jitted(attacks.pgd(THREATS["linf"], steps=3), counted)
    fast(WEIGHTS, KEY, IMAGES, LABELS)
    first = len(traces)
    for i in range(3):
        weights = jax.tree.map(lambda w, i=i: w * (1.0 + 0.1 * i), WEIGHTS)
        fast(weights, jax.random.key(i), IMAGES * 0.9, (LABELS + i) % 10)
    assert len(traces) == first


def test_half_precision_and_float64_networks():
    attack = attacks.pgd(THREATS["linf"], steps=5)
    half = attack(lambda x: predict(x.astype(jnp.bfloat16)), KEY, IMAGES, LABELS)
    assert half.dtype == IMAGES.dtype
    assert float(jnp.abs(half - IMAGES).max()) <= 0.1 + 1e-6
    with jax.enable_x64(True):
        images = jnp.asarray(np.asarray(IMAGES, np.float64))
        wide = attack(predict, KEY, images, LABELS)
        assert wide.dtype == jnp.float64


class TestBadInput:
    """Each raises a ValueError that names the value, before anything is compiled."""

    attack = staticmethod(attacks.pgd(THREATS["linf"], steps=2))

    def _raises(self, match, *, images=IMAGES, labels=LABELS, key=KEY, function=predict):
        with pytest.raises(ValueError, match=match):
            self.attack(function, key, images, labels)

    def test_images_out_of_range(self):
        self._raises("must lie in", images=IMAGES * 255)

    def test_integer_images(self):
        self._raises("divide uint8 by 255", images=(IMAGES * 255).astype(jnp.uint8))

    def test_nan_images(self):
        self._raises("NaN", images=IMAGES.at[0, 0, 0, 0].set(jnp.nan))

    def test_labels_out_of_range(self):
        self._raises(r"\[0, 10\)", labels=LABELS + 10)

    def test_float_labels(self):
        self._raises("integers", labels=LABELS.astype(jnp.float32))

    def test_label_shape(self):
        self._raises("integers", labels=LABELS[:-1])

    def test_untyped_key(self):
        self._raises("typed key", key=jax.random.PRNGKey(0))

    def test_number_of_keys(self):
        self._raises("one per example", key=jax.random.split(KEY, 3))

    def test_output_shape(self):
        self._raises("logits", function=lambda x: predict(x)[:, 0])

    def test_eps_of_another_batch(self):
        attack = attacks.fgsm(threat.Linf(jnp.asarray([0.1, 0.2])))
        with pytest.raises(ValueError, match="2 entries for 12 images"):
            attack(predict, KEY, IMAGES, LABELS)

    def test_eps_of_the_wrong_scale(self):
        attack = attacks.pgd(threat.L2(128.0))
        with pytest.raises(ValueError, match="128/255"):
            attack(predict, KEY, IMAGES, LABELS)

    def test_probabilities(self):
        fast = attacks.jitted(self.attack, lambda v, x: jax.nn.softmax(apply(v, x)))
        with pytest.raises(ValueError, match="probabilities"):
            fast(WEIGHTS, KEY, IMAGES, LABELS)

    def test_another_models_arguments(self):
        net = nn.Dense(3)
        with pytest.raises(ValueError, match="Flax module: give its apply"):
            attacks.jitted(self.attack, net)
        with pytest.raises(ValueError, match=r"apply takes \(images\).* lambda _, images: f"):
            attacks.jitted(self.attack, lambda x: x)
        with pytest.raises(ValueError, match="key is where the variables belong"):
            attacks.jitted(self.attack, apply)(KEY, WEIGHTS, IMAGES, LABELS)

    @pytest.mark.parametrize(
        "make", [lambda **o: attacks.pgd(threat.Linf(0.1), **o), attacks.pgd(threat.L2(1)).replace]
    )
    def test_unknown_options_name_the_nearest(self, make):
        with pytest.raises(TypeError, match="attack pgd 'step'; nearest: steps"):
            make(step=10)

    def test_options_without_their_name(self):
        with pytest.raises(TypeError, match=r"attack pgd: too many positional.*by name: .*steps"):
            attacks.pgd(threat.Linf(0.1), 10)

    def test_nan_logits(self):
        fast = attacks.jitted(self.attack, lambda v, x: apply(v, x) * jnp.nan)
        with pytest.raises(ValueError, match="NaN"):
            fast(WEIGHTS, KEY, IMAGES, LABELS)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": 0}, "steps must be an integer"),
            ({"steps": 2.5}, "steps must be an integer"),
            ({"restarts": 0}, "restarts"),
            ({"step_size": -1.0}, "step_size"),
            ({"step_size": float("nan")}, "step_size"),
            ({"loss": "cross_entrop"}, "nearest: cross_entropy"),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            attacks.pgd(THREATS["linf"], **options)

    def test_names(self):
        with pytest.raises(ValueError, match="nearest: pgd"):
            attacks.make("pdg", THREATS["linf"])
        with pytest.raises(ValueError, match="nearest: step_size"):
            attacks.make("pgd", THREATS["linf"], stepsize=0.1)
        with pytest.raises(ValueError, match="nearest: gradient"):
            attacks.mi_fgsm(THREATS["linf"], accumulate="gradients")
