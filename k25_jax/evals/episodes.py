"""A checkpoint with the tool `ipython` as an answerer: each question is an episode, its pictures shown and in the sandbox.

For tasks of the category tool_use (K2.5 §3.4, §4.4). `evals.tool_use` compares with pictures that are hidden or blank.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator

from k25_jax.agents.pictures import Sandboxes
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import play
from k25_jax.agents.tasks import SECONDS, TURNS, QuestionEnv
from k25_jax.agents.trace import Trace
from k25_jax.config import ConfigError
from k25_jax.evals.local import Checkpoint
from k25_jax.evals.protocol import Answer, Answerer, Request
from k25_jax.evals.tool_use import limits_of
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.sandbox import Sandbox

TURN_TOKENS = 256  # of one turn of the model
FINISH = {"answer": "stop", "context": "overflow", "infrastructure": "error", "cancelled": "error"}  # else: length
SEEDS = "turns"  # each turn draws from a seed of its own; part of the identity


class Player:
    """Plays `width` episodes at once, each with a sandbox of its own; `max_tokens` are those of a turn. Close it.

    The model has TURNS turns, the last of which must be its answer. Pictures are those of the messages, as arrays.
    """

    def __init__(self, checkpoint: Checkpoint, width: int = 8):
        self.identity = {**checkpoint.identity, "tool": "ipython", "turns": TURNS, "seconds": SECONDS, "seeds": SEEDS}
        self._checkpoint, self._width, self._sandboxes = checkpoint, width, Sandboxes()

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the sandboxes."""
        self._sandboxes.close()

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """See `Answerer`; all requests have the same settings."""
        engine, tokenizer = self._checkpoint.open()
        requests = iter(requests)
        if (first := next(requests, None)) is None:
            return
        settings = first.settings
        sampling = SampleConfig(temperature=settings.temperature, top_p=settings.top_p)
        limits = limits_of(settings.max_tokens, settings.context)
        episodes = map(self._episode, itertools.count(), itertools.chain([first], requests))
        with AsyncEngine(engine) as running:
            policy = EnginePolicy(running, tokenizer)
            with contextlib.closing(play(episodes, policy, sampling, limits, self._width)) as ended:
                for number, trace in ended:
                    yield number, _answer(trace)

    def _episode(self, number: int, request: Request) -> tuple[QuestionEnv, int]:
        env = QuestionEnv("question", str(number), lambda: request.messages, lend=self._sandboxes.lend)
        return env, request.seed


def _answer(trace: Trace) -> Answer:
    finish = FINISH.get(trace.ending, "length")
    return Answer(trace.answer, trace.length, finish, error=trace.problem if finish == "error" else "")


def why_not(answerer: Answerer) -> str:
    """Why `answerer` cannot be asked here with the tool; "" when it can."""
    if not isinstance(answerer, Checkpoint):
        return "its questions are played with a tool in a sandbox, by a checkpoint: a server is only asked"
    try:
        with Sandbox() as sandbox:
            sandbox.run("1")
    except SandboxError as problem:
        return f"no sandbox can be had: {problem}"
    return ""


def check_playable(answerer: Answerer, specs: Iterable[str]) -> None:
    """Raise ConfigError when there are tasks to play and they cannot be."""
    played = list(specs)
    if played and (problem := why_not(answerer)):
        raise ConfigError(f"{', '.join(played)}: {problem}")
