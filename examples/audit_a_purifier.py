# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Audit a purifier
#
# A purifier cleans images before the classifier sees them. Attacked by someone who does not know
# of it, it looks robust, and papers report that number. This example builds such a defence in a
# few lines and lets the audit show how much of its robustness is real.
#
#     python examples/audit_a_purifier.py          # draws audit.png into the current folder
#     jupytext --to notebook examples/audit_a_purifier.py

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from jaxdefense import attacks, data, evaluation, losses, threat

# %% [markdown]
# ## The defence
#
# The classifier is two dense layers, trained on clean images. The purifier is two more: it is
# shown attacked images, and learns to return such that the classifier gets right and that look
# like the clean ones. This is the idea of APE-GAN and of HGD.


# %%
def dense(key):
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (64, 128)) / 8,
        "second": jax.random.normal(second, (128, 64)) / 12,
    }


def layers(weights, x):
    return jax.nn.relu(x.reshape(len(x), -1) @ weights["first"]) @ weights["second"]


def classify(weights, x):
    return layers(weights, x)[:, :10]


def purify(weights, x):
    return jnp.clip(x + layers(weights, x).reshape(x.shape), 0, 1)


def train(loss, weights, steps):
    """Adam on `loss(weights)`."""
    optimizer = optax.adam(0.003)

    @jax.jit
    def run(weights):
        def step(_, carry):
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights), state)
            return optax.apply_updates(weights, updates), state

        return jax.lax.fori_loop(0, steps, step, (weights, optimizer.init(weights)))[0]

    return run(weights)


ball = threat.Linf(0.15)
examples, test = data.load("digits", "train"), data.load("digits", "test")
images, labels = data.to_float(examples.images), jnp.asarray(examples.labels)


def fit(weights):
    return jnp.mean(losses.cross_entropy(classify(weights, images), labels))


classifier = train(fit, dense(jax.random.key(0)), 200)
pgd = attacks.jitted(attacks.pgd(ball, steps=20), classify)
attacked = pgd(classifier, jax.random.key(1), images, labels)


def clean_up(weights):
    cleaned = purify(weights, attacked)
    right = jnp.mean(losses.cross_entropy(classify(classifier, cleaned), labels))
    return right + 10 * jnp.mean((cleaned - images) ** 2)


purifier = train(clean_up, jax.tree.map(lambda w: 0.1 * w, dense(jax.random.key(2))), 300)

# %% [markdown]
# ## The audit
#
# `base` is the classifier behind the purifier. With it and `purify` the audit can attack each
# way: without knowledge of the purifier (T0), through it (T1), with the identity for its
# gradient (T2), and with no gradients at all (T3). The small numbers keep this example quick:
# leave them out for your own.

# %%
x, y = test.images[:100].astype("float32") / 255, test.labels[:100]
report = evaluation.audit(
    lambda x: classify(classifier, purify(purifier, x)),
    x,
    y,
    ball,
    base=lambda x: classify(classifier, x),
    purify=lambda x: purify(purifier, x),
    steps=20,
    restarts=1,
    stages=(),
    queries=300,
)
print(report.markdown())

# %% [markdown]
# ## Reading it
#
# * T0 is what such a defence is often praised for: the attacker does not know of the purifier.
# * T1 is the same attack, made through classifier and purifier together. Nothing is left.
# * The number to quote is the worst case per image, and only with the failed checks beside it. A
#   purifier with a useless gradient (rounding, say) would do well in T1 too: then T2 and T3 find
#   more, and the check "gradients are there" fails.

# %%
failed = [check.name for check in report.checks if not check.passed]
print("failed checks:", ", ".join(failed) or "none")

tiers = {name: 100 * right.mean() for name, right in report.tiers.items()}
tiers["worst case"] = 100 * report.worst.mean()
figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
bars = axis.barh(list(tiers), list(tiers.values()), color="#0072B2")
axis.bar_label(bars, fmt="%.0f", padding=3)
axis.set(xlabel="accuracy, %", xlim=(0, 108), title="What each kind of knowledge leaves")
axis.invert_yaxis()
figure.savefig("audit.png")
plt.close(figure)
