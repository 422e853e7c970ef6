"""A user's own network, as it stands and with fast convolutions, beside torchattacks.

One trained MNIST CNN (a run of the model "cnn") written as a plain network of several libraries,
with the same weights: PGD-40 on the given images, and standard AutoAttack on 32 of them. The
network as it stands is attacked inside `models.explicit_gradients(False)`, which switches
`jaxdefense.rewrite` off and changes nothing else.
"""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmark import peers
from benchmark.pgd import timed_pairs
from jaxdefense import attacks, data, models, runs
from jaxdefense.evaluation import cascade
from jaxdefense.evaluation.evaluator import Evaluator

AUTOATTACK_IMAGES = 128  # what two cores judge in one dispatch: fewer would be padded to it
PGD_STEPS, PGD_STEP_SIZE = 40, 0.01


class Linen(nn.Module):
    """The MNIST CNN by `flax.linen` alone."""

    sizes: tuple[int, int, int, int]

    @nn.compact
    def __call__(self, x):
        """Logits of images (B, 28, 28, 1)."""
        for i, channels in enumerate(self.sizes[:2], 1):
            x = nn.relu(nn.Conv(channels, (4, 4), 2, padding=1, name=f"conv{i}")(x))
        x = nn.relu(nn.Dense(self.sizes[2], name="fc1")(x.reshape(len(x), -1)))
        return nn.Dense(self.sizes[3], name="head")(x)


class LinenWithPooling(nn.Module):
    """LeNet by `flax.linen` alone: two convolutions, each followed by `nn.max_pool`."""

    @nn.compact
    def __call__(self, x):
        """Logits of images (B, 28, 28, 1)."""
        for channels, padding in ((6, 2), (16, 0)):
            x = nn.relu(nn.Conv(channels, (5, 5), padding=padding)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(120)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.relu(nn.Dense(84)(x)))


class NNX(nnx.Module):
    """The MNIST CNN by `flax.nnx`."""

    def __init__(self, sizes, rngs):
        first, second, inner, classes = sizes
        options = dict(kernel_size=(4, 4), strides=2, padding=1, rngs=rngs)
        self.conv1 = nnx.Conv(1, first, **options)
        self.conv2 = nnx.Conv(first, second, **options)
        self.fc1 = nnx.Linear(49 * second, inner, rngs=rngs)
        self.head = nnx.Linear(inner, classes, rngs=rngs)

    def __call__(self, x):
        """Logits of images (B, 28, 28, 1)."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.head(nnx.relu(self.fc1(x.reshape(len(x), -1))))


def _sizes(params):
    return tuple(params[name]["bias"].size for name in ("conv1", "conv2", "fc1", "head"))


def _in_linen(params):
    return {"params": params}, Linen(_sizes(params)).apply


def _in_nnx(params):
    net = NNX(_sizes(params), nnx.Rngs(0))
    for name, layer in params.items():
        for key, value in layer.items():
            getattr(getattr(net, name), key)[...] = jnp.asarray(value)
    definition, state = nnx.split(net)
    return state, lambda state, x: nnx.merge(definition, state)(x)


def _in_torchs_layout(params):
    """Images NCHW and kernels OIHW, as torchax writes a torch module."""
    kernels = {n: params[n]["kernel"].transpose(3, 2, 0, 1) for n in ("conv1", "conv2")}
    weights = {
        name: {"kernel": kernels.get(name, layer["kernel"]), "bias": layer["bias"]}
        for name, layer in params.items()
    }

    def apply(weights, x):
        x = x.transpose(0, 3, 1, 2)
        for name in ("conv1", "conv2"):
            x = lax.conv_general_dilated(x, weights[name]["kernel"], (2, 2), [(1, 1), (1, 1)])
            x = jax.nn.relu(x + weights[name]["bias"].reshape(1, -1, 1, 1))
        return _dense_layers(weights, x)

    return weights, apply


def _in_equinox(params):
    import equinox as eqx

    def layer(name, inputs):
        options = dict(kernel_size=4, stride=2, padding=1, key=jax.random.key(0))
        plain = eqx.nn.Conv2d(inputs, params[name]["bias"].size, **options)
        bias = jnp.asarray(params[name]["bias"]).reshape(-1, 1, 1)
        kernel = jnp.asarray(params[name]["kernel"]).transpose(3, 2, 0, 1)
        return eqx.tree_at(lambda conv: (conv.weight, conv.bias), plain, (kernel, bias))

    convolutions = [layer("conv1", 1), layer("conv2", params["conv1"]["bias"].size)]
    variables = {"convolutions": convolutions, "fc1": params["fc1"], "head": params["head"]}

    def apply(variables, x):
        x = x.transpose(0, 3, 1, 2)
        for convolution in variables["convolutions"]:
            x = jax.nn.relu(jax.vmap(convolution)(x))
        return _dense_layers(variables, x)

    return variables, apply


def _dense_layers(weights, x):
    """The two last layers, of (B, C, H, W)."""
    x = x.transpose(0, 2, 3, 1).reshape(len(x), -1)
    x = jax.nn.relu(x @ weights["fc1"]["kernel"] + weights["fc1"]["bias"][None])
    return x @ weights["head"]["kernel"] + weights["head"]["bias"][None]


NETWORKS = {
    "linen": _in_linen,
    "nnx": _in_nnx,
    "equinox": _in_equinox,
    "jax.lax in torch's layout": _in_torchs_layout,
}


def switched_off(function):
    """The function, called with `jaxdefense.rewrite` switched off."""

    def call():
        with models.explicit_gradients(False):
            return function()

    return call


def pgd_rows(params, images, labels, ball, repeats):
    """PGD-40 on each network: rewritten beside plain, and beside torchattacks' on its weights.

    Args:
      params: of the MNIST CNN, NumPy arrays.
      images: (N, 28, 28, 1) in [0, 1], NumPy.
      labels: (N,), NumPy.
      ball: the threat, L_inf.
      repeats: timed pairs per row.
    """
    attack = attacks.pgd(ball, steps=PGD_STEPS, step_size=PGD_STEP_SIZE)
    x, y, key = jnp.asarray(images), jnp.asarray(labels), jax.random.key(0)
    wanted = models.make("cnn", _sizes(params)[-1], width=len(params["conv1"]["bias"]) / 16).apply(
        {"params": params}, x[:2]
    )

    def attacking(variables, apply):
        fast = attacks.jitted(attack, apply, devices=jax.local_devices())
        return lambda: jax.block_until_ready(fast(variables, key, x, y))

    def compared(what, variables, apply):
        plain = switched_off(attacking(variables, apply))
        row = timed_pairs(attacking(variables, apply), plain, repeats)
        return {"what": what, "peer": "the same network as it stands", **row}

    given = dict(eps=ball.eps, steps=PGD_STEPS, step_size=PGD_STEP_SIZE, name="cnn")
    for name, build in NETWORKS.items():
        what = f"PGD-{PGD_STEPS}, {name}, batch {len(x)}"
        if name == "equinox" and not importlib.util.find_spec(name):
            yield {"what": what, "peer": f"{name} (not installed)"}
            continue
        variables, apply = build(params)
        np.testing.assert_allclose(apply(variables, x[:2]), wanted, rtol=1e-3, atol=1e-3)
        yield compared(what, variables, apply)
        if not importlib.util.find_spec("torchattacks"):
            yield {"what": what, "peer": "torchattacks (not installed)"}
            continue
        problem = dict(images=images, labels=labels, **given)
        with peers.pgd_in_torch({"params": params}, **problem) as theirs:
            row = timed_pairs(attacking(variables, apply), theirs, repeats)
        yield {"what": what, "peer": "torchattacks", **row}
    pooling = LinenWithPooling()
    what = f"PGD-{PGD_STEPS}, linen with pooling, batch {len(x)}"
    yield compared(what, jax.jit(pooling.init)(key, x[:1]), pooling.apply)


def autoattack_rows(run, params, images, labels, ball):
    """Standard AutoAttack on the linen network: rewritten, plain, and torchattacks'.

    Times are those of a second run, when all is compiled.

    Args:
      run: that the weights are of.
      params: see `pgd_rows`, as are all that follow.
      images: (N, 28, 28, 1).
      labels: (N,).
      ball: the threat.
    """
    variables, apply = _in_linen(params)
    stages = cascade.stages(ball, _sizes(params)[-1])
    what = f"AutoAttack, linen, {len(images)} images"

    def seconds():
        evaluator = Evaluator(apply, ball)
        return [
            cascade.run_stages(evaluator, variables, images, labels, stages).seconds
            for _ in range(2)
        ][1]

    def row(peer, theirs):
        times = {"ours_ms": 1e3 * ours, "peer_ms": 1e3 * theirs, "ratio": theirs / ours}
        return {"what": what, "peer": peer, **times}

    ours = seconds()
    yield row("the same network as it stands", switched_off(seconds)())
    if not importlib.util.find_spec("torchattacks"):
        yield {"what": what, "peer": "torchattacks (not installed)"}
        return
    problem = (run, ball, {"params": params}, images, labels)
    answer = peers.answer_of_torch("cascade", *problem, "torchattacks", "")
    yield row("torchattacks", float(answer["seconds"]))


def rows(workdir, examples, repeats):
    """All rows, with the weights and first test images of a trained run of the MNIST CNN.

    Args:
      workdir: of the run.
      examples: number of test images.
      repeats: timed pairs per row of PGD.

    Raises:
      ValueError: a run of another network.
    """
    run, trained, _ = runs.restore(workdir)
    if run.config["model"]["name"] != "cnn":
        raise ValueError(f"{workdir} is no run of the model cnn: {run.config['model']['name']}")
    params = jax.tree.map(np.asarray, peers.classifier(trained)["params"])
    arrays = run.arrays("test").take(slice(examples))
    images, few = np.asarray(data.to_float(arrays.images)), slice(AUTOATTACK_IMAGES)
    yield from pgd_rows(params, images, arrays.labels, run.threat, repeats)
    yield from autoattack_rows(run, params, images[few], arrays.labels[few], run.threat)
