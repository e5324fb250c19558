"""Learning rate over steps: warm-up, constant, cosine decay (WSD)."""

import jax.numpy as jnp

from k25_jax.config import OptimConfig


def warmup_stable_decay(config: OptimConfig, steps: int):
    """step -> rate. Linear warm-up to peak_lr, constant, then a cosine to end_lr over the last `decay_steps`."""
    start_decay = steps - config.decay_steps

    def rate(step):
        warm = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        progress = jnp.clip((step - start_decay) / max(config.decay_steps, 1), 0.0, 1.0)
        share = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if config.decay_steps else 1.0
        return warm * (config.end_lr + (config.peak_lr - config.end_lr) * share)

    return rate
