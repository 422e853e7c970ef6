"""The small convolutional network of the MNIST robustness literature."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers


class CNN(layers.Classifier):
    """Two 4x4 convolutions with stride 2 and padding 1 (16, 32), a linear layer of 100, K logits.

    166,406 parameters on 28x28x1 with ten classes. Works from 4x4 pixels up, hence on the 8x8
    digits too. Submodules: conv1, conv2, fc1, head.

    Attributes:
      width: multiplies 16, 32 and 100.

    Further attributes: those of `layers.Classifier`.

    Reference: Wong and Kolter, Provable defenses against adversarial examples via the convex outer
    adversarial polytope, arXiv 1711.00851 (their MNIST network).
    """

    width: float = 1.0

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, 100 * width)), of images x (B, H, W, C).

        Raises:
          ValueError: x is not of rank 4, not floating, or smaller than 4x4 pixels.
        """
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        if min(x.shape[1:3]) < 4:
            raise ValueError(f"CNN needs at least 4x4 pixels, got images {x.shape}")
        for i, channels in enumerate((16, 32), 1):
            x = layers.Conv(
                layers.scaled(channels, self.width),
                (4, 4),
                strides=2,
                padding=1,
                bias_init=layers.bias_init(16 * x.shape[-1]),
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        width = layers.scaled(100, self.width)
        x = nn.relu(layers.dense(width, x.shape[-1], dtype=self.dtype, name="fc1")(x))
        return layers.classify(x, self.num_classes, features)


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`."""
    return {"width": layers.convolutions(shapes)[0][0] / 16}


def make(num_classes: int, **kwargs: Any) -> CNN:
    """`CNN` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(CNN, num_classes, kwargs)
