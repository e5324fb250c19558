"""Reinforcement learning: which loss moves the policy, and its bounds (K2.5 §3.5)."""

from dataclasses import dataclass

from k25_jax.config.checks import ConfigError, one_of


@dataclass(frozen=True)
class RLConfig:
    """The policy loss (losses/policy.py). The paper gives no numbers; the bounds are those of IcePop."""

    loss: str = "k25"  # k25 | grpo | ppo; the last two for comparison only
    clip_low: float = 0.5  # of the ratio of the policy to the one that sampled
    clip_high: float = 5.0
    tau: float = 1e-3  # weight of the squared log-ratio, of all sampled tokens

    def __post_init__(self):
        one_of(self, "loss", ("k25", "grpo", "ppo"))
        if not 0 < self.clip_low < 1 < self.clip_high:
            raise ConfigError(
                f"rl.clip_low={self.clip_low} and rl.clip_high={self.clip_high} are ratios: 0 < clip_low < 1 < clip_high"
            )
        if self.tau < 0:
            raise ConfigError(f"rl.tau={self.tau} must not be negative; 0 leaves the term out")
