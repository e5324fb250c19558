"""Pictures by program: does a model solve tasks with the tool `ipython`, and does it look at the pictures at all? (K2.5 §3.4)

Three conditions. `shown`: the pictures are in the prompt and in the sandbox. `hidden`: in the sandbox only, as zero-vision
SFT has them. `blank`: shown, but white in both places; whoever still answers right has guessed.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from k25_jax.agents.demonstrations import MODE
from k25_jax.agents.loop import Episode, play
from k25_jax.agents.pictures import Pictures
from k25_jax.agents.tools import declaration
from k25_jax.data.tasks import make_task
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.prompt import MediaReader
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.kernel import Limits
from k25_jax.sandbox.sandbox import Sandbox
from k25_jax.text.conversation import Conversation
from k25_jax.text.tokenizer import Tokenizer

CONDITIONS = ("shown", "hidden", "blank")
TURNS = 4
SECONDS = 5.0  # of a call


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


class Asker:
    """Asks a model in an engine, `width` questions at once, each with a sandbox of its own. Close it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, width: int = 8, max_tokens: int = 256):
        end = tokenizer.special["<|im_end|>"]
        self._engine, self._tokenizer = engine, tokenizer
        self._sampling = SampleConfig(max_tokens=max_tokens, temperature=0.0, stop_ids=(end, *engine.config.eos_ids))
        self._reader = MediaReader(engine.config)
        self._sandboxes: list[Sandbox] = []
        try:
            for _ in range(width):
                self._sandboxes.append(Sandbox(Limits()))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the sandboxes."""
        for sandbox in self._sandboxes:
            sandbox.close()

    def ask(
        self, spec: str, questions: int, condition: str = "shown", on_progress: Callable[[int], None] | None = None
    ) -> list[Outcome]:
        """Evenly spaced questions of a task with programs, answered greedily."""
        task = make_task(spec)
        indices = np.unique(np.linspace(0, len(task) - 1, min(questions, len(task))).astype(int)).tolist()
        outcomes = []
        for part in _parts(indices, len(self._sandboxes)):
            episodes = [self._begin(task, i, condition, box) for i, box in zip(part, self._sandboxes, strict=False)]
            play(self._engine, episodes, self._sampling, TURNS)
            outcomes += [_outcome(spec, task, i, condition, e) for i, e in zip(part, episodes, strict=True)]
            if on_progress:
                on_progress(len(part))
        return outcomes

    def _begin(self, task, index: int, condition: str, sandbox: Sandbox) -> Episode:
        pictures = list(task.media(index))
        if condition == "blank":
            pictures = [np.full_like(picture, 255) for picture in pictures]
        parts = [{"type": "image", "image": picture} for picture in pictures] if condition != "hidden" else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": task.question(index)}]}
        return begin(self._tokenizer, self._reader, sandbox, pictures, [message])


def begin(tokenizer: Tokenizer, reader: MediaReader, sandbox: Sandbox, pictures, messages: Sequence[dict]) -> Episode:
    """An episode of an instant mode with the tool `ipython` and these pictures in it, up to the model's first turn."""
    tool = Pictures(sandbox, SECONDS)
    tool.lay_out(pictures)
    conversation = Conversation(tokenizer, [declaration(tool)], MODE, reader.load)
    for message in messages:
        conversation.add(message)
    return Episode(conversation, [tool])


def _parts(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _outcome(spec: str, task, index: int, condition: str, episode: Episode) -> Outcome:
    ran = any(observation.status == "ok" for observation in episode.observations)
    score, gold = task.score(episode.answer, index), task.answer(index)
    turns, sampled = len(episode.said), episode.sampled
    return Outcome(spec, index, condition, episode.answer, gold, score, ran, turns, sampled, episode.ending)
