"""The loss of reinforcement learning: the policy loss over packed answers, text and vision (K2.5 §3.5).

A batch has beside its rows what each sampled token was drawn with and what its answer was worth (data/packing.py); a token
is sampled where its weight is above 0. Parts, pipeline, experts and the encoder are those of train/pretrain.py.
"""

import functools

import jax.numpy as jnp

from k25_jax.config import ConfigError, Experiment
from k25_jax.losses.lm import vocabulary_scores
from k25_jax.losses.policy import policy_loss, token_weights, totals
from k25_jax.train.accumulate import whole_rows
from k25_jax.train.pretrain import batch_loss, over_parts, part_loss


def loss_fn(params, batch, experiment: Experiment):
    """(loss, (metrics, what the forward pass observed)), as that of train/pretrain.py; raises ConfigError."""
    if batch.old_logprobs_BL is None or batch.advantages_BL is None:
        raise ConfigError("stage='rl' needs sampled answers, not data.sources: batches of data.packing.pack_samples")
    weights_BL = token_weights(batch.loss_weights_BL > 0, batch.segments_BL, experiment.rl.loss)
    batch = batch.replace(loss_weights_BL=weights_BL)
    return batch_loss(params, batch, experiment, functools.partial(part_loss, final=policy), totals(weights_BL))


def policy(x_BLD, head_DV, part, whole, experiment: Experiment):
    """What `pretrain.next_token` returns, of the policy loss."""
    normaliser_BL, target_BL, _, entropy_BL = vocabulary_scores(x_BLD, head_DV, part.targets_BL, entropy=True)
    given_BL = part.old_logprobs_BL, part.advantages_BL, part.loss_weights_BL
    return policy_loss(target_BL - normaliser_BL, *given_BL, experiment.rl, whole, entropy_BL)


def logprobs(params, batch, experiment: Experiment):
    """log p(target) at every place, [B,L] in the rows of `batch`, by the form that is trained; without gradients."""
    function = functools.partial(part_loss, final=_target_logprobs)
    _, (found, _) = over_parts(params, batch, experiment, function, None)
    return found if experiment.train.accumulate == 1 else whole_rows(found)


def _target_logprobs(x_BLD, head_DV, part, whole, experiment: Experiment):
    normaliser_BL, target_BL, _ = vocabulary_scores(x_BLD, head_DV, part.targets_BL)
    return jnp.zeros(()), target_BL - normaliser_BL
