"""The policy losses of reinforcement learning, token by token (K2.5 §3.5).

K2.5's: minimise -(1/N) Σ m ρ A + (τ/N) Σ (log ρ)², where ρ is the ratio of the policy to the one that sampled, A the reward
of the answer less the mean of its group, and m = [log ρ lies between the bounds], a constant: outside of them a token has no
policy gradient, whatever the sign of A. PPO would keep the half that leads back. τ's term is of all tokens, so that those
outside are drawn back all the same. N counts all sampled tokens of the whole batch, also clipped ones and those with A = 0.

The paper gives no numbers. Bounds are ratios of 0.5 and 5, those of IcePop; τ = 1e-3. "ppo" and "grpo" are for comparison,
and differ in nothing else: both have PPO's clip, "grpo" takes the mean of each answer first and then that of the answers.
Dividing the advantages by their standard deviation, also GRPO's, is left to whoever makes them.
"""

import math

import jax
import jax.numpy as jnp

from k25_jax.config import RLConfig

LARGE = 1e-3  # a log-ratio beyond it is counted: in float32 sampler and learner agree to 1e-5


@jax.named_scope("loss.policy")
def policy_loss(logprobs_BL, old_BL, advantages_BL, weights_BL, config: RLConfig, whole=None, entropy_BL=None):
    """(loss, metrics) of the sampled tokens, those whose weight (`token_weights`) is above 0; in the dtype of logprobs_BL.

    What the others hold, NaN and infinity too, changes no bit of loss and gradient. `whole` is what `totals` says of a batch
    of which these rows are a part. Loss and metrics are shares, those of all parts add up, but of those that end in "_max"
    the largest is that of the batch. `mismatch` is the mean of |log ρ|, which on the first update of a batch tells the
    learner from the sampler; `mismatch_large` is the share of tokens beyond LARGE.
    """
    total, tokens = totals(weights_BL) if whole is None else whole
    sampled_BL, low, high = weights_BL > 0, math.log(config.clip_low), math.log(config.clip_high)
    log_ratio_BL = jnp.where(sampled_BL, logprobs_BL - old_BL, 0)
    advantages_BL = jnp.where(sampled_BL, advantages_BL, 0)
    form = masked if config.loss == "k25" else clipped
    policy_BL = form(log_ratio_BL, advantages_BL, low, high)
    share = lambda a_BL: jnp.where(sampled_BL, a_BL, 0).sum() / jnp.maximum(tokens, 1)  # noqa: E731
    loss = ((config.tau * log_ratio_BL**2 - policy_BL) * weights_BL).sum() / jnp.maximum(total, 1)
    seen_BL, entropy_BL = jax.lax.stop_gradient((log_ratio_BL, entropy_BL))
    metrics = {
        "loss": loss,
        "mismatch": share(jnp.abs(seen_BL)),
        "mismatch_large": share(jnp.abs(seen_BL) > LARGE),
        "mismatch_max": jnp.abs(seen_BL).max(),
        "ratio": share(jnp.exp(seen_BL)),
        "ratio_max": jnp.where(sampled_BL, jnp.exp(seen_BL), 0).max(),
        "clipped_low": share(seen_BL <= low),
        "clipped_high": share(seen_BL >= high),
        "sampled_tokens": sampled_BL.sum(),
    }
    return loss, metrics if entropy_BL is None else metrics | {"entropy": share(entropy_BL)}


def masked(log_ratio_BL, advantages_BL, low: float, high: float):
    """K2.5's policy term, ρ A where log ρ lies between the bounds, else 0."""
    inside_BL = (low < log_ratio_BL) & (log_ratio_BL < high)
    return jnp.where(inside_BL, jnp.exp(jnp.where(inside_BL, log_ratio_BL, 0)) * advantages_BL, 0)


def clipped(log_ratio_BL, advantages_BL, low: float, high: float):
    """PPO's policy term, the smaller of ρ A and clip(ρ) A: 0 has its gradient where ρ has gone too far in A's direction."""
    gone_BL = jnp.where(advantages_BL > 0, log_ratio_BL > high, (log_ratio_BL < low) | (advantages_BL == 0))
    bound_BL = jnp.where(advantages_BL > 0, math.exp(high), math.exp(low))
    ratio_BL = jnp.where(gone_BL, bound_BL, jnp.exp(jnp.where(gone_BL, 0, log_ratio_BL)))
    return ratio_BL * advantages_BL


# ------------------------------------------------------------------------------------------------------- weights of tokens
def token_weights(sampled_BL, segments_BL, loss: str):
    """What each token weighs: 1 if it was sampled; under "grpo" one over how many were in its answer, float32.

    `segments_BL` numbers the answers of a row from 1 on, 0 is padding.
    """
    if loss != "grpo":
        return sampled_BL.astype(jnp.float32)

    def of_row(sampled_L, segments_L):
        counts_S = jax.ops.segment_sum(sampled_L.astype(jnp.float32), segments_L, num_segments=len(segments_L) + 1)
        return sampled_L / jnp.maximum(counts_S[segments_L], 1)

    return jax.vmap(of_row)(sampled_BL, segments_BL)


def totals(weights_BL):
    """What the means over a batch divide by: the sum of its weights, and how many tokens were sampled."""
    return weights_BL.sum(), (weights_BL > 0).sum()


# ------------------------------------------------------------------------------------------------- sampler against learner
def mismatch_weights(trainer_BL, engine_BL, sampled_BL, how: str, low: float = 0.5, high: float = 5.0):
    """(weights [B,L], metrics) of the policy term where the learner's forward pass is not that of the sampler.

    A token was drawn from what the engine computed. The trainer's form at the same weights gives it another probability, in
    bfloat16 by 1 % on average. If π_old is the trainer's, importance sampling asks for the factor trainer/engine, a constant;
    it is unbounded, so "truncate" takes at most `high` (truncated importance sampling), "mask" takes 0 unless it lies between
    `low` and `high` (IcePop's), "none" takes 1. Multiply the advantages by it: τ's term and N stay those of all tokens.
    """
    gap_BL = jnp.where(sampled_BL, trainer_BL - engine_BL, 0)
    ratio_BL = jnp.exp(jnp.minimum(gap_BL, math.log(high) + 1))  # beyond the bound it does not matter how far
    weights_BL = {
        "none": jnp.ones_like(ratio_BL),
        "truncate": jnp.minimum(ratio_BL, high),
        "mask": jnp.where((low < ratio_BL) & (ratio_BL < high), ratio_BL, 0),
    }[how]
    tokens = jnp.maximum(sampled_BL.sum(), 1)
    metrics = {
        "engine_mismatch": jnp.abs(gap_BL).sum() / tokens,
        "engine_mismatch_large": (jnp.abs(gap_BL) > LARGE).sum() / tokens,
        "engine_mismatch_max": jnp.abs(gap_BL).max(),
        "engine_corrected": ((ratio_BL <= low) | (ratio_BL >= high)).sum() / tokens,
    }
    return weights_BL, metrics
