"""Traces and groups made by hand."""

import dataclasses
import math

import numpy as np

from k25_jax.agents.trace import Segment, Trace
from k25_jax.rl.advantages import Group


def segment(prompt: int = 3, sampled: int = 4, seed: int = 0, **fields) -> Segment:
    """`prompt` tokens that were given and `sampled` that were drawn."""
    rng, length = np.random.default_rng(seed), prompt + sampled
    mask = np.arange(length) >= prompt
    return Segment(
        rng.integers(1, 40, length).astype(np.int32),
        mask,
        np.where(mask, -rng.random(length), np.nan).astype(np.float32),
        np.where(mask, 0, -1).astype(np.int32),
        **fields,
    )


def trace(reward: float | None = 1.0, length: int = 4, ending: str = "answer", seed: int = 0, **fields) -> Trace:
    """One of `length` sampled tokens; a reward of None is infrastructure's."""
    rewards, ending = ({}, "infrastructure") if reward is None else ({"outcome": reward}, ending)
    whole = dict(id=f"t{seed}", group="g", task="sums", seed=seed, rewards=rewards, ending=ending)
    return Trace(**({**whole, "segments": (segment(3, length, seed),)} | fields))


def group(rewards, lengths=None, budget: float = math.inf, **fields) -> Group:
    """A group of traces with these rewards."""
    lengths = lengths or [4] * len(rewards)
    traces = [trace(r, n, seed=i) for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))]
    return dataclasses.replace(Group("p", "sums", "reasoning", budget, traces), **fields)
