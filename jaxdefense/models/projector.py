"""The projection head of contrastive training."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense.models import layers


class Projector(nn.Module):
    """h -> W2 relu(W1 h + b1) + b2, scaled to length 1; in float32.

    Attributes:
      hidden: units between the two layers; None: as many as h has.
      features: of the result.

    Reference: Khosla et al., Supervised contrastive learning, arXiv 2004.11362 (512-512-128).
    """

    hidden: int | None = None
    features: int = 128

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """(B, D) -> (B, features), each row of length 1."""
        h = h.astype(jnp.float32)
        hidden = self.hidden or h.shape[-1]
        h = nn.relu(layers.dense(hidden, h.shape[-1], name="fc1")(h))
        z = layers.dense(self.features, hidden, name="fc2")(h)
        # Under the root, so that the gradient at 0 is finite.
        return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), -1, keepdims=True), 1e-12))
