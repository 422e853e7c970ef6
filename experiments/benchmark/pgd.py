"""PGD's time here and in other libraries, on networks with random weights."""

import contextlib
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmark import peers
from jaxdefense import attacks, models, threat

# Network, batch size, steps.
CASES = (("cnn", 1, 40), ("cnn", 16, 40), ("cnn", 500, 40), ("resnet", 64, 10))


def timed_pairs(ours, theirs, repeats):
    """Medians of both in milliseconds and of the ratio theirs / ours, run in turn."""
    times = []
    for i in range(repeats + 1):
        pair = []
        for function in (ours, theirs):
            begin = time.perf_counter()
            function()
            pair.append(time.perf_counter() - begin)
        if i:  # the first is the warm-up
            times.append(pair)
    ratios = [b / a for a, b in times]
    ours_s, theirs_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {"ours_ms": 1e3 * ours_s, "peer_ms": 1e3 * theirs_s, "ratio": statistics.median(ratios)}


def _problem(name, batch):
    """A network with its weights, and a batch for it, as NumPy."""
    shape = (28, 28, 1) if name == "cnn" else (32, 32, 3)
    net = models.make(name, 10)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(batch, *shape)).astype(np.float32)
    labels = rng.integers(0, 10, batch)
    variables = jax.jit(net.init)(jax.random.key(0), jnp.asarray(images[:1]))
    return net, variables, images, labels


def _jax_attack(net, variables, attack, images, labels):
    fast = attacks.jitted(attack, net.apply, devices=jax.local_devices())
    x, y, key = jnp.asarray(images), jnp.asarray(labels), jax.random.key(0)
    return lambda: jax.block_until_ready(fast(variables, key, x, y))


@contextlib.contextmanager
def _foolbox_pgd(net, variables, images, labels, eps, steps, step_size):
    import foolbox

    model = foolbox.JAXModel(lambda x: net.apply(variables, x), bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps)
    x, y = jnp.asarray(images), jnp.asarray(labels)
    yield lambda: jax.block_until_ready(attack.run(model, x, y, epsilon=eps))


def rows(repeats):
    """A row per case and peer, timed `repeats` times; one that says so where a peer is missing."""
    for name, batch, steps in CASES:
        net, variables, images, labels = _problem(name, batch)
        eps, step_size = (0.3, 0.01) if name == "cnn" else (8 / 255, 2 / 255)
        attack = attacks.pgd(threat.Linf(eps), steps=steps, step_size=step_size)
        ours = _jax_attack(net, variables, attack, images, labels)
        options = dict(eps=eps, steps=steps, step_size=step_size)
        given = {"name": name, "images": images, "labels": labels, **options}
        found = {"torchattacks": lambda v=variables, g=given: peers.pgd_in_torch(v, **g)}
        if name == "cnn":
            found["foolbox"] = lambda n=net, v=variables, x=images, y=labels, o=options: (
                _foolbox_pgd(n, v, x, y, **o)
            )
        for peer, build in found.items():
            what = f"PGD-{steps}, {name}, batch {batch}"
            if not importlib.util.find_spec(peer):
                yield {"what": what, "peer": f"{peer} (not installed)"}
                continue
            with build() as theirs:
                row = timed_pairs(ours, theirs, repeats)
            yield {"what": what, "peer": peer, **row}
