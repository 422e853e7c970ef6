"""Adversarial training's time on all of the CPU's cores as devices, against one of them."""

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np

from benchmark.pgd import timed_pairs
from jaxdefense import data, defenses, models, threat
from jaxdefense.defenses.base import AXIS
from jaxdefense.train import optim
from jaxdefense.train.step import State, compile_steps, make_step, metric_shapes, zero_sums

# Network, its options, batch size, steps of the attack, steps in one dispatch.
CASES = (
    ("cnn", {}, 128, 7, 20),
    ("resnet", {"width": 8}, 64, 10, 2),
    ("resnet", {"width": 16}, 64, 10, 1),
)


def trainer(name, options, batch, attack_steps, count, devices):
    """A function that takes `count` training steps on these devices and waits for their end."""
    shape = (28, 28, 1) if name == "cnn" else (32, 32, 3)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4 * batch, *shape), np.uint8)
    arrays = data.from_arrays(images, np.arange(len(images)) % 10, num_classes=10)[0]
    ball = threat.Linf(0.3 if name == "cnn" else 8 / 255)
    defense = defenses.make("pgd_at", models.make(name, 10, **options), ball, steps=attack_steps)
    batches = data.OnDevice(arrays, batch_size=batch, seed=0, devices=devices)
    tx = optim.make({"name": "sgd", "lr": 0.01, "momentum": 0.9}, total=100, per_epoch=4)
    step = make_step(
        defense.phases[0], {"classifier": tx}, lambda _, x: {"image": x}, seed=0, per_epoch=4
    )
    steps = compile_steps(step, batches.gather, devices=devices)
    params, carry = defense.init(jax.random.key(0), data.to_float(images[:1]))
    first = State(jnp.int32(0), params, carry, {"classifier": tx.init(params["classifier"])})
    items = batches.chunk(0, count)

    def replicated():
        return flax.jax_utils.replicate(first, devices, axis_name=AXIS)

    state = replicated()
    shapes = metric_shapes(step, batches.gather, state, batches.resident, items)
    sums = zero_sums(shapes, state.step)

    def run():
        state = replicated()  # which the steps take for their result
        jax.block_until_ready(steps(state, batches.resident, items, jnp.int32(count), sums))

    return run


def rows(repeats):
    """A row per case, timed `repeats` times; one that says so where there is one device alone."""
    devices = jax.local_devices()
    for name, options, batch, attack_steps, count in CASES:
        width = f" of width {options['width']}" if "width" in options else ""
        what = f"{count} steps of PGD-{attack_steps} training, {name}{width}, batch {batch}"
        if len(devices) == 1 or batch % len(devices):
            yield {"what": what, "peer": f"one of {len(devices)} devices (not compared)"}
            continue
        ours, theirs = (
            trainer(name, options, batch, attack_steps, count, chosen)
            for chosen in (devices, devices[:1])
        )
        yield {"what": what, "peer": "one device", **timed_pairs(ours, theirs, repeats)}
