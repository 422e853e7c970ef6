"""VGG with BatchNorm for small images, and a smaller one of six convolutions."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers

# depth -> convolutions before each 2x2 maximum; None is our own
DEPTHS: dict[int | None, tuple[int, ...]] = {
    None: (2, 2, 2),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(layers.NormedClassifier):
    """3x3 convolutions of 64, 64, 128, 128, 256, 256 channels, BatchNorm and ReLU, K logits.

    A 2x2 maximum follows every second one, the global mean the last. 1,148,874 parameters on
    three channels with ten classes. Works from 8x8 pixels up. Which form of six convolutions a
    paper means by "VGG-style" is rarely said; this one is ours. Submodules: conv{1..6},
    bn{1..6}, head. Running statistics: `batch_stats`.

    With `depth` it is VGG-11 to VGG-19 in the form for 32x32 images: the published convolutions,
    five maxima, and one linear layer instead of three.

    Attributes:
      depth: 11, 13, 16 or 19; None for six convolutions.
      width: channels of the first two convolutions; doubled at the next ones.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: Simonyan and Zisserman, Very deep convolutional networks for large-scale image
    recognition, arXiv 1409.1556 (the style); BatchNorm is later than the paper.
    """

    depth: int | None = None
    width: int = 64

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, D)), of images x (B, H, W, C).

        D is 4 * width, with a depth 8 * width.

        Raises:
          ValueError: x is not of rank 4, not floating, or smaller than 8x8 (32x32 with a depth); an
            unknown depth or `bn_set`.
        """
        if self.depth not in DEPTHS:
            raise ValueError(f"unknown depth {self.depth}; allowed: None, 11, 13, 16, 19")
        stages = DEPTHS[self.depth]
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        if min(x.shape[1:3]) < (side := 2 ** len(stages)):
            raise ValueError(f"VGG needs at least {side}x{side} pixels, got images {x.shape}")
        i = 0
        for stage, count in enumerate(stages):
            for _ in range(count):
                i += 1
                x = layers.Conv(
                    self.width * 2 ** min(stage, 3),
                    (3, 3),
                    padding=1,
                    use_bias=False,
                    dtype=self.dtype,
                    name=f"conv{i}",
                )(x)
                x = nn.relu(layers.batch_norm(self, x, f"bn{i}", train=train, which=bn_set))
            x = layers.max_pool2(x)
        return layers.classify(x.mean((1, 2)), self.num_classes, features)


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`."""
    convolutions = layers.convolutions(shapes)
    depths = {sum(stages): depth for depth, stages in DEPTHS.items()}
    if len(convolutions) not in depths:
        raise ValueError(f"no VGG of {len(convolutions)} convolutions; known: {sorted(depths)}")
    return {"depth": depths[len(convolutions)], "width": convolutions[0][0]}


def make(num_classes: int, **kwargs: Any) -> VGG:
    """`VGG` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(VGG, num_classes, kwargs)
