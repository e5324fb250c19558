"""Pictures by program: does a model solve tasks with the tool `ipython`, and does it look at the pictures at all? (K2.5 §3.4)

Questions of tasks with programs under each of `agents.tasks.CONDITIONS`: shown, hidden, blank.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from k25_jax.agents.env import Limits
from k25_jax.agents.pictures import Sandboxes
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import play
from k25_jax.agents.tasks import SECONDS, TURNS, TaskEnv
from k25_jax.agents.trace import Trace
from k25_jax.data.tasks import Task, make_task
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.sample import SampleConfig
from k25_jax.text.tokenizer import Tokenizer

CALL_SECONDS = 600.0  # for a sandbox that does not keep its own deadline


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One question: the answer and its score, whether a call ran without an error, and how the episode ended."""

    spec: str
    index: int
    condition: str
    answer: str
    gold: str
    score: float
    ran: bool
    turns: int
    sampled: int
    ending: str


def limits_of(turn_tokens: int, context: int | None = None) -> Limits:
    """Of a question with the tool: TURNS turns, the last of which must be the answer; whatever the clock says."""
    return Limits(
        tokens=TURNS * turn_tokens,
        turn_tokens=turn_tokens,
        turns=TURNS,
        call_seconds=CALL_SECONDS,
        seconds=math.inf,
        context=context,
    )


class Asker:
    """Asks a model in an engine, `width` questions at once, each with a sandbox of its own. Close it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, width: int = 8, max_tokens: int = 256):
        self._engine, self._tokenizer, self._width = engine, tokenizer, width
        self._limits, self._sandboxes = limits_of(max_tokens), Sandboxes()

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the sandboxes."""
        self._sandboxes.close()

    def ask(
        self, spec: str, questions: int, condition: str = "shown", on_progress: Callable[[int], None] | None = None
    ) -> list[Outcome]:
        """Evenly spaced questions of a task with programs, answered greedily."""
        task, outcomes = make_task(spec), {}
        indices = np.unique(np.linspace(0, len(task) - 1, min(questions, len(task))).astype(int)).tolist()
        envs = [TaskEnv(task, index, condition, self._sandboxes.lend, SECONDS) for index in indices]
        with AsyncEngine(self._engine) as engine:
            policy = EnginePolicy(engine, self._tokenizer)
            greedy, episodes = SampleConfig(temperature=0.0), zip(envs, indices, strict=True)
            with contextlib.closing(play(episodes, policy, greedy, self._limits, self._width)) as ended:
                for place, trace in ended:
                    outcomes[place] = _outcome(spec, task, indices[place], condition, envs[place], trace)
                    if on_progress:
                        on_progress(1)
        return [outcomes[place] for place in range(len(indices))]


def _outcome(spec: str, task: Task, index: int, condition: str, env: TaskEnv, trace: Trace) -> Outcome:
    turns = sum(segment.turns for segment in trace.segments)
    score = trace.rewards.get("outcome", 0.0)
    gold = task.answer(index)
    return Outcome(spec, index, condition, trace.answer, gold, score, env.ran, turns, trace.length, trace.ending)
