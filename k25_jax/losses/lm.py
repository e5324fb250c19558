"""Next-token cross-entropy (K2.5 §3.3), the scores of the vocabulary made a chunk at a time."""

import jax
import jax.numpy as jnp

CHUNK = 8192  # columns of the head at a time: in float32, 32 kB of scores a token
LOWEST = -1e30  # finite, so that differences of two of them are


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


def vocabulary_scores(x_BLD, head_DV, targets_BL, chunk: int = CHUNK):
    """(log of the normaliser, score of the target, token of the highest score), each [B, L]; scores are float32.

    The backward pass makes each chunk of scores again.
    """
    vocab = head_DV.shape[1]
    chunk = min(chunk, vocab)

    def one(carry, piece):
        largest_BL, sum_BL, target_BL, best_BL = carry
        first, head_DC = piece
        scores_BLC = jnp.dot(x_BLD, head_DC, preferred_element_type=jnp.float32)
        if vocab % chunk:
            scores_BLC = jnp.where(first + jnp.arange(chunk) < vocab, scores_BLC, LOWEST)
        here_BL = jax.lax.stop_gradient(scores_BLC.max(axis=-1))
        best_BL = jnp.where(here_BL > largest_BL, first + scores_BLC.argmax(axis=-1), best_BL)
        new_BL = jnp.maximum(largest_BL, here_BL)
        sum_BL = sum_BL * jnp.exp(largest_BL - new_BL) + jnp.exp(scores_BLC - new_BL[..., None]).sum(axis=-1)
        column_BL = jnp.clip(targets_BL - first, 0, chunk - 1)
        at_BL = jnp.take_along_axis(scores_BLC, column_BL[..., None], axis=-1)[..., 0]
        target_BL = jnp.where(targets_BL - first == column_BL, at_BL, target_BL)
        return (new_BL, sum_BL, target_BL, best_BL), None

    zeros_BL = jnp.zeros(targets_BL.shape, jnp.float32)
    carry = zeros_BL + LOWEST, zeros_BL, zeros_BL, jnp.zeros_like(targets_BL)
    if chunk == vocab:
        carry, _ = one(carry, (0, head_DV))
    else:
        head_DV = jnp.pad(head_DV, ((0, 0), (0, -vocab % chunk)))
        pieces_QDC = head_DV.reshape(len(head_DV), -1, chunk).swapaxes(0, 1)
        carry, _ = jax.lax.scan(jax.checkpoint(one), carry, (jnp.arange(len(pieces_QDC)) * chunk, pieces_QDC))
    largest_BL, sum_BL, target_BL, best_BL = carry
    return largest_BL + jnp.log(sum_BL), target_BL, best_BL
