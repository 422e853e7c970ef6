"""Anti-adversary: at test time, a few steps that make the classifier surer of what it says."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.attacks import checks
from jaxdefense.defenses import base, standard
from jaxdefense.types import Array, Images, Predict, Scalar, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    steps: int = 2,
    step_size: float = 0.15,
    smoothing: float = 0.0,
) -> base.Defense:
    """F(x_k) with x_{i+1} = x_i - step_size sign(gradient of CE(F(x_i), argmax F(x))), x_0 = x.

    Nothing is trained for it: the classifier is `standard`'s. It optimises at test time, so its
    forward pass holds a loop, and the sign has no gradient: an attack through it sees
    dx_k/dx = 1, which is BPDA's. What an attacker must change is argmax F(x); then the
    steps run the attacker's way, so attacks on F alone carry over.

    Args:
      model: F.
      threat: unused; every defence has the same signature.
      steps: k.
      step_size: alpha, in image units.
      smoothing: label smoothing of F's training, in [0, 1).

    Returns:
      A `Defense` with the predictors `anti_adversary`, F(x_k), and `classifier`, F alone.

    Raises:
      ValueError: steps that are no positive integer, or a negative step_size.

    Reference: Alfarra et al., Combating adversaries with anti-adversaries, arXiv 2103.14347. As
      in the authors' code x_k is not clipped to valid images. Croce et al., Evaluating the
      adversarial robustness of adaptive test-time defenses, arXiv 2202.13711, break it.
    """
    checks.check_count("steps", steps)
    checks.check_step("step_size", step_size)
    net = base.Net(model)

    def purify(params: base.Params, carry: base.Carry) -> Callable[[Images], Images]:
        predict = net.predict(params, carry)

        def clean(x: Images) -> Images:
            guess = jnp.argmax(predict(x), -1)

            def step(_: Array, z: Images) -> Images:
                def doubt(z: Images) -> Scalar:
                    return jnp.sum(losses.cross_entropy(predict(z), guess))

                # The sign's derivative is 0 anyhow; so no second one is built.
                grad = jax.grad(doubt)(jax.lax.stop_gradient(z))
                return z - step_size * jax.lax.stop_gradient(jnp.sign(grad))

            return jax.lax.fori_loop(0, steps, step, x)

        return clean

    def surer(params: base.Params, carry: base.Carry) -> Predict:
        predict, clean = net.predict(params, carry), purify(params, carry)
        return lambda x: predict(clean(x))

    plain = standard.make(model, threat, smoothing=smoothing)
    return dataclasses.replace(
        plain,
        predictors={"anti_adversary": surer, **plain.predictors},
        purifiers={"anti_adversary": base.Purifier("classifier", purify)},
    )
