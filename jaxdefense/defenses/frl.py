"""FRL: TRADES whose classes weigh more, or get a larger ball, while they err more than the mean."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base
from jaxdefense.types import Array, Images, Key, PerExample, PyTree, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    beta: float = 6.0,
    reweight: bool = True,
    remargin: bool = True,
    natural_slack: float = 0.05,
    boundary_slack: float = 0.05,
    natural_rate: float = 0.05,
    boundary_rate: float = 0.1,
    margin_rate: float = 0.2,
    total_limit: float = 0.8,
    largest_margin: float = 2.0,
    memory: float = 0.99,
    steps: int = 10,
    step_size: float | None = None,
    noise: float = 1e-3,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean w_y CE(f(x), y) + beta v_y KL(f(x) || f(x')), x' in a ball of radius eps exp(m_y).

    With n_k class k's natural error, b_k its boundary error (right on x, wrong on x'), n and b
    their means over the classes, the multipliers follow

        dl_k/dt = natural_rate (n_k - n - natural_slack),  l_k >= 0
        du_k/dt = boundary_rate (b_k - b - boundary_slack),  u_k >= 0
        dm_k/dt = margin_rate (b_k - b - boundary_slack),  0 <= m_k <= log largest_margin

    (t in epochs), and the class weights are those of the Lagrangian: w_k = 1 + K l_k - sum l,
    v_k = 1 + K u_k - sum u.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the set that x' is searched in.
      beta: weight of the KL, as in TRADES.
      reweight: u moves (else v = 1); l always does.
      remargin: m moves (else the radius is eps).
      natural_slack: how far above the mean a class's natural error may lie.
      boundary_slack: how far above the mean its boundary error may lie.
      natural_rate: of l, per epoch.
      boundary_rate: of u, per epoch.
      margin_rate: of m, per epoch.
      total_limit: sum l and sum u are scaled down to at most this, below 1, so that no weight
        becomes negative.
      largest_margin: most that a class's radius grows, as a factor.
      memory: of the running averages of the class errors, per batch, in [0, 1).
      steps: number of steps of the inner maximisation.
      step_size: of those steps, in image units; default eps / 4.
      noise: standard deviation of the Gaussian start, image units.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`; the carry `frl` holds the class errors
      and the multipliers.

    Raises:
      ValueError: a limit, a margin or a memory outside its range.

    Reference: Xu et al., To be robust or to be fair: towards fairness in adversarial training,
      arXiv 2010.06121. Deviations: the class errors are running averages over the training
      batches, not a validation pass after each epoch, and the multipliers move after every
      batch; a radius never shrinks below eps. Slacks, rates and limits are recalled from the
      authors' code or our choice: options, not facts.
    """
    for name, value in (("total_limit", total_limit), ("memory", memory)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not 1 <= largest_margin < float("inf"):
        raise ValueError(f"largest_margin must be at least 1 and finite, got {largest_margin}")
    net = base.Net(model)
    classes = model.num_classes
    top = jnp.log(jnp.float32(largest_margin))

    def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        params, carry = net.init(key, images)
        state = {
            "epoch": jnp.float32(0),
            "errors": jnp.zeros((2, classes)),  # natural, boundary
            "multipliers": jnp.zeros((3, classes)),  # l, u, m
        }
        return params, {**carry, "frl": state}

    def growth(carry: base.Carry, batch: base.Batch) -> PerExample:
        return jnp.exp(carry["frl"]["multipliers"][2])[batch["label"]]

    craft = base.objective_craft(
        base.kl_objective(net),
        threat,
        steps=steps,
        step_size=step_size,
        noise=noise,
        ramp_epochs=ramp_epochs,
        growth=growth,
    )

    def weights(multipliers: Array) -> Array:
        return 1 + classes * multipliers - jnp.sum(multipliers)

    def follow(state: PyTree, batch: base.Batch, wrong: PerExample, crossed: PerExample) -> PyTree:
        hot = jax.nn.one_hot(batch["label"], classes)
        sums = jnp.stack([jnp.ones_like(wrong), wrong, crossed]) @ hot
        sums = jax.lax.pmean(sums, base.AXIS)  # of the whole batch, not of one device
        count, past = sums[:1], state["errors"]
        now = sums[1:] / jnp.maximum(count, 1e-6)
        seen = batch["step"].astype(jnp.float32)
        kept = jnp.minimum(memory, (1 + seen) / (10 + seen))  # the first batches count more
        errors = jnp.where(count > 0, kept * past + (1 - kept) * now, past)
        slack = jnp.array([[natural_slack], [boundary_slack]])
        gap = (errors - jnp.mean(errors, 1, keepdims=True) - slack)[jnp.array([0, 1, 1])]
        rate = jnp.array([natural_rate, boundary_rate * reweight, margin_rate * remargin])
        moved = state["multipliers"] + (batch["epoch"] - state["epoch"]) * rate[:, None] * gap
        moved = jnp.maximum(moved, 0)
        total = jnp.sum(moved[:2], 1, keepdims=True)
        limited = moved[:2] * jnp.minimum(1, total_limit / jnp.maximum(total, 1e-6))
        margins = jnp.minimum(moved[2:], top)
        multipliers = jnp.concatenate([limited, margins])
        return {"epoch": batch["epoch"], "errors": errors, "multipliers": multipliers}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        labels, state = batch["label"], carry["frl"]
        clean, moved, carry = net.train_on_both(params, carry, batch)
        natural = losses.cross_entropy(clean, base.targets(batch, clean))
        robust = losses.kl(clean, moved)
        natural_weight, robust_weight = (weights(m)[labels] for m in state["multipliers"][:2])
        right = jnp.argmax(clean, -1) == labels
        crossed = right & (jnp.argmax(moved, -1) != labels)
        state = follow(state, batch, (~right).astype(jnp.float32), crossed.astype(jnp.float32))
        metrics = {
            **base.accuracies(clean, moved, labels),
            "largest_natural_error": (jnp.max(state["errors"][0]), jnp.float32(1)),
            "largest_boundary_error": (jnp.max(state["errors"][1]), jnp.float32(1)),
        }
        value = jnp.mean(natural_weight * natural + beta * robust_weight * robust)
        return value, ({**carry, "frl": state}, metrics)

    update = base.Update(loss, (net.role,), craft)
    return base.Defense(init, (base.Phase("train", (update,)),), {net.role: net.predict})
