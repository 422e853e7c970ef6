# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Attack my model
#
# A small Flax network is trained for some seconds on scikit-learn's digits, and then attacked:
# with one PGD, over a range of eps, and without any gradients. Replace `net`, `variables` and
# the images by your own; nothing here depends on what the network is.
#
#     python examples/attack_my_model.py           # draws attack.png into the current folder
#     jupytext --to notebook examples/attack_my_model.py

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen as nn

from jaxdefense import attacks, data, threat

# %% [markdown]
# ## The network


# %%
class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):  # (B, 8, 8, 1) in [0, 1] -> logits (B, 10)
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


net = CNN()
train, test = data.load("digits", "train"), data.load("digits", "test")
images, labels = data.to_float(train.images), jnp.asarray(train.labels)
variables = net.init(jax.random.key(0), images[:1])
optimizer = optax.adam(0.01)


@jax.jit
def step(variables, state):
    def loss(variables):
        logits = net.apply(variables, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = optimizer.update(jax.grad(loss)(variables), state)
    return optax.apply_updates(variables, updates), state


state = optimizer.init(variables)
for _ in range(60):
    variables, state = step(variables, state)

# %% [markdown]
# ## One attack
#
# `jitted` compiles the attack once. The weights are arguments, so new weights compile nothing
# anew.

# %%
x, y = data.to_float(test.images[:100]), jnp.asarray(test.labels[:100])


def accuracy(images):
    return float(jnp.mean(net.apply(variables, images).argmax(-1) == y))


attack = attacks.jitted(attacks.pgd(threat.Linf(0.15), steps=10), net.apply)
x_adv = attack(variables, jax.random.key(1), x, y)
print(f"right: {accuracy(x):.0%} clean, {accuracy(x_adv):.0%} under PGD at eps .15")

# %% [markdown]
# ## Over a range of eps
#
# eps may be an array with one value for each image, so a single program serves the whole range.


# %%
@jax.jit
def moved(eps, key):
    ball = threat.Linf(jnp.full(len(x), eps))
    pgd = attacks.pgd(ball, steps=10)
    return pgd(lambda images: net.apply(variables, images), key, x, y)


curve = {eps: accuracy(moved(eps, jax.random.key(2))) for eps in (0.0, 0.05, 0.1, 0.15, 0.2)}
for eps, right in curve.items():
    print(f"eps {eps:.2f}: {right:.0%}")

# %% [markdown]
# ## Without gradients
#
# Square asks the model for its answers alone. If it finds more than a gradient attack, the
# gradients mislead, and the number of the gradient attack means little.

# %%
square = attacks.jitted(attacks.square(threat.Linf(0.15), queries=200), net.apply)
black_box = accuracy(square(variables, jax.random.key(3), x, y))
print(f"right under Square, 200 queries: {black_box:.0%}")

# %% [markdown]
# ## What it looks like

# %%
guesses = net.apply(variables, x_adv).argmax(-1)
figure, axes = plt.subplots(2, 6, figsize=(9, 3.4), layout="constrained")
for i in range(6):
    for row, picture, title in ((0, x, f"label {y[i]}"), (1, x_adv, f"taken for {guesses[i]}")):
        axes[row, i].imshow(picture[i, ..., 0], cmap="gray", vmin=0, vmax=1)
        axes[row, i].set_title(title)
        axes[row, i].axis("off")
figure.savefig("attack.png")
plt.close(figure)
