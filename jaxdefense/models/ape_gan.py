"""The two networks of APE-GAN: a convolutional autoencoder, and what judges its images."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense.models import layers


class Generator(nn.Module):
    """Two 4x4 convolutions with stride 2 (64, 128) and two steps up (64, C), image to image.

    BatchNorm and leaky ReLU after all but the last, which a tanh brings into (0, 1). A step up is
    a 3x3 convolution whose channels are spread over 2x2 pixels: it can do all that the published
    4x4 transposed convolution does. Deviation: (1 + tanh) / 2 instead of tanh, since images lie
    in [0, 1]. Submodules: conv1, conv2, up1, up2, bn1, bn2, bn3.

    Attributes:
      channels: C of the images it returns.
      width: multiplies 64 and 128.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and results are float32.
      bn_axis: mapped axis over which BatchNorm averages in training, or None.

    Reference: Shen et al., APE-GAN: adversarial perturbation elimination with GAN,
    arXiv 1707.05474; the layers are those of the authors' code and of its PyTorch port.
    """

    channels: int
    width: float = 1.0
    dtype: str = "float32"
    bn_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images (B, H, W, channels) in (0, 1) of images x (B, H, W, C).

        Raises:
          ValueError: x is not of rank 4, not floating, or of a size that 4 does not divide.
        """
        x = layers.normalise(x, None, None, self.dtype)
        if x.shape[1] % 4 or x.shape[2] % 4:
            raise ValueError(f"APE-GAN needs sizes that 4 divides, got images {x.shape}")
        inner = [layers.scaled(c, self.width) for c in (64, 128)]

        def follow(x: jax.Array, name: str) -> jax.Array:
            return nn.leaky_relu(_batch_norm(self, x, name, train))

        conv = functools.partial(layers.convolve, dtype=self.dtype)
        x = follow(conv(x, inner[0], 4, 2, name="conv1", use_bias=False), "bn1")
        x = follow(conv(x, inner[1], 4, 2, name="conv2", use_bias=False), "bn2")
        x = conv(x, 4 * inner[0], 3, 1, name="up1", use_bias=False)
        x = follow(layers.spread2(x), "bn3")
        x = layers.spread2(conv(x, 4 * self.channels, 3, 1, name="up2"))
        return (1 + jnp.tanh(x.astype(jnp.float32))) / 2


class Discriminator(nn.Module):
    """Images -> one logit: above 0 for those it takes for real.

    Three 3x3 convolutions with stride 2 (64, 128, 256), leaky ReLU, BatchNorm in the last two, and
    a linear layer. Deviation: padding 1, so that 8x8 images fit. Submodules: conv1, conv2, conv3,
    bn2, bn3, head.

    Attributes:
      width: multiplies 64, 128 and 256.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and results are float32.
      bn_axis: mapped axis over which BatchNorm averages in training, or None.

    Reference: as `Generator`.
    """

    width: float = 1.0
    dtype: str = "float32"
    bn_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits (B,) of images (B, H, W, C).

        Raises:
          ValueError: x is not of rank 4 or not floating.
        """
        x = layers.normalise(x, None, None, self.dtype)
        for i, channels in enumerate((64, 128, 256), 1):
            c = layers.scaled(channels, self.width)
            x = layers.convolve(x, c, 3, 2, name=f"conv{i}", use_bias=i == 1, dtype=self.dtype)
            if i > 1:
                x = _batch_norm(self, x, f"bn{i}", train)
            x = nn.leaky_relu(x)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        return layers.dense(1, x.shape[-1], name="head")(x)[:, 0]


def _batch_norm(
    module: Generator | Discriminator, x: jax.Array, name: str, train: bool
) -> jax.Array:
    """BatchNorm in the submodule `name` of either network."""
    return layers.BatchNorm(
        use_running_average=not train, dtype=module.dtype, axis_name=module.bn_axis, name=name
    )(x)


def make_generator(channels: int, **kwargs: Any) -> Generator:
    """`Generator` for images with `channels` channels; keyword arguments are its attributes."""
    return layers.build_generator(Generator, channels, kwargs)
