"""BPDA, EOT and transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import images, linear

from jaxdefense import attacks, losses, threat

KEY = jax.random.key(0)
X = images(6)
PREDICT, WEIGHTS = linear(3)
LABELS = jnp.argmax(PREDICT(X), -1)


def quantise(x):
    return jnp.round(x * 4) / 4


def test_bpda_has_forwards_values_and_the_identitys_gradient():
    g = attacks.bpda(quantise)
    np.testing.assert_array_equal(g(X), quantise(X))
    through = jax.grad(lambda x: jnp.sum(g(x) * X))(X)
    np.testing.assert_array_equal(through, X)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(quantise(x) * X))(X), 0)


def test_bpda_takes_a_surrogates_gradient():
    g = attacks.bpda(quantise, jnp.sin)
    through = jax.jit(jax.grad(lambda x: jnp.sum(g(x) * X)))(X)
    np.testing.assert_allclose(through, jnp.cos(X) * X, rtol=1e-6)


def test_bpda_refuses_another_shape():
    with pytest.raises(ValueError, match="same shapes"):
        jax.grad(lambda x: jnp.sum(attacks.bpda(quantise, lambda x: x[:1])(x)))(X)


def test_bpda_breaks_a_quantising_defence():
    ball = threat.Linf(0.3)
    attack = attacks.pgd(ball, steps=20, best=True)

    def accuracy(inside):
        x_adv = jax.jit(lambda: attack(lambda x: PREDICT(inside(x)), KEY, X, LABELS))()
        return float((jnp.argmax(PREDICT(quantise(x_adv)), -1) == LABELS).mean())

    assert accuracy(attacks.bpda(quantise)) == 0
    assert accuracy(quantise) > 0.5  # its gradient is zero everywhere


def noisy(key, x):
    return PREDICT(jnp.sin(x + 0.5 * jax.random.normal(key, x.shape)))


def test_eot_is_the_mean_of_logits_and_of_gradients():
    """Against draws made by hand from the keys that each image gets."""
    seen = []

    def record(key, x):
        jax.debug.callback(lambda k: seen.append(np.asarray(k)), jax.random.key_data(key))
        return noisy(key, x)

    mean = attacks.eot(record, KEY, samples=5)
    one = X[:1]
    logits, pull = jax.vjp(mean, one)
    jax.effects_barrier()
    keys = [
        jax.random.wrap_key_data(np.array(k, np.uint32))
        for k in {tuple(k.ravel().tolist()) for k in seen}
    ]
    assert len(keys) == 5
    weight = jnp.array([[1.0, -2.0, 0.5]])
    by_hand = [jax.vjp(lambda x, k=k: noisy(k, x), one) for k in keys]
    np.testing.assert_allclose(logits, sum(z for z, _ in by_hand) / 5, rtol=1e-4)
    expected = sum(p(weight)[0] for _, p in by_hand) / 5
    np.testing.assert_allclose(pull(weight)[0], expected, rtol=1e-4, atol=1e-5)


def test_eot_is_pure_draws_anew_for_new_images_and_ignores_the_batch():
    mean = jax.jit(attacks.eot(noisy, KEY, samples=3))
    np.testing.assert_array_equal(mean(X), mean(X))
    np.testing.assert_allclose(mean(X)[2:4], mean(X[::-1])[2:4][::-1], rtol=1e-5)
    flat = jax.jit(
        attacks.eot(lambda k, x: x[:, 0, 0] + jax.random.uniform(k, (1, 1)), KEY, samples=1)
    )
    noise = flat(X) - X[:, 0, 0]
    assert len(np.unique(np.round(np.asarray(noise), 4))) == noise.size
    nearly = X.at[:, 0, 0].add(2e-7)
    assert float(jnp.abs(flat(nearly) - flat(X)).min()) > 1e-4


def test_more_samples_come_nearer_to_the_expectation():
    truth = np.mean(jax.jit(jax.vmap(noisy, (0, None)))(jax.random.split(KEY, 4000), X), 0)
    error = [
        float(np.abs(jax.jit(attacks.eot(noisy, KEY, samples=n))(X) - truth).mean())
        for n in (1, 64)
    ]
    assert error[1] < error[0] / 4


def test_transfer_takes_the_worst_source_per_example():
    other, _ = linear(3, seed=9)
    attack = attacks.apgd(threat.Linf(0.3), steps=10, early_stop=False)
    both = attacks.transfer(attack, [other, PREDICT])

    def blind(x):
        return jax.lax.stop_gradient(PREDICT(x))

    x_adv = both(blind, KEY, X, LABELS)
    margin = np.asarray(losses.margin(PREDICT(x_adv), LABELS))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(6))
    singles = [
        losses.margin(
            PREDICT(attack(source, jax.vmap(jax.random.fold_in, (0, None))(keys, n), X, LABELS)),
            LABELS,
        )
        for n, source in enumerate((other, PREDICT))
    ]
    np.testing.assert_allclose(margin, np.maximum(*map(np.asarray, singles)), rtol=1e-5)
    assert np.all(margin > 0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="samples"):
        attacks.eot(noisy, KEY, samples=0)
    with pytest.raises(ValueError, match="source"):
        attacks.transfer(attacks.fgsm(threat.Linf(0.1)), [])
