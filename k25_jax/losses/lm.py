"""Next-token cross-entropy (K2.5 §3.3), the scores of the vocabulary made a chunk at a time."""

import functools

import jax
import jax.numpy as jnp

CHUNK = 8192  # columns of the head at a time: in float32, 32 kB of scores a token
LOWEST = -1e30  # finite, so that differences of two of them are


@jax.named_scope("loss")
def cross_entropy(x_BLD, head_DV, targets_BL, weights_BL, whole=None, chunk: int = CHUNK):
    """Weighted mean of -log p(target), and metrics: loss, accuracy, target_weight (the sum of the weights).

    Places of weight 0 never count, whatever their scores. Scores of [B, L, V] are never held, unless `chunk` >= V. With
    `whole`, the sum of the weights and the number of places that count in a batch of which these rows are a part, all are
    shares: those of all parts add up.
    """
    total, places = (weights_BL.sum(), (weights_BL > 0).sum()) if whole is None else whole
    log_normaliser_BL, target_BL, best_BL = vocabulary_scores(x_BLD, head_DV, targets_BL, chunk)
    counted_BL = weights_BL > 0
    nll_BL = jnp.where(counted_BL, log_normaliser_BL - target_BL, 0.0)
    loss = (nll_BL * weights_BL).sum() / jnp.maximum(total, 1.0)
    right_BL = (best_BL == targets_BL) & counted_BL
    accuracy = right_BL.sum() / jnp.maximum(places, 1)
    return loss, {"loss": loss, "accuracy": accuracy, "target_weight": weights_BL.sum()}


def vocabulary_scores(x_BLD, head_DV, targets_BL, chunk: int = CHUNK, entropy: bool = False):
    """(log of the normaliser, score of the target, token of the highest score), each [B, L]; scores are float32.

    With `entropy` that of the distribution comes fourth, in nats; it has no gradient. The head is read in the dtype of x.
    The backward pass makes each chunk of scores again, unless there is only one, and adds up both gradients in float32.
    """
    out = _scores(min(chunk, head_DV.shape[1]), str(head_DV.dtype), entropy, x_BLD, head_DV, targets_BL)
    return out if entropy else out[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scores(chunk, dtype, entropy, x_BLD, head_DV, targets_BL):
    return _forward(chunk, dtype, entropy, x_BLD, head_DV, targets_BL)[0]


def _forward(chunk, dtype, entropy, x_BLD, head_DV, targets_BL):
    head_DV = head_DV.astype(x_BLD.dtype)

    def one(carry, piece):
        largest_BL, sum_BL, target_BL, best_BL, spread_BL = carry
        first, head_DC = piece
        scores_BLC = _of_chunk(x_BLD, head_DC, first, head_DV.shape[1])
        here_BL = scores_BLC.max(axis=-1)
        best_BL = jnp.where(here_BL > largest_BL, first + scores_BLC.argmax(axis=-1), best_BL)
        new_BL = jnp.maximum(largest_BL, here_BL)
        if entropy:  # the mean of the scores, less the largest, before it is divided by the sum
            below_BLC, fallen_BL = scores_BLC - new_BL[..., None], largest_BL - new_BL
            spread_BL = jnp.exp(fallen_BL) * (spread_BL + sum_BL * fallen_BL)
            spread_BL += (jnp.exp(below_BLC) * below_BLC).sum(axis=-1)
        sum_BL = sum_BL * jnp.exp(largest_BL - new_BL) + jnp.exp(scores_BLC - new_BL[..., None]).sum(axis=-1)
        column_BL = jnp.clip(targets_BL - first, 0, chunk - 1)
        at_BL = jnp.take_along_axis(scores_BLC, column_BL[..., None], axis=-1)[..., 0]
        target_BL = jnp.where(targets_BL - first == column_BL, at_BL, target_BL)
        return (new_BL, sum_BL, target_BL, best_BL, spread_BL), scores_BLC if chunk == head_DV.shape[1] else None

    zeros_BL = jnp.zeros(targets_BL.shape, jnp.float32)
    carry = zeros_BL + LOWEST, zeros_BL, zeros_BL, jnp.zeros_like(targets_BL), zeros_BL if entropy else None
    (largest_BL, sum_BL, target_BL, best_BL, spread_BL), kept = _over_chunks(one, carry, head_DV, chunk)
    log_normaliser_BL = largest_BL + jnp.log(sum_BL)
    entropy_BL = jnp.log(sum_BL) - spread_BL / sum_BL if entropy else None
    return (log_normaliser_BL, target_BL, best_BL, entropy_BL), (x_BLD, head_DV, targets_BL, log_normaliser_BL, kept)


def _backward(chunk, dtype, entropy, saved, gradients):
    x_BLD, head_DV, targets_BL, log_normaliser_BL, kept = saved
    dnormaliser_BL1, dtarget_BL1 = (a[..., None] for a in gradients[:2])

    def one(dx_BLD, piece):
        first, head_DC = piece
        scores_BLC = _of_chunk(x_BLD, head_DC, first, head_DV.shape[1]) if kept is None else kept
        is_target_BLC = first + jnp.arange(chunk) == targets_BL[..., None]
        dscores_BLC = dnormaliser_BL1 * jnp.exp(scores_BLC - log_normaliser_BL[..., None])
        dscores_BLC = (dscores_BLC + jnp.where(is_target_BLC, dtarget_BL1, 0.0)).astype(x_BLD.dtype)
        dx_BLD += jnp.einsum("blc,dc->bld", dscores_BLC, head_DC, preferred_element_type=jnp.float32)
        return dx_BLD, jnp.einsum("bld,blc->dc", x_BLD, dscores_BLC, preferred_element_type=jnp.float32)

    dx_BLD, dpieces = _over_chunks(one, jnp.zeros(x_BLD.shape, jnp.float32), head_DV, chunk)
    if chunk < head_DV.shape[1]:
        dpieces = dpieces.swapaxes(0, 1).reshape(len(head_DV), -1)[:, : head_DV.shape[1]]
    return dx_BLD.astype(x_BLD.dtype), dpieces.astype(dtype), None


_scores.defvjp(_forward, _backward)


def _of_chunk(x_BLD, head_DC, first, vocab: int):
    """Scores of a chunk in float32; LOWEST beyond the vocabulary."""
    scores_BLC = jnp.dot(x_BLD, head_DC, preferred_element_type=jnp.float32)
    return jnp.where(first + jnp.arange(head_DC.shape[1]) < vocab, scores_BLC, LOWEST)


def _over_chunks(one, carry, head_DV, chunk: int):
    """`one(carry, (first column, head_DC))` for each chunk; a single one stands in the program as it is."""
    if chunk == head_DV.shape[1]:
        return one(carry, (0, head_DV))
    head_DV = jnp.pad(head_DV, ((0, 0), (0, -head_DV.shape[1] % chunk)))
    pieces_QDC = head_DV.reshape(len(head_DV), -1, chunk).swapaxes(0, 1)
    return jax.lax.scan(one, carry, (jnp.arange(len(pieces_QDC)) * chunk, pieces_QDC))
