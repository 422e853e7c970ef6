"""AutoAttack's stages here and in torch, on identical weights: robust counts side by side.

    python experiments/compare_torch.py --reference /path/to/auto-attack --examples 200

Trains the small CNN adversarially on MNIST (PGD-10, L_inf; a few minutes, kept in --weights), gives
the weights to torch, and runs every stage of standard AutoAttack alone (no cascade) on the same
correctly classified test images. Prints, per norm and stage, how many stay robust in each, on how
many examples the two disagree, and the seconds. `both` counts those robust to every stage.

Development only; the library never imports torch. --reference is a checkout of
github.com/fra31/auto-attack; without one torchattacks is the peer (no L1).
"""

import argparse
import pathlib
import sys
import time
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch_peers

from jaxdefense import attacks, losses, models, threat
from jaxdefense.attacks import ensemble

NET = models.make("cnn", 10)


def load_mnist(folder, split):
    """Floats (n, 28, 28, 1) in [0, 1] and labels, from the packed data's `load.py`."""
    sys.path.insert(0, str(folder))
    from load import load

    images, labels = load("mnist", split)
    return (images[..., None] / 255).astype(np.float32), labels.astype(np.int32)


def train(images, labels, *, eps, epochs, batch=128, seed=0):
    """Adversarial training by PGD-10 in L_inf, eps ramped up over the first half."""
    steps = len(images) // batch
    variables = NET.init(jax.random.key(seed), jnp.asarray(images[:1]))
    tx = optax.adam(optax.cosine_onecycle_schedule(epochs * steps, 2e-3))

    @jax.jit
    def step(variables, state, key, x, y, share):
        ball = threat.Linf(eps * share)
        attack = attacks.pgd(ball, steps=10)
        x_adv = attack(lambda z: NET.apply(variables, z), key, x, y)

        def loss(variables):
            return losses.cross_entropy(NET.apply(variables, x_adv), y).mean()

        updates, state = tx.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    state, n, rng = tx.init(variables), 0, np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for rows in order[: steps * batch].reshape(steps, batch):
            share = min(1.0, 2 * n / (epochs * steps))
            key = jax.random.fold_in(jax.random.key(seed), n)
            variables, state = step(variables, state, key, images[rows], labels[rows], share)
            n += 1
    return variables


def weights(path, folder, epochs):
    """The trained variables, from `path` if it exists."""
    images, labels = load_mnist(folder, "train")
    template = NET.init(jax.random.key(0), jnp.asarray(images[:1]))
    if not path.exists():
        variables = train(images, labels, eps=0.3, epochs=epochs)
        path.write_bytes(flax.serialization.to_bytes(variables))
    return flax.serialization.from_bytes(template, path.read_bytes())


def reference_stages(module, norm, eps, folder):
    """{stage: images, labels -> images} of the authors' code, as standard AutoAttack sets it."""
    sys.path.insert(0, str(folder))
    from autoattack import AutoAttack

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    peer = AutoAttack(module, norm=name, eps=eps, version="standard", device="cpu", verbose=False)
    peer.apgd.loss, peer.fab.targeted = "ce", True
    for part in (peer.apgd, peer.apgd_targeted, peer.fab, peer.square):
        part.seed = 0
    return {
        "apgd-ce": peer.apgd.perturb,
        "apgd-t": peer.apgd_targeted.perturb,
        "fab-t": peer.fab.perturb,
        "square": peer.square.perturb,
    }


def torchattacks_stages(module, norm, eps):
    """As `reference_stages`, by torchattacks; no L1."""
    import torchattacks as ta

    if norm == "l1":
        return {}
    kw = dict(norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
    return {
        "apgd-ce": ta.APGD(module, steps=100, loss="ce", n_restarts=1, **kw),
        "apgd-t": ta.APGDT(module, steps=100, n_classes=10, n_restarts=1, **kw),
        "fab-t": ta.FAB(module, steps=100, multi_targeted=True, n_classes=10, n_restarts=1, **kw),
        "square": ta.Square(module, n_queries=5000, n_restarts=1, **kw),
    }


def ours(variables, norm, eps, x, y, only):
    """{stage: (robust (n,) bool, seconds to compile, seconds to run)}."""
    result = {}
    for name, attack in ensemble.stages(threat.make(norm, eps), "standard", 10):
        if name not in only:
            continue
        run = jax.jit(lambda v, k, x, y, a=attack: a(lambda z: NET.apply(v, z), k, x, y))
        began = time.monotonic()
        compiled = run.lower(variables, jax.random.key(0), x, y).compile()
        between = time.monotonic()
        x_adv = compiled(variables, jax.random.key(0), x, y).block_until_ready()
        seconds = time.monotonic() - between
        right = np.asarray(jnp.argmax(NET.apply(variables, x_adv), -1) == y)
        distance = float(threat.make(norm, eps).distance(x_adv, x).max())
        if distance > eps * (1 + 1e-5):
            raise RuntimeError(f"{name} left the {norm} ball: {distance} > {eps}")
        result[name] = right, between - began, seconds
    return result


def theirs(stages, module, x, y, only):
    """{stage: (robust (n,) bool, seconds)}."""
    result = {}
    images, labels = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous(), torch.from_numpy(y)
    for name, attack in stages.items():
        if name not in only:
            continue
        began = time.monotonic()
        x_adv = attack(images.clone(), labels.long().clone())
        seconds = time.monotonic() - began
        with torch.no_grad():
            result[name] = (module(x_adv).argmax(1) == labels).numpy(), seconds
    return result


def report(norm, eps, mine, peer):
    print(f"\n{norm} eps {eps:g}\n{'stage':9}{'here':>6}{'torch':>7}{'differ':>8}", end="")
    print(f"{'s here':>9}{'+compile':>10}{'s torch':>9}")
    both = [np.ones_like(next(iter(mine.values()))[0]) for _ in range(2)]
    for name, (right, compiling, seconds) in mine.items():
        both[0] &= right
        line = f"{name:9}{right.sum():6d}"
        if name in peer:
            other, their_seconds = peer[name]
            both[1] &= other
            line += f"{other.sum():7d}{(right != other).sum():8d}{seconds:9.1f}{compiling:10.1f}"
            line += f"{their_seconds:9.1f}"
        print(line, flush=True)
    counts = f"{both[0].sum():6d}{both[1].sum():7d}{(both[0] != both[1]).sum():8d}"
    print(f"{'both':9}{counts}", "differ at", np.flatnonzero(both[0] != both[1]).tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, default="/work/shared/data")
    parser.add_argument("--reference", type=pathlib.Path)
    parser.add_argument("--weights", type=pathlib.Path, default="compare_cnn.msgpack")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--eps", default="linf=0.3,l2=2.0,l1=10")
    parser.add_argument("--stages", default="apgd-ce,apgd-t,fab-t,square")
    args = parser.parse_args()
    # torch's own deprecations are not ours to fix.
    warnings.simplefilter("ignore")
    variables = weights(args.weights, args.data, args.epochs)
    module = torch_peers.load(torch_peers.CNN(), variables).eval()
    images, labels = load_mnist(args.data, "test")
    logits = NET.apply(variables, jnp.asarray(images[: 2 * args.examples]))
    rows = np.flatnonzero(np.asarray(logits.argmax(-1)) == labels[: 2 * args.examples])
    x, y = images[rows[: args.examples]], labels[rows[: args.examples]]
    with torch.no_grad():
        peers_logits = module(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    print("largest difference of the logits:", np.abs(peers_logits - logits[rows][: len(x)]).max())
    only = args.stages.split(",")
    for part in args.eps.split(","):
        norm, eps = part.split("=")
        if args.reference:
            stages = reference_stages(module, norm, float(eps), args.reference)
        else:
            stages = torchattacks_stages(module, norm, float(eps))
        mine = ours(variables, norm, float(eps), jnp.asarray(x), jnp.asarray(y), only)
        report(norm, float(eps), mine, theirs(stages, module, x, y, only))


if __name__ == "__main__":
    main()
