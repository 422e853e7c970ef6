"""ResNet for small images: a 3x3 stem and no pooling before the blocks."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers

# depth -> (block, blocks per stage)
DEPTHS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
}


class Block(layers.NormedBlock):
    """relu(shortcut(x) + convolutions(x)), BatchNorm after every convolution.

    Attributes:
      channels: of the inner convolutions; a bottleneck returns four times as many.
      stride: of the first 3x3 convolution and of the shortcut.
      bottleneck: 1x1, 3x3, 1x1 instead of 3x3, 3x3.

    Further attributes: those of `layers.NormedBlock`.
    """

    channels: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, bn_set: int) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels or 4 channels)."""
        conv = partial(layers.Conv, use_bias=False, padding=0, dtype=self.dtype)
        norm = partial(layers.batch_norm, self, train=train, which=bn_set)
        c = self.channels
        plan: tuple[tuple[int, int, int], ...]  # (features, kernel, stride) of each convolution
        if self.bottleneck:
            plan = ((c, 1, 1), (c, 3, self.stride), (4 * c, 1, 1))
        else:
            plan = ((c, 3, self.stride), (c, 3, 1))

        y = x
        for i, (features, k, stride) in enumerate(plan, 1):
            y = conv(features, (k, k), stride, padding=k // 2, name=f"conv{i}")(y)
            y = norm(y, f"bn{i}")
            if i < len(plan):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = conv(y.shape[-1], (1, 1), self.stride, name="shortcut_conv")(x)
            x = norm(x, "shortcut_bn")
        return nn.relu(x + y)


class ResNet(layers.NormedClassifier):
    """3x3 stem, four stages of residual blocks (strides 1, 2, 2, 2), global mean, K logits.

    11,173,962 parameters at depth 18 with ten classes. PyTorch's default initialisation.
    Submodules: conv1, bn1, stage{1..4}_block{1..}, head. Running statistics: `batch_stats`.

    Attributes:
      depth: 18, 34 (basic blocks) or 50 (bottlenecks).
      width: channels of the first stage; doubled at each next one.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: He et al., Deep residual learning for image recognition, arXiv 1512.03385, in the
    form for 32x32 images that the robustness literature uses.
    """

    depth: int = 18
    width: int = 64

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, D)), of images x (B, H, W, C).

        D is 8 * width, at depth 50 four times that. With `train`, BatchNorm uses the batch's
        statistics and updates `batch_stats` (make it mutable).

        Raises:
          ValueError: x is not of rank 4 or not floating; an unknown depth or `bn_set`.
        """
        if self.depth not in DEPTHS:
            raise ValueError(f"unknown depth {self.depth}; allowed: {', '.join(map(str, DEPTHS))}")
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        x = layers.Conv(
            self.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="conv1"
        )(x)
        x = nn.relu(layers.batch_norm(self, x, "bn1", train=train, which=bn_set))
        kind, blocks = DEPTHS[self.depth]
        for stage, count in enumerate(blocks):
            for i in range(count):
                x = Block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=kind == "bottleneck",
                    **self.norm_fields,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x, train=train, bn_set=bn_set)
        return layers.classify(x.mean((1, 2)), self.num_classes, features)


def make(num_classes: int, **kwargs: Any) -> ResNet:
    """`ResNet` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(ResNet, num_classes, kwargs)
