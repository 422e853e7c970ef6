"""A masked autoencoder: a small vision transformer that fills in what it has not seen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense.models import layers


class MAE(nn.Module):
    """Patches -> a transformer over those that are kept -> a smaller one over all -> pixels.

    Without a key every patch is kept and the network is a plain autoencoder: this is how it
    serves as a generator; with one, `mask` of each image's patches are hidden. Position codes are
    sines and cosines, so the weights depend on the patch only, not on the image's size. Far
    smaller than the published one, for images of 8 to 32 pixels. Deviation: the pixels pass a
    sigmoid and are not normalised per patch, since the result must be an image.
    Submodules: embed, encoder{0..}, encoder_norm, bridge, decoder{0..}, decoder_norm, pixels.

    Attributes:
      channels: C of the images it returns.
      patch: side of a patch; 4, for 8x8 digits 2.
      mask: share of the patches that a call with a key hides, in [0, 1).
      width: of the encoder's tokens, a multiple of 8 and of 2 `heads`; the decoder's have half.
      depth: encoder blocks; the decoder has half.
      heads: of attention.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and results are float32.

    Reference: He et al., Masked autoencoders are scalable vision learners, arXiv 2111.06377.
    """

    channels: int
    patch: int = 4
    mask: float = 0.75
    width: int = 128
    depth: int = 4
    heads: int = 4
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Images (B, H, W, C) in (0, 1).

        Args:
          x: (B, H, W, any number of channels), H and W multiples of `patch`.
          train: without effect; every network has it.
          key: hides patches, other ones in each image; without, all are seen.

        Raises:
          ValueError: x is not of rank 4, not floating, or of a size that `patch` does not divide.
        """
        del train
        x = layers.normalise(x, None, None, self.dtype)
        batch, height, width, channels = x.shape
        p = self.patch
        if height % p or width % p:
            raise ValueError(f"MAE needs sizes that patch ({p}) divides, got images {x.shape}")
        rows, columns = height // p, width // p
        count = rows * columns
        x = x.reshape(batch, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, count, -1)

        x = layers.dense(self.width, x.shape[-1], dtype=self.dtype, name="embed")(x)
        x = x + _positions(rows, columns, self.width).astype(x.dtype)
        if key is not None:
            # A random order of each image's patches; the first ones are kept.
            order = jnp.argsort(jax.random.uniform(key, (batch, count)), -1)
            kept = max(1, round(count * (1 - self.mask)))
            x = jnp.take_along_axis(x, order[:, :kept, None], 1)
        x = self._blocks(x, "encoder", self.width, self.depth)

        half = self.width // 2
        x = layers.dense(half, self.width, dtype=self.dtype, name="bridge")(x)
        token = self.param("hidden", nn.initializers.normal(0.02), (1, 1, half))
        if key is not None:
            hidden = jnp.broadcast_to(token.astype(x.dtype), (batch, count - kept, half))
            x = jnp.concatenate((x, hidden), 1)
            x = jnp.take_along_axis(x, jnp.argsort(order, -1)[:, :, None], 1)  # order undone
        x = x + _positions(rows, columns, half).astype(x.dtype)
        x = self._blocks(x, "decoder", half, max(1, self.depth // 2))

        x = layers.dense(p * p * self.channels, half, dtype=self.dtype, name="pixels")(x)
        x = x.reshape(batch, rows, columns, p, p, self.channels).transpose(0, 1, 3, 2, 4, 5)
        return nn.sigmoid(x.reshape(batch, height, width, -1).astype(jnp.float32))

    def _blocks(self, x: jax.Array, name: str, width: int, depth: int) -> jax.Array:
        """Transformer blocks with normalisation before each part, and one at the end."""
        for i in range(depth):
            x = Block(width, self.heads, self.dtype, name=f"{name}{i}")(x)
        return nn.LayerNorm(dtype=self.dtype, name=f"{name}_norm")(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with an inner width of four times x's."""

    width: int
    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, N, width) -> (B, N, width)."""
        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = nn.gelu(layers.dense(4 * self.width, self.width, dtype=self.dtype, name="mlp1")(y))
        return x + layers.dense(self.width, 4 * self.width, dtype=self.dtype, name="mlp2")(y)


def _positions(rows: int, columns: int, width: int) -> jax.Array:
    """(1, rows * columns, width): a quarter each sines and cosines of the row and the column."""
    rate = 1e4 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [at[:, None] * rate[None] for at in (row, column)]
    codes = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], -1)
    return jnp.asarray(codes[None], jnp.float32)


def make_generator(channels: int, **kwargs: Any) -> MAE:
    """`MAE` of images with `channels` channels; keyword arguments are its attributes.

    Raises:
      ValueError: an unknown field, `mask` outside [0, 1), a patch, depth or number of heads
        below 1, or a width that does not fit them.
    """
    module = layers.build_generator(MAE, channels, kwargs)
    if not 0 <= module.mask < 1:
        raise ValueError(f"mask must be in [0, 1), got {module.mask}")
    for field in ("patch", "depth", "heads"):
        if getattr(module, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(module, field)}")
    # Both widths, the second half the first, are cut into heads and into four kinds of codes.
    if module.width < 8 or module.width % 8 or module.width % (2 * module.heads):
        raise ValueError(
            f"width must be a multiple of 8 and of twice the heads ({module.heads}), "
            f"got {module.width}"
        )
    return module
