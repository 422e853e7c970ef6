"""ResNet for small images: a 3x3 stem and no pooling before the blocks."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers

# depth -> (block, blocks per stage)
DEPTHS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
}

STEMS = {"cifar": (3, 1), "imagenet": (7, 2)}  # kernel and stride of the first convolution

# PyTorch's names of the layers, in torchvision, pytorch-cifar and RobustBench; see `models.torch`.
TORCH = (
    (r"^layer(\d)\.(\d+)\.", lambda m: f"stage{m[1]}_block{int(m[2]) + 1}/"),
    (r"(shortcut|downsample)\.0$", "shortcut_conv"),
    (r"(shortcut|downsample)\.1$", "shortcut_bn"),
    (r"^(fc|linear)$", "head"),
)


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
      stem: "cifar" is a 3x3 convolution, "imagenet" a 7x7 one with stride 2 and a 3x3 maximum with
        stride 2, as in the paper.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: He et al., Deep residual learning for image recognition, arXiv 1512.03385, by default
    in the form for 32x32 images that the robustness literature uses.
    """

    depth: int = 18
    width: int = 64
    stem: str = "cifar"

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, D)), of images x (B, H, W, C).

        D is 8 * width, at depth 50 four times that. With `train`, BatchNorm uses the batch's
        statistics and updates `batch_stats` (make it mutable).

        Raises:
          ValueError: x is not of rank 4 or not floating; an unknown depth, stem or `bn_set`.
        """
        if self.depth not in DEPTHS:
            raise ValueError(f"unknown depth {self.depth}; allowed: {', '.join(map(str, DEPTHS))}")
        if self.stem not in STEMS:
            raise ValueError(f"unknown stem {self.stem!r}; allowed: {', '.join(STEMS)}")
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        size, stride = STEMS[self.stem]
        x = layers.Conv(
            self.width,
            (size, size),
            stride,
            padding=size // 2,
            use_bias=False,
            dtype=self.dtype,
            name="conv1",
        )(x)
        x = nn.relu(layers.batch_norm(self, x, "bn1", train=train, which=bn_set))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
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


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`."""
    blocks: tuple[int, ...] = tuple(
        sum(f"layer{s}.{i}.conv1" in shapes for i in range(len(shapes))) for s in range(1, 5)
    )
    kind = "bottleneck" if "layer1.0.conv3" in shapes else "basic"
    known = {plan: depth for depth, plan in DEPTHS.items()}
    if (kind, blocks) not in known or "conv1" not in shapes:
        raise ValueError(
            f"no ResNet-18, -34 or -50 with layers conv1, layer1.0.conv1, ...: {kind} blocks per "
            f"stage {blocks}"
        )
    width, _, side, _ = shapes["conv1"]
    stem = "imagenet" if side == 7 else "cifar"
    return {"depth": known[kind, blocks], "width": width, "stem": stem}


def make(num_classes: int, **kwargs: Any) -> ResNet:
    """`ResNet` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(ResNet, num_classes, kwargs)
