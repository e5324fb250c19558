"""What meets in an evaluation (K2.5 §4): a `TaskSet` has questions, an `Answerer` answers requests.

`evals.core.evaluate` brings them together.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from k25_jax.config import ConfigError


class AnswererError(RuntimeError):
    """One who cannot answer any more; the message says who, why, and what to do."""


@dataclass(frozen=True)
class Settings:
    """How questions are asked: `k` samples of each. The context counts prompt and completion, in tokens (K2.5 §4).

    `score_cut`: an answer that was cut at `max_tokens` is scored as it stands, where it would be a failure.
    """

    k: int = 1
    temperature: float = 1.0
    top_p: float = 0.95
    context: int = 262144
    max_tokens: int = 98304
    seed: int = 0
    score_cut: bool = False

    def __post_init__(self):
        if min(self.k, self.context, self.max_tokens) < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"k={self.k}, context={self.context} and max_tokens={self.max_tokens} must be at least 1, "
                f"temperature={self.temperature} at least 0, top_p={self.top_p} in (0, 1]"
            )
        if self.temperature == 0 and self.k > 1:
            raise ConfigError(f"k={self.k} samples at temperature 0 are all the same; set k=1 or a temperature")


@dataclass(frozen=True)
class Request:
    """One conversation to answer; `messages` as `text.chat.render` takes them."""

    messages: list[dict]
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Answer:
    """What came back: the text after any reasoning, and all generated tokens (None: nobody said how many).

    `finish` is stop; length, cut at max_tokens; overflow, the context was full; error, none came in spite of `retries`
    and `error` says why; or a word of the server's own.
    """

    text: str
    tokens: int | None
    finish: str = "stop"
    retries: int = 0
    error: str = ""


class Answerer(Protocol):
    """Answers requests. `identity` says who answers, so that results of two models are never mixed."""

    identity: Mapping

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """(place of the request, answer) as each is finished, in any order. Requests are read as they are needed."""


class TaskSet(Protocol):
    """Questions with a score. `seed` is that of one sample: it chooses the order of options, where there are any."""

    name: str
    category: str

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """A hash of what is asked: other data or other wording give another."""

    def prompt(self, index: int, seed: int) -> list[dict]:
        """The messages."""

    def gold(self, index: int, seed: int) -> str:
        """The right answer to that prompt, as a model would write it."""

    def group(self, index: int) -> str:
        """The part of the task set that the question belongs to; "" for none."""

    def score(self, text: str, index: int, seed: int) -> float:
        """In [0, 1]."""

    def guessing(self, indices: Sequence[int]) -> float:
        """The mean score of one who has not read the questions."""


@dataclass(frozen=True)
class Result:
    """One sample: its question's index, what was answered, and what would have been right.

    `score` is 0 for what ran into a limit; with `finish="error"` there was no answer, and the score says nothing.
    """

    index: int
    answer: str
    gold: str
    score: float
    sample: int = 0
    tokens: int | None = None
    finish: str = "stop"
    retries: int = 0
    error: str = ""


def sample_seed(seed: int, index: int, sample: int) -> int:
    """The seed of one sample, in [0, 2**31): it depends on no other question, nor on how many there are."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {sample}".encode()).digest()[:4]) >> 1


def digest_of(*parts) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
