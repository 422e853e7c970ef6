"""MobileNetV2 for small images: the lightweight student of the distillation literature."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers

# (expansion, channels, blocks, stride of the first block) of each stage
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

_BLOCKS = [f"stage{s}_block{i}" for s, plan in enumerate(STAGES, 1) for i in range(1, plan[2] + 1)]

# PyTorch's names of the layers, in pytorch-cifar; see `models.torch`.
TORCH = (
    (r"^layers\.(\d+)\.", lambda m: f"{_BLOCKS[int(m[1])]}/"),
    (r"/conv1$", "/expand"),
    (r"/conv2$", "/depthwise"),
    (r"/conv3$", "/project"),
    (r"shortcut\.0$", "shortcut_conv"),
    (r"shortcut\.1$", "shortcut_bn"),
    (r"^linear$", "head"),
)


class Block(layers.NormedBlock):
    """shortcut + bn(project(relu(bn(depthwise(relu(bn(expand(x))))))).

    The shortcut is x itself or, where only the channels change, bn of a 1x1 convolution of x; a
    block with a stride has none.

    Attributes:
      channels: of the result.
      expansion: the inner channels are so many times those of x.
      stride: of the depthwise 3x3 convolution.

    Further attributes: those of `layers.NormedBlock`.
    """

    channels: int
    expansion: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, bn_set: int) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        point = partial(layers.Conv, kernel_size=(1, 1), use_bias=False, dtype=self.dtype)
        norm = partial(layers.batch_norm, self, train=train, which=bn_set)
        inner = self.expansion * x.shape[-1]
        y = nn.relu(norm(point(inner, name="expand")(x), "bn1"))
        y = layers.Conv(
            inner,
            (3, 3),
            self.stride,
            padding=1,
            feature_group_count=inner,
            use_bias=False,
            dtype=self.dtype,
            name="depthwise",
        )(y)
        y = nn.relu(norm(y, "bn2"))
        y = norm(point(self.channels, name="project")(y), "bn3")
        if self.stride != 1:
            return y
        if x.shape[-1] != self.channels:
            x = norm(point(self.channels, name="shortcut_conv")(x), "shortcut_bn")
        return x + y


class MobileNet(layers.NormedClassifier):
    """MobileNetV2: 3x3 stem of 32, 17 inverted residual blocks, 1x1 of 1280, global mean, K logits.

    2,296,922 parameters with ten classes. The form for 32x32 images of the distillation papers:
    no stride in the stem and the first two stages, plain ReLU, and a 1x1 convolution in the
    shortcut where channels change. PyTorch's default initialisation. Submodules: conv1, bn1,
    stage{1..7}_block{1..}, conv2, bn2, head. Running statistics: `batch_stats`.

    Attributes:
      width: multiplies all channels, plainly rounded.
      stages: (expansion, channels, blocks, stride of the first block) of each.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, arXiv
    1801.04381, in the form of Goldblum et al., Adversarially robust distillation, arXiv 1905.09747.
    """

    width: float = 1.0
    stages: tuple[tuple[int, int, int, int], ...] = STAGES

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, 1280 * width)), of images x (B, H, W, C).

        With `train`, BatchNorm uses the batch's statistics and updates `batch_stats` (make it
        mutable).

        Raises:
          ValueError: x is not of rank 4 or not floating; an unknown `bn_set`.
        """
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        conv = partial(layers.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(layers.batch_norm, self, train=train, which=bn_set)
        x = conv(layers.scaled(32, self.width), (3, 3), padding=1, name="conv1")(x)
        x = nn.relu(norm(x, "bn1"))
        for stage, (expansion, channels, blocks, stride) in enumerate(self.stages, 1):
            for i in range(blocks):
                x = Block(
                    channels=layers.scaled(channels, self.width),
                    expansion=expansion,
                    stride=stride if i == 0 else 1,
                    **self.norm_fields,
                    name=f"stage{stage}_block{i + 1}",
                )(x, train=train, bn_set=bn_set)
        x = conv(layers.scaled(1280, self.width), (1, 1), name="conv2")(x)
        x = nn.relu(norm(x, "bn2"))
        return layers.classify(x.mean((1, 2)), self.num_classes, features)


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`."""
    if f"layers.{len(_BLOCKS) - 1}.conv3" not in shapes or f"layers.{len(_BLOCKS)}.conv3" in shapes:
        raise ValueError(
            f"no MobileNetV2 with layers conv1, layers.0.conv1 to layers.{len(_BLOCKS) - 1}.conv3; "
            "torchvision's (ReLU6, strides for large images) is another network"
        )
    return {"width": layers.convolutions(shapes)[0][0] / 32}


def make(num_classes: int, **kwargs: Any) -> MobileNet:
    """`MobileNet` for `num_classes` classes; keyword arguments are its attributes."""
    if "stages" in kwargs:  # a config's nested lists
        kwargs["stages"] = tuple(tuple(stage) for stage in kwargs["stages"])
    return layers.build(MobileNet, num_classes, kwargs)
