"""One bit per example: is it classified rightly, clean and under each attack?

Every image that an attack returns is checked again: in the box, in the ball, finite, and really
misclassified by a plain forward pass. Keys are per example (seed, attack, example id), so what is
drawn for an example does not depend on the batch size, the order or the other examples.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdefense.attacks import checks
from jaxdefense.evaluation import records
from jaxdefense.types import Attack, Images, Key, Labels, Logits, PyTree, Threat

Apply = Callable[[PyTree, Images], Logits]  # (variables, images) -> logits, eval mode

# Rounding of x + eps in float32, and of a sum over an image's pixels.
_TOLERANCE = 1e-5


def attack_keys(seed: int, attack: str, ids: Labels) -> Key:
    """One key per example: fold_in(fold_in(seed, attack's name), example id)."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(attack.encode()))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(ids))


def check_batch_independence(apply: Apply, variables: PyTree, images: Images) -> None:
    """What the network says of an image does not depend on the rest of the batch.

    Raises:
      ValueError: it does; BatchNorm is probably in train mode.
    """
    if len(images) < 2:
        return
    whole = np.asarray(jax.jit(apply)(variables, images), np.float32)
    other = np.asarray(jax.jit(apply)(variables, jnp.roll(images, 1, 0).at[0].set(images[0])))
    scale = np.abs(whole).max() + 1e-6
    difference = float(np.abs(other.astype(np.float32)[0] - whole[0]).max() / scale)
    if difference > 1e-2:
        raise ValueError(
            f"the logits of an image change with the rest of its batch (by {difference:.3g} of "
            f"their scale): BatchNorm in train mode? Evaluate with running averages"
        )


class Evaluator:
    """A classifier's compiled clean and adversarial evaluation, for any weights.

    Args:
      apply: (variables, images (B, H, W, C)) -> logits (B, K), eval mode, logits not
        probabilities.
      threat: every attack's images are checked against it.
      batch_size: examples per dispatch; the last batch is padded, none is dropped.
    """

    def __init__(self, apply: Apply, threat: Threat, *, batch_size: int = 500):
        checks.check_count("batch_size", batch_size)
        self.apply, self.threat, self.batch_size = apply, threat, batch_size
        self._compiled: dict[str, Callable] = {}
        self._forward = jax.jit(apply)

    def _attack(self, name: str, attack: Attack) -> Callable:
        """(variables, keys, images, labels) -> (still right, in the set), compiled once."""
        if name not in self._compiled:

            @jax.jit
            def run(variables, keys, images, labels):
                x_adv = attack(lambda x: self.apply(variables, x), keys, images, labels)
                low, high = self.threat.bounds
                inside = jnp.all((x_adv >= low) & (x_adv <= high), range(1, x_adv.ndim))
                far = self.threat.distance(x_adv, images)
                limit = self.threat.eps * (1 + _TOLERANCE) + _TOLERANCE
                # NaN compares false, so it is outside.
                return x_adv, inside & (far <= limit)

            self._compiled[name] = run
        return self._compiled[name]

    def check(self, variables: PyTree, images: np.ndarray, labels: np.ndarray) -> None:
        """The checks that need values, on the first examples.

        Raises:
          ValueError: bad images or labels, probabilities, NaN, or BatchNorm in train mode.
        """
        checks.check_images(images, self.threat.bounds)
        checks.check_eps(self.threat, images)
        first = jnp.asarray(images[: min(len(images), 64)])
        logits = self._forward(variables, first)
        checks.check_logits(logits, len(first))
        checks.check_labels(labels, len(images), logits.shape[-1])
        check_batch_independence(self.apply, variables, first)

    def bits(
        self,
        variables: PyTree,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        attacks: Mapping[str, Attack],
        *,
        seed: int = 0,
        progress: bool = False,
    ) -> dict[str, np.ndarray]:
        """Whether each example is classified rightly: {"clean": (N,) bool, attack: (N,) bool}.

        An example that is wrong without an attack counts as wrong under every attack.

        Args:
          variables: `apply`'s first argument.
          images: (N, H, W, C) floats in the threat's bounds.
          labels: (N,) integers.
          ids: (N,) integers, the examples' names in the random keys.
          attacks: by name; the name is part of the key.
          seed: of the attacks.
          progress: show a bar.

        Raises:
          ValueError: see `check`; or an attack left the threat's set.
        """
        self.check(variables, images, labels)
        n = len(images)
        size = min(self.batch_size, n)
        result = {name: np.zeros(n, bool) for name in ("clean", *attacks)}
        starts = range(0, n, size)
        bar = tqdm(total=len(starts) * len(result), disable=not progress, unit="batch", leave=False)
        for start in starts:
            rows = np.arange(start, min(start + size, n))
            padded = np.pad(rows, (0, size - len(rows)), mode="edge")
            x, y = jnp.asarray(images[padded]), jnp.asarray(labels[padded])
            for name in result:
                bar.set_postfix_str(name)
                if name == "clean":
                    x_adv = x
                else:
                    keys = attack_keys(seed, name, ids[padded])
                    x_adv, valid = self._attack(name, attacks[name])(variables, keys, x, y)
                    if not bool(jnp.all(valid)):
                        bad = ids[padded][~np.asarray(valid)][:5].tolist()
                        raise ValueError(
                            f"attack {name} left the ball or the box of {self.threat}, or "
                            f"returned NaN, for examples {bad}"
                        )
                right = np.asarray(jnp.argmax(self._forward(variables, x_adv), -1) == y)
                result[name][rows] = right[: len(rows)]
                bar.update()
        bar.close()
        for name in attacks:
            result[name] &= result["clean"]
        return result


def summary(bits: Mapping[str, np.ndarray], labels: np.ndarray, num_classes: int) -> dict[str, Any]:
    """What a record keeps of bits, accuracies in percent.

    Returns:
      {name: {"accuracy", "per_class": [K] (None for a class without examples), "n", "bits"}}.
    """

    def percent(right):
        return 100 * float(right.mean()) if len(right) else None

    return {
        name: {
            "accuracy": percent(right),
            "per_class": [percent(right[labels == k]) for k in range(num_classes)],
            "n": len(right),
            "bits": records.pack(right),
        }
        for name, right in bits.items()
    }
