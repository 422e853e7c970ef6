"""Linear models, for which the best attack in ball and box is known by hand (NumPy, float64)."""

import jax
import jax.numpy as jnp
import numpy as np

NORMS = ("linf", "l2", "l1")
SHAPE = (8, 8, 1)


def linear(num_classes, seed=0, size=64):
    """(predict, weights (size, K) float64): logits are the pixels times normal weights."""
    weights = jax.random.normal(jax.random.key(seed), (size, num_classes))
    return (lambda x: x.reshape(x.shape[0], -1) @ weights), np.asarray(weights, np.float64)


def even(num_classes, seed=0, size=64):
    """As `linear`, with classes that read pixels of their own through equal lists of weights.

    All boundaries then have normals of equal length in every norm, so the class with the largest
    logit is the nearest one. Methods that follow one gradient of all classes need that to be
    exact, and that class clearly ahead (`clear_images`).
    """
    block = size // num_classes
    rng = np.random.default_rng(seed)
    values = 20 * rng.uniform(0.5, 1, block) * rng.choice([-1, 1], block)
    weights = np.zeros((size, num_classes))
    for k in range(num_classes):
        weights[k * block : (k + 1) * block, k] = values
    given = jnp.asarray(weights, jnp.float32)
    return (lambda x: x.reshape(x.shape[0], -1) @ given), weights


def images(batch, seed=1, low=0.0, high=1.0):
    return jax.random.uniform(jax.random.key(seed), (batch, *SHAPE), minval=low, maxval=high)


def clear_images(batch, weights, seed=1):
    """Images of an `even` model with one rival clearly ahead of the others, away from the box."""
    signs, classes = np.sign(weights), weights.shape[1]
    noise = np.random.default_rng(seed).uniform(-0.02, 0.02, (batch, len(weights)))
    order = np.arange(batch)
    label, rival = signs[:, order % classes].T, signs[:, (order + 1) % classes].T
    return jnp.asarray(0.5 + 0.2 * label + 0.12 * rival + noise, jnp.float32).reshape(-1, *SHAPE)


def attacked(attack, predict, key, x, labels):
    """The attack as one compiled program."""
    return jax.jit(lambda k, x, y: attack(predict, k, x, y))(key, x, labels)


def largest_gain(norm, eps, direction, x):
    """max <direction, d> over the d in the ball with x + d in [0, 1]."""
    size, room = np.abs(direction), np.where(direction > 0, 1 - x, x)
    if norm == "linf":
        return np.sum(size * np.minimum(eps, room))
    if norm == "l1":
        order = np.argsort(-size)
        before = np.cumsum(room[order]) - room[order]
        return np.sum(size[order] * np.clip(eps - before, 0, room[order]))
    assert norm == "l2", norm
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        inside = np.sum(np.minimum(t * size, room) ** 2) <= eps**2
        low, high = (t, high) if inside else (low, t)
    return np.sum(size * np.minimum(low * size, room))


def distance_to_plane(norm, normal, gap, x):
    """The norm of the shortest d with <normal, d> = gap > 0 and x + d in [0, 1]; inf for none."""
    size, room = np.abs(normal), np.where(normal > 0, 1 - x, x)
    if np.sum(size * room) < gap:
        return np.inf
    if norm == "l1":
        order = np.argsort(-size)
        gains = np.cumsum((size * room)[order])
        last = np.searchsorted(gains, gap)
        before = gains[last - 1] if last else 0.0
        return np.sum(room[order][:last]) + (gap - before) / size[order][last]
    rate = {"l2": size, "linf": np.ones_like(size)}[norm]
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        short = np.sum(size * np.minimum(t * rate, room)) < gap
        low, high = (t, high) if short else (low, t)
    step = np.minimum(high * rate, room)
    return np.sqrt(np.sum(step**2)) if norm == "l2" else np.max(step)


def distances(norm, x, labels, weights):
    """(B,) distance of each image to the nearest other class; 0 where it is misclassified."""
    result = []
    for row, label in zip(np.asarray(x, np.float64).reshape(len(x), -1), np.asarray(labels)):
        to = []
        for k in range(weights.shape[1]):
            if k != label:
                normal = weights[:, k] - weights[:, label]
                gap = -normal @ row
                to.append(distance_to_plane(norm, normal, gap, row) if gap > 0 else 0.0)
        result.append(min(to))
    return np.array(result)
