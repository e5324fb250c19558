"""Problems that a model works on with tools, turn by turn, and what it may spend on one (K2.5 §3.5)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from k25_jax.agents.tools import Tool
from k25_jax.agents.trace import Trace
from k25_jax.text.tool_calls import Said


class Env(Protocol):
    """One problem. The driver (agents/rollout.py) samples the turns and makes their calls with `tools`.

    An env serves one episode at a time; `reset` begins the next, and may change `tools`. InfrastructureError is for what
    the model cannot help.
    """

    task: str  # the name that rewards and reports group by
    group: str  # of samples of this problem
    tools: Sequence[Tool]
    mode: str  # of the chat template: thinking | instant | plain

    async def reset(self, seed: int) -> Sequence[Mapping]:
        """The messages that the model is given first, pictures as arrays in them."""

    async def step(self, said: Said) -> Sequence[Mapping]:
        """The messages that follow on a turn without a call; none when the episode is over with it."""

    def score(self, trace: Trace, answer: str) -> Mapping[str, float]:
        """Rewards by name, each in [0, 1]; `answer` is what the model answered, "" when it did not. In a thread."""

    async def close(self) -> None:
        """Give back what the episode holds; called once after each `reset`, however that and the episode ended."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one episode may take; they act inside it, and each ends it with an ending of its own (agents/trace.py)."""

    tokens: int = 4096  # sampled by the agent in all its turns
    turn_tokens: int = 1024  # sampled in one turn: the max_tokens of each request
    turns: int = 8  # of which the last must be the answer
    calls: int = 32  # of tools, in all turns, malformed ones too
    call_seconds: float = 60.0  # of one call; what takes longer is an observation
    seconds: float = 600.0  # of the whole episode
    context: int | None = None  # tokens of a segment; None: what the policy takes
    depth: int = 1  # of agents below this one
    agents: int = 16  # ever made by it

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("calls", "depth", "agents") else 1e-9
            if value is not None and value < least:
                raise ValueError(
                    f"limits.{field.name}={value} must {'not be negative' if not least else 'be positive'}"
                )
