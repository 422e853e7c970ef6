"""LeNet-5 with ReLU and max-pooling, as the cost-sensitive papers train it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers


class LeNet(layers.Classifier):
    """conv 5x5 (6), pool, conv 5x5 (16), pool, 120-84-K; PyTorch's default initialisation.

    61,706 parameters on 28x28x1 with ten classes, 62,006 on 32x32x3: both reach 5x5x16 before the
    first linear layer. Submodules: conv1, conv2, fc1, fc2, head.

    Attributes:
      width: multiplies 6, 16, 120 and 84.
      padding: zeros around the image in conv1; None pads images below 32 pixels by 2, others not.

    Further attributes: those of `layers.Classifier`.

    Reference: LeCun et al., Gradient-based learning applied to document recognition (1998), as
    changed in Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372.
    """

    width: float = 1.0
    padding: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, 84 * width)), of images x (B, H, W, C).

        Raises:
          ValueError: x is not of rank 4, not floating, or smaller than 16 pixels after padding.
        """
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        padding = self.padding
        if padding is None:
            padding = 2 if min(x.shape[1:3]) < 32 else 0
        if min(x.shape[1:3]) + 2 * padding < 16:
            raise ValueError(f"LeNet needs 16x16 pixels after padding, got {x.shape} + {padding}")
        for i, (channels, pad) in enumerate(((6, padding), (16, 0)), 1):
            x = layers.Conv(
                layers.scaled(channels, self.width),
                (5, 5),
                padding=pad,
                bias_init=layers.bias_init(25 * x.shape[-1]),
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = layers.max_pool2(nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84), 1):
            width = layers.scaled(width, self.width)
            x = layers.dense(width, x.shape[-1], dtype=self.dtype, name=f"fc{i}")(x)
            x = nn.relu(x)
        return layers.classify(x, self.num_classes, features)


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`.

    4x4 pixels before the first linear layer are those of 28x28 images without padding.
    """
    convolutions = layers.convolutions(shapes)
    unpadded = any(len(s) == 2 and s[1] == 16 * convolutions[-1][0] for s in shapes.values())
    return {"width": convolutions[0][0] / 6, **({"padding": 0} if unpadded else {})}


def make(num_classes: int, **kwargs: Any) -> LeNet:
    """`LeNet` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(LeNet, num_classes, kwargs)
