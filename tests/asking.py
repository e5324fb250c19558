"""Envs and tools for episodes with a scripted model, and what their traces hold."""

import asyncio

import numpy as np

from k25_jax.agents.env import Limits
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import rollout
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.sample import SampleConfig
from scripted import END, TOKENIZER, Scripted, call

GREEDY = SampleConfig(temperature=0.0)
LIMITS = Limits(turn_tokens=200, turns=3)
PAD, END_ID = TOKENIZER.special["<|media_pad|>"], TOKENIZER.special[END]


class Asking:
    """An env with tools, one question, and what follows on answers; `resets` and `closes` are counted."""

    task, mode = "asking", "instant"

    def __init__(self, *tools, question="what is 6*7?", follows=(), group="asking"):
        self.tools, self.group = tools, group
        self._question, self._follows = question, follows
        self.resets = self.closes = 0

    async def reset(self, seed):
        self.resets += 1
        self._left = list(self._follows)
        return [{"role": "user", "content": self._question}]

    async def step(self, said):
        return [{"role": "user", "content": self._left.pop(0)}] if self._left else ()

    def score(self, trace, answer):
        return {"length": min(1.0, len(answer) / 100)}

    async def close(self):
        self.closes += 1


class Does:
    """A tool without arguments that does what `act` does, a function or a coroutine function."""

    description, parameters = "", {"type": "object", "properties": {}}

    def __init__(self, act, name="do"):
        self.name = name
        if asyncio.iscoroutinefunction(act):

            async def call(arguments):
                return await act()
        else:

            def call(arguments):
                return act()

        self.call = call


def run(say, env, limits=LIMITS, seed=0, **options):
    """One episode: (trace, engine)."""
    engine = say if isinstance(say, Scripted) else Scripted(say)
    with AsyncEngine(engine) as running:
        return asyncio.run(rollout(env, EnginePolicy(running, TOKENIZER), GREEDY, limits, seed, **options)), engine


def calling(_=""):
    return call("{}", "do")


def section(*names: str) -> str:
    """A turn with a call of each."""
    head = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    calls = "".join(head.format(name, number) for number, name in enumerate(names))
    return f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>{END}"


def after(text: str, marker: str) -> str:
    return text.rpartition(marker)[2]


def runs_of(trace) -> list[list[int]]:
    """The sampled tokens of each turn."""
    (segment,) = trace.segments or (None,)
    if segment is None:
        return []
    edges = np.flatnonzero(np.diff(segment.sampled, prepend=False, append=False))
    return [segment.tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]
