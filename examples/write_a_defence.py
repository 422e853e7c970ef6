# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Write a defence
#
# A defence is a value: how its parameters begin, which updates each batch gets, and how the
# trained network predicts. This example writes one, trains it, and compares it with ordinary
# training. `docs/add_a_defence.md` shows how such a file becomes a name that configs know.
#
#     python examples/write_a_defence.py           # draws defence.png into the current folder
#     jupytext --to notebook examples/write_a_defence.py

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxdefense import attacks, data, defenses, evaluation, losses, models, threat
from jaxdefense.defenses import base

# %% [markdown]
# ## The defence
#
# It fits the clean images and keeps the logits still:
#
#     min CE(f(x), y) + weight max_{x'} ||f(x) - f(x')||^2 / K
#
# The inner maximum is a *craft*: any objective with one number for each image, climbed from a
# point beside x. The outer minimum is a *loss*. That the logits of the clean images are needed
# twice is why the craft is given (params, carry, batch) and not just a network.


# %%
def make(model, threat, *, weight=2.0, steps=3):
    net = base.Net(model)

    def distance(params, carry, batch):
        predict = net.predict(params, carry)
        clean = predict(batch["image"])
        return lambda z: jnp.mean((predict(z) - clean) ** 2, -1)

    def loss(params, carry, batch, key):
        clean, moved, carry = net.train_on_both(params, carry, batch)
        fit = losses.cross_entropy(clean, base.targets(batch, clean))
        stillness = jnp.mean((clean - moved) ** 2, -1)
        metrics = {"robust_accuracy": base.accuracy(moved, batch["label"])}
        return jnp.mean(fit + weight * stillness), (carry, metrics)

    craft = base.objective_craft(distance, threat, steps=steps, step_size=threat.eps / 2)
    return base.single_phase(net, loss, craft=craft)


# %% [markdown]
# ## Training
#
# In an experiment the library's loop does this: it runs any list of phases on any number of
# devices, with checkpoints and validation. Here the one update of the one phase is applied by
# hand, to show that nothing is hidden in it.

# %%
train, test = data.load("digits", "train"), data.load("digits", "test")
net, ball = models.make("cnn", 10, width=0.25), threat.Linf(0.15)


def fit(defense, *, epochs=8, batch_size=64):
    """(params, carry) after training with Adam on batches in a random order."""
    params, carry = defense.init(jax.random.key(0), data.to_float(train.images[:1]))
    (update,) = defense.phases[0].updates
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(params, carry, state, batch, key):
        first, second = jax.random.split(key)
        crafted = update.craft(params, carry, batch, first)

        def loss(params):
            return update.loss(params, carry, crafted, second)

        grads, (carry_after, _) = jax.grad(loss, has_aux=True)(params)
        changes, state = optimizer.update(grads, state)
        return optax.apply_updates(params, changes), carry_after, state

    state, order = optimizer.init(params), np.random.default_rng(0)
    for epoch in range(epochs):
        for number, ids in enumerate(np.split(order.permutation(1152), 1152 // batch_size)):
            batch = {
                "image": data.to_float(train.images[ids]),
                "label": jnp.asarray(train.labels[ids]),
                "epoch": jnp.float32(epoch),
            }
            key = jax.random.fold_in(jax.random.key(epoch), number)
            params, carry, state = step(params, carry, state, batch, key)
    return params, carry


# %% [markdown]
# ## What it is worth
#
# Our defence and ordinary training meet the same attack on the same test images. A number to
# publish would be AutoAttack's, over several seeds.

# %%
images, labels = data.to_float(test.images[:200]), test.labels[:200]
pgd = attacks.pgd(ball, steps=10)
results = {}
for name, defense in (
    ("standard", defenses.make("standard", net, ball)),
    ("mine", make(net, ball)),
):
    predictor = defense.predictors[defense.primary]
    judge = evaluation.Evaluator(lambda model, x, make=predictor: make(*model)(x), ball)
    bits = judge.bits(fit(defense), images, labels, range(200), {"pgd": pgd})
    results[name] = {attack: 100 * right.mean() for attack, right in bits.items()}
    print(name, {attack: f"{value:.1f} %" for attack, value in results[name].items()})

# %%
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for shift, (attack, colour) in enumerate((("clean", "#0072B2"), ("pgd", "#D55E00"))):
    places = np.arange(len(results)) + 0.4 * shift
    heights = [found[attack] for found in results.values()]
    bars = axis.bar(places, heights, width=0.36, label=attack, color=colour)
    axis.bar_label(bars, fmt="%.0f")
axis.set_xticks(np.arange(len(results)) + 0.2, list(results))
axis.set(ylabel="accuracy, %", ylim=(0, 112), title="L∞ eps .15, PGD-10")
axis.legend()
figure.savefig("defence.png")
plt.close(figure)
