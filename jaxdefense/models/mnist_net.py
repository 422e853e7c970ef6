"""The larger convolutional network of the MNIST robustness literature."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers


class MNISTNet(layers.NormedClassifier):
    """Two 5x5 convolutions (32, 64), a 2x2 maximum after each, a linear layer of 1024, K logits.

    3,274,634 parameters on 28x28x1 with ten classes. Works from 4x4 pixels up. Submodules: conv1,
    conv2, fc1, head.

    The published network has no BatchNorm. With `bn` one follows each of the three layers (in
    place of their biases: bn1, bn2, bn3), so that a method with several BatchNorm sets has
    something to keep apart: 3,275,754 parameters with one set.

    Attributes:
      width: channels of the first convolution; the second has twice, fc1 32 times as many.
      bn: whether there is BatchNorm; not in the published network.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: Madry et al., Towards deep learning models resistant to adversarial attacks,
    arXiv 1706.06083 (their MNIST network).
    """

    width: int = 32
    bn: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, 32 * width)), of images x (B, H, W, C).

        Raises:
          ValueError: x is not of rank 4, not floating, or smaller than 4x4; an unknown `bn_set`.
        """
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        if min(x.shape[1:3]) < 4:
            raise ValueError(f"MNISTNet needs at least 4x4 pixels, got images {x.shape}")
        if not self.bn and (bn_set or self.bn_sets != 1):
            raise ValueError(f"bn_set {bn_set} of {self.bn_sets} in a network without BatchNorm")

        def norm(x: jax.Array, name: str) -> jax.Array:
            if not self.bn:
                return x
            return layers.batch_norm(self, x, name, train=train, which=bn_set)

        for i in (1, 2):
            x = layers.Conv(
                i * self.width,
                (5, 5),
                padding=2,
                use_bias=not self.bn,
                bias_init=layers.bias_init(25 * x.shape[-1]),
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = layers.max_pool2(nn.relu(norm(x, f"bn{i}")))
        x = x.reshape(x.shape[0], -1)
        linear = layers.dense(
            32 * self.width, x.shape[-1], use_bias=not self.bn, dtype=self.dtype, name="fc1"
        )
        x = nn.relu(norm(linear(x), "bn3"))
        return layers.classify(x, self.num_classes, features)


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`."""
    bn = any(len(shape) == 1 for shape in shapes.values())
    return {"width": layers.convolutions(shapes)[0][0], "bn": bn}


def make(num_classes: int, **kwargs: Any) -> MNISTNet:
    """`MNISTNet` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(MNISTNet, num_classes, kwargs)
