"""Next-token cross-entropy (K2.5 §3.3)."""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BLV, targets_BL, weights_BL):
    """Weighted mean of -log p(target), and metrics: loss, accuracy, target_weight (the sum of the weights).

    Places of weight 0 never count, whatever their logits.
    """
    log_normaliser_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    counted_BL = weights_BL > 0
    nll_BL = jnp.where(counted_BL, log_normaliser_BL - target_BL, 0.0)
    tokens = weights_BL.sum()
    loss = (nll_BL * weights_BL).sum() / jnp.maximum(tokens, 1.0)
    right_BL = (logits_BLV.argmax(axis=-1) == targets_BL) & counted_BL
    accuracy = right_BL.sum() / jnp.maximum(counted_BL.sum(), 1)
    return loss, {"loss": loss, "accuracy": accuracy, "target_weight": tokens}
