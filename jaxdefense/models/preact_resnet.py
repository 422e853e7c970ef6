"""ResNet-18 with BatchNorm and ReLU before the convolutions."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers

# PyTorch's names of the layers, in pytorch-cifar and RobustBench; see `models.torch`.
TORCH = (
    (r"^layer(\d)\.(\d+)\.", lambda m: f"stage{m[1]}_block{int(m[2]) + 1}/"),
    (r"shortcut\.0$", "shortcut_conv"),
    (r"^(fc|linear)$", "head"),
)


class Block(layers.NormedBlock):
    """shortcut + conv(relu(bn(conv(relu(bn(x)))))).

    The shortcut is x itself, or a 1x1 convolution of relu(bn(x)) where the shape changes.

    Attributes:
      channels: of both convolutions.
      stride: of the first convolution and of the shortcut.
      kernel_init: of the convolutions.

    Further attributes: those of `layers.NormedBlock`.
    """

    channels: int
    stride: int
    kernel_init: nn.initializers.Initializer = layers.kernel_init

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, bn_set: int) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        conv = partial(
            layers.Conv,
            self.channels,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
        )
        norm = partial(layers.batch_norm, self, train=train, which=bn_set)
        y = nn.relu(norm(x, "bn1"))
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = conv((1, 1), self.stride, padding=0, name="shortcut_conv")(y)
        y = conv((3, 3), self.stride, padding=1, name="conv1")(y)
        y = nn.relu(norm(y, "bn2"))
        return x + conv((3, 3), padding=1, name="conv2")(y)


class PreActResNet(layers.NormedClassifier):
    """3x3 stem, four stages of two blocks (strides 1, 2, 2, 2), global mean, K logits.

    11,172,170 parameters with ten classes, 11,171,146 without the final BatchNorm. PyTorch's
    default initialisation. Submodules: conv1, stage{1..4}_block{1,2}, bn (if final_norm), head.
    Running statistics: `batch_stats`.

    Attributes:
      width: channels of the first stage; doubled at each next one.
      final_norm: BatchNorm and ReLU before the mean, as Rice et al. do; the network of most other
        codebases has neither.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: He et al., Identity mappings in deep residual networks, arXiv 1603.05027; Rice et
    al., Overfitting in adversarially robust deep learning, arXiv 2002.11569.
    """

    width: int = 64
    final_norm: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, 8 * width)), of images x (B, H, W, C).

        With `train`, BatchNorm uses the batch's statistics and updates `batch_stats` (make it
        mutable).

        Raises:
          ValueError: x is not of rank 4 or not floating; an unknown `bn_set`.
        """
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        x = layers.Conv(
            self.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="conv1"
        )(x)
        for stage in range(4):
            for i in range(2):
                x = Block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    **self.norm_fields,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x, train=train, bn_set=bn_set)
        if self.final_norm:
            x = nn.relu(layers.batch_norm(self, x, "bn", train=train, which=bn_set))
        return layers.classify(x.mean((1, 2)), self.num_classes, features)


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`."""
    return {"width": layers.convolutions(shapes)[0][0], "final_norm": "bn" in shapes}


def make(num_classes: int, **kwargs: Any) -> PreActResNet:
    """`PreActResNet` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(PreActResNet, num_classes, kwargs)
