"""Reinforcement learning: what is asked, how it is sampled, which loss moves the policy (K2.5 §3.5, §3.6)."""

from dataclasses import dataclass, field

from k25_jax.config.checks import ConfigError, one_of, require_positive

ABILITIES = ("knowledge", "reasoning", "coding", "agentic")


@dataclass(frozen=True)
class ProblemsConfig:
    """Problems of one task (data/tasks), by the ability that they train, whatever they show (K2.5 §3.5)."""

    path: str = ""  # the task, as "digits:train"
    ability: str = "reasoning"  # knowledge | reasoning | coding | agentic: rewards are reported by it
    records: int = 64  # of the task, from `first` on, before those fall out that are too easy or too hard
    first: int = 0
    tool: str = ""  # ipython, in a sandbox; none: direct answers
    mode: str = ""  # thinking | instant | plain: how an answer begins; none: plain, with a tool as its demonstrations

    def __post_init__(self):
        one_of(self, "ability", ABILITIES)
        one_of(self, "tool", ("", "ipython"))
        one_of(self, "mode", ("", "thinking", "instant", "plain"))
        require_positive(self, ["records"])
        if not self.path or self.first < 0:
            raise ConfigError(f"rl.problems: path={self.path!r} must name a task, first={self.first} not be negative")


@dataclass(frozen=True)
class EpisodeConfig:
    """What one episode may take; each field is that of agents/env.py: Limits."""

    tokens: int = 4096
    turn_tokens: int = 1024
    turns: int = 8
    calls: int = 32
    call_seconds: float = 60.0
    seconds: float = 600.0
    context: int = 0  # tokens of a trace's segment, which is a document in a row; 0: data.seq_len

    def __post_init__(self):
        require_positive(self, "tokens turn_tokens turns call_seconds seconds".split())
        if self.calls < 0 or self.context < 0:
            raise ConfigError(f"rl.episode: calls={self.calls} and context={self.context} must not be negative")


@dataclass(frozen=True)
class ToggleConfig:
    """Which answers count although they are long (rl/toggle.py; K2.5 §3.6). The paper gives no numbers."""

    arm: str = "none"  # none | toggle | rigid (always within the problem's budget) | constant (always within `budget`)
    percentile: float = 25.0  # rho: of the lengths of a problem's correct answers, which is its budget
    solved: float = 0.8  # lambda: below this mean reward of its group an answer may take any length
    updates: int = 5  # m: of a phase, before the other one begins
    budget: int = 0  # tokens, of the arm constant

    def __post_init__(self):
        one_of(self, "arm", ("none", "toggle", "rigid", "constant"))
        require_positive(self, ["updates"])
        if not 0 < self.percentile <= 100 or not 0 <= self.solved <= 1:
            raise ConfigError(
                f"rl.toggle: percentile={self.percentile} must lie in (0, 100], solved={self.solved} in [0, 1]"
            )
        if (self.arm == "constant") != (self.budget > 0):
            raise ConfigError(
                f"rl.toggle.budget={self.budget} tokens are those of rl.toggle.arm='constant', which needs some; "
                f"the arm is {self.arm!r}"
            )


@dataclass(frozen=True)
class RLConfig:
    """The stage rl: problems, groups of samples, rewards, updates, and the policy loss (losses/policy.py).

    The paper gives no numbers; the bounds of the ratio are those of IcePop.
    """

    problems: tuple[ProblemsConfig, ...] = ()
    groups: int = 8  # problems of a batch
    samples: int = 8  # of a problem: K
    updates_per_batch: int = 2  # with one the policy never leaves the bounds of the ratio
    min_groups: int = 1  # of unequal rewards; an update of fewer is skipped: MuonClip would make a whole step of noise
    attempts: int = 2  # at a group, before it is dropped for having fewer than two valid traces
    rewards: tuple[tuple[str, float], ...] = (("outcome", 1.0),)  # (component, its weight); r is their weighted sum
    correct: float = 0.5  # the reward from which an answer counts as correct, in pass rates and budgets
    estimate: int = 8  # samples of each problem by the start model, for the filter and Toggle's budgets; 0: neither
    pass_low: float = 0.1  # problems that the start model passes less often are left out
    pass_high: float = 0.9  # or more often
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    toggle: ToggleConfig = field(default_factory=ToggleConfig)
    rows: int = 32  # answers that the engine works on at once
    latents: str = "keep"  # of answers under way when weights change: keep | recompute | drain (sampling/engine.py)
    old_logprobs: str = "engine"  # of the policy that sampled: engine | trainer, whose form computes them anew
    correction: str = "mask"  # of advantages where trainer and engine differ: none | truncate | mask (losses/policy.py)
    temperature: float = 1.0
    top_p: float = 1.0
    loss: str = "k25"  # k25 | grpo | ppo; the last two for comparison only
    clip_low: float = 0.5  # of the ratio of the policy to the one that sampled
    clip_high: float = 5.0
    tau: float = 1e-3  # weight of the squared log-ratio, of all sampled tokens

    def __post_init__(self):
        one_of(self, "loss", ("k25", "grpo", "ppo"))
        one_of(self, "latents", ("keep", "recompute", "drain"))
        one_of(self, "old_logprobs", ("engine", "trainer"))
        one_of(self, "correction", ("none", "truncate", "mask"))
        require_positive(self, "groups updates_per_batch attempts rows correct".split())
        if not 0 < self.clip_low < 1 < self.clip_high:
            raise ConfigError(
                f"rl.clip_low={self.clip_low} and rl.clip_high={self.clip_high} are ratios: 0 < clip_low < 1 < clip_high"
            )
        if self.tau < 0:
            raise ConfigError(f"rl.tau={self.tau} must not be negative; 0 leaves the term out")
        self._check_sampling()

    def _check_sampling(self):
        for name in ("temperature", "top_p"):
            if getattr(self, name) != 1.0:
                raise ConfigError(
                    f"rl.{name}={getattr(self, name)}: the loss is that of the policy itself, which only tokens drawn at "
                    f"temperature 1 and top_p 1 follow; set rl.{name}=1.0"
                )
        if self.samples < 2:
            raise ConfigError(f"rl.samples={self.samples}: a group's baseline is its mean; take at least 2")
        if not 1 <= self.min_groups <= self.groups:
            raise ConfigError(f"rl.min_groups={self.min_groups} must lie between 1 and rl.groups={self.groups}")
        if not 0 <= self.pass_low <= self.pass_high <= 1:
            raise ConfigError(
                f"rl.pass_low={self.pass_low} and rl.pass_high={self.pass_high} are shares: 0 <= pass_low <= pass_high <= 1"
            )
        if self.estimate < 0 or (not self.estimate and self.toggle.arm in ("toggle", "rigid")):
            raise ConfigError(
                f"rl.estimate={self.estimate}: the budgets of rl.toggle.arm={self.toggle.arm!r} are of the start model's "
                "correct answers; set rl.estimate to the samples of each problem, as 8"
            )
        names = [name for name, _ in self.rewards]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"rl.rewards={self.rewards} must name at least one component, and each once")


def check_rl(experiment) -> None:
    """Raise ConfigError where the other sections of an experiment do not go with the stage rl."""
    rl, data, moe, optim = experiment.rl, experiment.data, experiment.model.text.moe, experiment.optim
    if not rl.problems:
        raise ConfigError("rl.problems is empty; name at least one task, as dict(path='digits:train')")
    outside = "would move the policy outside the loss"
    context = rl.episode.context or data.seq_len
    held = data.batch_size * (data.seq_len // context)
    wanted = rl.groups * rl.samples
    checks = (
        (moe.bias_rate == 0, f"model.text.moe.bias_rate={moe.bias_rate} {outside}; set it to 0.0"),
        (optim.weight_decay == 0, f"optim.weight_decay={optim.weight_decay} {outside}; set it to 0.0"),
        (not data.sources, "data.sources: the data of stage='rl' are rollouts of rl.problems; leave the sources out"),
        (not (data.text_tokens or data.vision_tokens), "data.text_tokens and data.vision_tokens do not bound rollouts; "
         "set them to 0, and train.steps to the updates that you want"),
        (data.lanes in (0, 1), f"data.lanes={data.lanes}: rollouts are one lane; set it to 0"),
        (not experiment.train.eval_every, f"train.eval_every={experiment.train.eval_every}: stage='rl' has no loss on "
         "held-out data; set it to 0, and use k25 eval on the run"),
        (context <= data.seq_len, f"rl.episode.context={context} exceeds data.seq_len={data.seq_len}: a trace is never "
         "cut; lower it"),
        (held >= wanted, f"data.batch_size={data.batch_size} rows of data.seq_len={data.seq_len} hold {held} traces of up "
         f"to {context} tokens (rl.episode.context), and rl.groups x rl.samples are {wanted}; raise data.batch_size to "
         f"{-(-wanted // max(data.seq_len // context, 1))}, or lower one of them"),
    )  # fmt: skip
    for holds, problem in checks:
        if not holds:
            raise ConfigError(problem)
