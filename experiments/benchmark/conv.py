"""Gradients of convolutions inside a loop: autodiff's form against `jaxdefense.conv`.

Two minutes on two cores. On a GPU or TPU the same rows say whether the explicit form is worth
switching on there (`explicit_gradients(True)`).
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxdefense import models

# batch, image side, in, out, stride, kernel, padding: ResNet-18's and the small MNIST net's.
SHAPES = (
    (16, 32, 3, 64, 1, 3, 1),
    (16, 32, 64, 64, 1, 3, 1),
    (64, 32, 64, 64, 1, 3, 1),
    (64, 32, 3, 8, 1, 3, 1),
    (16, 8, 256, 256, 1, 3, 1),
    (16, 32, 64, 128, 2, 3, 1),
    (16, 8, 256, 512, 2, 3, 1),
    (16, 32, 64, 128, 2, 1, 0),
    (250, 28, 1, 16, 2, 4, 1),
    (250, 14, 16, 32, 2, 4, 1),
)


def milliseconds(step: Callable, first: jax.Array, *rest: jax.Array, budget: float = 1.0) -> float:
    """The least time of one `step(first, *rest)` inside a `fori_loop`, in ms.

    Each turn's input depends on the last turn's whole output, so that nothing is hoisted or
    dropped. Runs twice at least, then for up to `budget` seconds.
    """

    @jax.jit
    def loop(turns: jax.Array, first: jax.Array, *rest: jax.Array) -> jax.Array:
        out = jax.eval_shape(step, first, *rest)
        start = jnp.zeros(out.shape, out.dtype)
        return lax.fori_loop(
            0, turns, lambda _, y: step(first + 1e-30 * y.ravel()[0], *rest), start
        )

    run = loop.lower(jnp.int32(1), first, *rest).compile()
    best, begun, turns = float("inf"), time.perf_counter(), 1
    for repeat in range(20):
        start = time.perf_counter()
        run(jnp.int32(turns), first, *rest).block_until_ready()
        took = time.perf_counter() - start
        best = min(best, took / turns)
        if repeat > 0 and time.perf_counter() - begun > budget:
            break
        turns = 5 if best < budget / 20 else 1
    return best * 1e3


def compared(case: str, build: Callable[[], Callable], *args: jax.Array) -> dict:
    """One row: `build()` traced with autodiff's gradients and with explicit ones."""
    row: dict = {"case": case}
    for name, on in (("autodiff_ms", False), ("explicit_ms", True)):
        with models.explicit_gradients(on):
            row[name] = milliseconds(build(), *args)
    row["ratio"] = row["autodiff_ms"] / row["explicit_ms"]
    return row


def convolution_rows() -> list[dict]:
    """Both gradients of each convolution in `SHAPES`."""
    rows = []
    for b, side, c, k, stride, window, pad in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (b, side, side, c))
        w = jax.random.normal(keys[1], (window, window, c, k))
        apply = partial(
            models.conv,
            window_strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        dy = jax.random.normal(keys[2], jax.eval_shape(apply, x, w).shape)
        name = f"{b}x{side}x{side}x{c} -> {k}, {window}x{window}, stride {stride}"
        for i, operand in enumerate(("image", "weight")):
            build = partial(gradient, apply, i)
            rows.append(compared(f"{name}: {operand} gradient", build, dy, x, w))
    return rows


def gradient(apply: Callable, i: int) -> Callable:
    """(dy, x, w) -> the cotangent of operand i of apply(x, w)."""
    return lambda dy, x, w: jax.vjp(apply, x, w)[1](dy)[i]


def network_rows(batch: int = 1000) -> list[dict]:
    """The small MNIST network: one forward pass, one attack step, one gradient of its weights."""
    model = models.make("cnn", 10)
    x = jax.random.uniform(jax.random.key(0), (batch, 28, 28, 1))
    y = jax.random.randint(jax.random.key(1), (batch,), 0, 10)
    params = model.init(jax.random.key(2), x)

    def loss(params: dict, x: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(model.apply(params, x))
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).sum()

    def forward() -> Callable:
        return lambda x: model.apply(params, x)

    def attack() -> Callable:
        return lambda x: jnp.clip(x + 0.01 * jnp.sign(jax.grad(loss, 1)(params, x)), 0, 1)

    def train() -> Callable:
        def flat(x: jax.Array) -> jax.Array:
            return jnp.concatenate([g.ravel() for g in jax.tree.leaves(jax.grad(loss)(params, x))])

        return flat

    cases = {"forward": forward, "attack step": attack, "weight gradient": train}
    return [compared(f"MNIST CNN, {batch} images: {name}", f, x) for name, f in cases.items()]


def rows() -> list[dict]:
    """All rows: case, autodiff_ms, explicit_ms, ratio."""
    return convolution_rows() + network_rows()
