"""Cost-sensitive robustness by a margin cost: the rival of CSA."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    protect: int | Sequence[int] = 0,
    cost: float = 1.0,
    others: float = 0.0,
    columns: bool = False,
    alpha: float = 1.0,
    steps: int = 10,
    step_size: float | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean CE(f(x), y) + alpha sum_k mean_{y=k} log(1 + sum_j C[k, j] exp(z_j(x') - z_k(x'))).

    x' raises the same margin cost by PGD on the eval-mode network. With every cost 1 it is the
    cross-entropy at x', each class weighing the same.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the set that x' is searched in.
      protect: the class, or classes, whose images must not be taken for another ("seeds").
      cost: of such an error.
      others: of every other error; 0 leaves it to the clean cross-entropy.
      columns: the cost is also of taking another class's image for a protected one.
      alpha: weight of the margin cost.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: a class outside [0, K), a negative cost or alpha.

    Reference: Zhang, Evans, Cost-sensitive robustness against adversarial examples,
      arXiv 1810.09225. Deviation: the paper's margins are certified upper bounds over the ball
      (Wong and Kolter's dual network); these are what PGD finds, lower bounds that certify
      nothing.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be finite and not negative, got {alpha}")
    net = base.Net(model)
    classes = model.num_classes
    matrix = losses.cost_matrix(classes, protect, cost, others=others, columns=columns)

    craft = base.pgd_craft(
        net,
        threat,
        steps=steps,
        step_size=step_size,
        loss=lambda logits, labels: losses.margin_cost(logits, labels, matrix),
        ramp_epochs=ramp_epochs,
    )

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        clean, moved, carry = net.train_on_both(params, carry, batch)
        natural = losses.cross_entropy(clean, base.targets(batch, clean))
        margin = losses.margin_cost(moved, batch["label"], matrix)
        # The classes' means are the whole batch's, not each device's.
        count = jnp.sum(jax.nn.one_hot(batch["label"], classes), 0)
        count = jax.lax.pmean(count, base.AXIS)[batch["label"]]
        metrics = {
            **base.accuracies(clean, moved, batch["label"]),
            "margin_cost": base.mean_metric(margin),
        }
        return jnp.mean(natural) + alpha * jnp.sum(margin / count), (carry, metrics)

    return base.single_phase(net, loss, craft=craft)
