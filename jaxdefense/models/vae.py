"""A convolutional variational autoencoder for small images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense.models import layers


class VAE(nn.Module):
    """x -> N(mean, exp(log_variance)) of `latent` numbers -> an image in (0, 1).

    Encoder: two 4x4 convolutions with stride 2 (32, 64) and a linear layer to both moments.
    Decoder: a linear layer to (H/4, W/4, 64), then twice a 3x3 convolution whose channels are
    spread over 2x2 pixels (32, C), and a sigmoid. No BatchNorm: the network that is trained is
    the one that is attacked. The architecture is ours: INFERRED where a paper names none.
    2,520,484 parameters on 28x28x1. Submodules: conv1, conv2, moments, expand, up1, up2.

    Attributes:
      channels: C of the images it returns.
      latent: length of the code.
      width: multiplies 32 and 64.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and results are float32.

    Reference: Kingma and Welling, Auto-encoding variational Bayes, arXiv 1312.6114.
    """

    channels: int
    latent: int = 256
    width: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        moments: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
        """Images (B, H, W, C) in (0, 1), or (images, mean, log_variance (B, latent)).

        Args:
          x: (B, H, W, any number of channels), H and W multiples of 4.
          train: without effect; every network has it.
          key: the code is drawn with it; without, the code is its mean.
          moments: whether to return the code's moments too.

        Raises:
          ValueError: x is not of rank 4, not floating, or of a size that 4 does not divide.
        """
        del train
        x = layers.normalise(x, None, None, self.dtype)
        batch, height, width, _ = x.shape
        if height % 4 or width % 4:
            raise ValueError(f"VAE needs sizes that 4 divides, got images {x.shape}")
        inner = [layers.scaled(c, self.width) for c in (32, 64)]
        for i, c in enumerate(inner, 1):
            x = nn.relu(self._conv(x, c, 4, 2, f"conv{i}"))
        x = x.reshape(batch, -1)
        code = layers.dense(2 * self.latent, x.shape[-1], dtype=self.dtype, name="moments")(x)
        mean, log_variance = jnp.split(code.astype(jnp.float32), 2, -1)
        code = mean
        if key is not None:
            code = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        shape = (batch, height // 4, width // 4, inner[-1])
        size = shape[1] * shape[2] * shape[3]
        x = layers.dense(size, self.latent, dtype=self.dtype, name="expand")(code)
        x = nn.relu(x).reshape(shape)
        for i, c in enumerate((inner[0], self.channels), 1):
            x = layers.spread2(self._conv(x, 4 * c, 3, 1, f"up{i}"))
            x = nn.relu(x) if i == 1 else nn.sigmoid(x.astype(jnp.float32))
        return (x, mean, log_variance) if moments else x

    def _conv(self, x: jax.Array, channels: int, size: int, stride: int, name: str) -> jax.Array:
        return layers.Conv(
            channels,
            (size, size),
            strides=stride,
            padding=1,
            bias_init=layers.bias_init(size**2 * x.shape[-1]),
            dtype=self.dtype,
            name=name,
        )(x)


def make_generator(channels: int, **kwargs: Any) -> VAE:
    """`VAE` of images with `channels` channels; keyword arguments are its attributes."""
    return layers.build_generator(VAE, channels, kwargs)
