"""A checkpoint with the tool `ipython` as an answerer: each question is an episode, its pictures shown and in the sandbox.

For tasks of the category tool_use (K2.5 §3.4, §4.4). `evals.tool_use` compares with pictures that are hidden or blank.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator

from k25_jax.agents.loop import Episode, play
from k25_jax.config import ConfigError
from k25_jax.evals.local import Checkpoint
from k25_jax.evals.protocol import Answer, Answerer, Request
from k25_jax.evals.tool_use import SECONDS, TURNS, begin
from k25_jax.sampling.prompt import MediaReader
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.sandbox import Sandbox

TURN_TOKENS = 256  # of one turn of the model
FINISH = {"answer": "stop", "turns": "length", "length": "length", "context": "overflow", "infrastructure": "error"}


class Player:
    """Plays `width` episodes at once, each with a sandbox of its own; `max_tokens` are those of a turn. Close it.

    The model has TURNS turns, the last of which must be its answer. Pictures are those of the messages, as arrays.
    """

    def __init__(self, checkpoint: Checkpoint, width: int = 8):
        self.identity = {**checkpoint.identity, "tool": "ipython", "turns": TURNS, "seconds": SECONDS}
        self._checkpoint, self._width = checkpoint, width
        self._stack, self._sandboxes = contextlib.ExitStack(), []

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the sandboxes."""
        self._stack.close()

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
        """See `Answerer`."""
        engine, tokenizer = self._checkpoint.open()
        ends, reader = (tokenizer.special["<|im_end|>"], *engine.config.eos_ids), MediaReader(engine.config)
        numbered = enumerate(requests)
        while part := list(itertools.islice(numbered, self._width)):
            while len(self._sandboxes) < len(part):
                self._sandboxes.append(self._stack.enter_context(Sandbox()))
            asked, settings = [request for _, request in part], part[0][1].settings
            episodes = [
                begin(tokenizer, reader, box, _pictures(request), request.messages)
                for request, box in zip(asked, self._sandboxes, strict=False)
            ]
            how = SampleConfig(settings.max_tokens, settings.temperature, settings.top_p, stop_ids=ends)
            play(engine, episodes, how, TURNS, [request.seed for request in asked], settings.context)
            yield from ((number, _answer(e)) for (number, _), e in zip(part, episodes, strict=True))


def _pictures(request: Request) -> list:
    return [part["image"] for message in request.messages for part in message["content"] if "image" in part]


def _answer(episode: Episode) -> Answer:
    return Answer(episode.answer, episode.sampled, FINISH[episode.ending], error=episode.problem)


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
