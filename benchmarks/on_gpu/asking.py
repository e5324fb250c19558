"""Requests of mixed lengths, and how the engine is asked them: one comes when another ends."""

import numpy as np

from k25_jax.sampling.requests import Request
from k25_jax.sampling.sample import SampleConfig


def draw(config, args, at_once: int, turn: int) -> list[tuple[list[int], int]]:
    """(prompt, tokens to answer with) of each request; the lengths are those of every turn.

    `args` has the longest `prompt` and `answer`, both from 16 tokens on, and `waves`: so many requests for each at once.
    """
    lengths = np.random.default_rng(at_once)
    words = np.random.default_rng([at_once, turn])
    vocabulary = [i for i in range(min(config.text.vocab_size, 256)) if i != config.media_pad_id]
    return [
        (
            words.choice(vocabulary, lengths.integers(16, args.prompt + 1)).tolist(),
            int(lengths.integers(16, args.answer + 1)),
        )
        for _ in range(args.waves * at_once)
    ]


def ask_engine(engine, asked, at_once: int) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each answer; greedy. The engine gets a new request when one ends."""
    answers, open_, queue = {}, set(), list(reversed(asked))
    while queue or engine.busy:
        while queue and len(open_) < at_once:
            prompt, count = queue.pop()
            number = engine.submit(Request(prompt, (), SampleConfig(count, 0.0)))
            answers[number] = []
            open_.add(number)
        for event in engine.step():
            if hasattr(event, "token"):
                answers[event.request].append((event.token, event.logprob))
            else:
                open_.discard(event.request)
    return [answers[number] for number in sorted(answers)]
