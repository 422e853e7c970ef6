"""Wide residual networks: the large networks, and teachers, of the robustness literature."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxdefense.models import layers
from jaxdefense.models.preact_resnet import Block

# Normal of variance 2 / fan_out, which the reference codes draw convolutions from.
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


# PyTorch's names of the layers, in TRADES and RobustBench; see `models.torch`. TRADES' code makes
# a sub_block1 that it never calls.
TORCH = (
    (r"^sub_block1\..*", ""),
    (r"^block(\d)\.layer\.(\d+)\.", lambda m: f"stage{m[1]}_block{int(m[2]) + 1}/"),
    (r"convShortcut$", "shortcut_conv"),
    (r"^bn1$", "bn"),
    (r"^fc$", "head"),
)


class WideResNet(layers.NormedClassifier):
    """3x3 stem of 16, three stages of pre-activation blocks (strides 1, 2, 2), BatchNorm, K logits.

    WRN-28-10 has 36,479,194 parameters with ten classes, WRN-34-10 46,160,474. The stages have
    16, 32 and 64 times `width` channels and (depth - 4) / 6 blocks each. No dropout, as in
    adversarial training. Submodules: conv1, stage{1..3}_block{1..}, bn, head. Running statistics:
    `batch_stats`.

    Attributes:
      depth: 6 n + 4.
      width: the widening factor.

    Further attributes: those of `layers.NormedClassifier`.

    Reference: Zagoruyko and Komodakis, Wide residual networks, arXiv 1605.07146. The head has
    PyTorch's default initialisation, its bias too, which the reference codes set to 0.
    """

    depth: int = 28
    width: int = 10

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, features: bool = False, bn_set: int = 0
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits (B, K), or (logits, features (B, 64 * width)), of images x (B, H, W, C).

        With `train`, BatchNorm uses the batch's statistics and updates `batch_stats` (make it
        mutable).

        Raises:
          ValueError: x is not of rank 4 or not floating; an unknown depth or `bn_set`.
        """
        blocks, rest = divmod(self.depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 34, ...), got {self.depth}")
        x = layers.normalise(x, self.mean, self.std, self.dtype)
        x = layers.Conv(
            16,
            (3, 3),
            padding=1,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=kernel_init,
            name="conv1",
        )(x)
        for stage in range(3):
            for i in range(blocks):
                x = Block(
                    channels=16 * self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    **self.norm_fields,
                    kernel_init=kernel_init,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x, train=train, bn_set=bn_set)
        x = nn.relu(layers.batch_norm(self, x, "bn", train=train, which=bn_set))
        return layers.classify(x.mean((1, 2)), self.num_classes, features)


def torch_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that the shapes of PyTorch's weights tell, see `models.torch`."""
    blocks = sum(f"block1.layer.{i}.conv1" in shapes for i in range(len(shapes)))
    if not blocks:
        raise ValueError("no WideResNet with layers block1.layer.0.conv1, ...")
    return {"depth": 6 * blocks + 4, "width": shapes["block1.layer.0.conv1"][0] // 16}


def make(num_classes: int, **kwargs: Any) -> WideResNet:
    """`WideResNet` for `num_classes` classes; keyword arguments are its attributes."""
    return layers.build(WideResNet, num_classes, kwargs)
