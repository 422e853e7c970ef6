"""A VGG-style network of six convolutions for small images."""

from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers


class VGG(layers.NormedClassifier):
    """3x3 convolutions of 64, 64, 128, 128, 256, 256 channels, BatchNorm and ReLU, K logits.

    A 2x2 maximum follows every second one, the global mean the last. 1,148,874 parameters on
    three channels with ten classes. Works from 8x8 pixels up. Which form of six convolutions a
    paper means by "VGG-style" is rarely said; this one is ours. Submodules: conv{1..6},
    bn{1..6}, head. Running statistics: `batch_stats`.

    Attributes:
      width: channels of the first two convolutions; doubled at the next ones.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: Simonyan and Zisserman, Very deep convolutional networks for large-scale image
    recognition, arXiv 1409.1556 (the style); BatchNorm is later than the paper.
    """

    width: int = 64

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, 4 * width)), of images x (B, H, W, C).

        Raises:
          ValueError: x is not of rank 4, not floating, or smaller than 8x8; an unknown `bn_set`.
        """
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        if min(x.shape[1:3]) < 8:
            raise ValueError(f"VGG needs at least 8x8 pixels, got images {x.shape}")
        for i, factor in enumerate((1, 1, 2, 2, 4, 4), 1):
            x = layers.Conv(
                factor * self.width,
                (3, 3),
                padding=1,
                use_bias=False,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = nn.relu(layers.batch_norm(self, x, f"bn{i}", train=train, which=bn_set))
            if i % 2 == 0:
                x = layers.max_pool2(x)
        return layers.classify(x.mean((1, 2)), self.num_classes, features)


def make(num_classes: int, **kwargs: Any) -> VGG:
    """`VGG` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(VGG, num_classes, kwargs)
