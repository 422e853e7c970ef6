"""A U-Net from images to images of the same size: what is to be added to them."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense.models import layers


class UNet(nn.Module):
    """Down by strided convolutions, up by spread channels, each level joined to its twin.

    A 3x3 stem, `depth` times a 4x4 convolution with stride 2 that doubles the channels, a 3x3
    convolution at the bottom, then back up: a 3x3 convolution whose channels are spread over 2x2
    pixels, joined with the down path's result of the same size, and a 3x3 convolution; each with
    GroupNorm and ReLU. A last 3x3 convolution is zero at the start, so the network begins by
    adding nothing. GroupNorm, not BatchNorm: the function that is trained is to the bit the one
    that is deployed and attacked. (Without any norm, a tanh behind it saturated within 50 steps on
    MNIST and had not returned after 800.) Sizes that 2^depth does not divide are padded with their
    edge and cut again.
    193,857 parameters at width 16 and depth 2 for one channel. Submodules: stem, down{1..},
    bottom, up{1..}, join{1..}, each also with _norm, and out.

    Attributes:
      channels: C of what it returns.
      width: channels of the first level.
      depth: halvings of the size; 2 for 8x8 to 28x28, 3 for 32x32.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and results are float32.

    Reference: Ronneberger et al., U-Net, arXiv 1505.04597; as a denoiser of adversarial images
    Liao et al., arXiv 1712.02976.
    """

    channels: int
    width: int = 16
    depth: int = 2
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, channels), any sign and size, 0 at the start.

        Args:
          x: floats.
          train: without effect; every network has it.

        Raises:
          ValueError: x is not of rank 4 or not floating.
        """
        del train
        x = layers.normalise(x, None, None, self.dtype)
        _, height, width, _ = x.shape
        block = 2**self.depth
        x = jnp.pad(x, ((0, 0), (0, -height % block), (0, -width % block), (0, 0)), "edge")
        conv = functools.partial(layers.convolve, dtype=self.dtype)

        def follow(x: jax.Array, name: str) -> jax.Array:
            groups = math.gcd(x.shape[-1], 4)
            norm = nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=f"{name}_norm")
            return nn.relu(norm(x))

        conv_free = functools.partial(conv, use_bias=False)  # the norm has the bias
        x = follow(conv_free(x, self.width, 3, 1, name="stem"), "stem")
        twins = []
        for i in range(1, self.depth + 1):
            twins.append(x)
            x = follow(conv_free(x, self.width * 2**i, 4, 2, name=f"down{i}"), f"down{i}")
        x = follow(conv_free(x, x.shape[-1], 3, 1, name="bottom"), "bottom")
        for i in range(self.depth, 0, -1):
            c = self.width * 2 ** (i - 1)
            x = follow(layers.spread2(conv_free(x, 4 * c, 3, 1, name=f"up{i}")), f"up{i}")
            x = jnp.concatenate((x, twins.pop()), -1)
            x = follow(conv_free(x, c, 3, 1, name=f"join{i}"), f"join{i}")
        zeros = nn.initializers.zeros
        x = conv(x, self.channels, 3, 1, name="out", kernel_init=zeros, bias_init=zeros)
        return x[:, :height, :width].astype(jnp.float32)


def make_generator(channels: int, **kwargs: Any) -> UNet:
    """`UNet` for images with `channels` channels; keyword arguments are its attributes.

    Raises:
      ValueError: an unknown field, or a width or depth below 1.
    """
    module = layers.build_generator(UNet, channels, kwargs)
    for field in ("width", "depth"):
        if getattr(module, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(module, field)}")
    return module
