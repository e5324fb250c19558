"""A model that says what a test wants, as an engine: what is under test is all around it."""

import numpy as np

from k25_jax.config import preset
from k25_jax.sampling.requests import Completion, EngineConfig, FinishEvent, Overloaded, Request, TokenEvent
from k25_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
END = "<|im_end|>"


def call(code_json: str, name: str = "ipython", number: int = 0) -> str:
    """A turn with one call."""
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{code_json}"
        f"<|tool_call_end|><|tool_calls_section_end|>{END}"
    )


class Scripted:
    """`say(prompt)` gives the text of a turn from the text before it; for `AsyncEngine`, as `Engine`.

    A step gives each answer `pace` tokens. Log-probabilities follow from seed and place. `requests` are all so far, `given`
    is what the last request with each seed was given.
    """

    def __init__(self, say, max_length: int = 4096, queue: int = 256, pace: int = 64, version: int = 0):
        self.config, self.settings, self.sees = preset("tiny"), EngineConfig(queue=queue), True
        self.max_length, self.version = max_length, version
        self.requests: list[Request] = []
        self.given: dict[int, Completion] = {}
        self._say, self._pace, self._open, self._events = say, pace, {}, []

    def submit(self, request: Request) -> int:
        """As `Engine.submit`, one sample each."""
        if len(self._open) >= self.settings.queue:
            raise Overloaded("the queue is full")
        said = self._say(TOKENIZER.decode(list(request.tokens)))
        tokens = TOKENIZER.encode(said, allow_special=True)[: request.sampling.max_tokens]
        ends = [place for place, token in enumerate(tokens) if token in request.sampling.stop_ids]
        tokens, number = tokens[: ends[0] + 1] if ends else tokens, len(self.requests)
        self.requests.append(request)
        self.given[request.sampling.seed] = Completion()
        self._open[number] = [*tokens[::-1]], 0, "stop" if ends else "length"
        return number

    def step(self) -> list:
        """As `Engine.step`."""
        events, self._events = self._events, []
        for number, (left, place, reason) in list(self._open.items()):
            seed = self.requests[number].sampling.seed
            for _ in range(min(self._pace, len(left))):
                logprob = -float(np.float32((seed * 31 + place * 17) % 1009) / np.float32(997))
                events.append(TokenEvent(number, 0, left.pop(), logprob, self.version))
                self.given[seed].add(events[-1])
                place += 1
            self._open[number] = left, place, reason
            if not left:
                del self._open[number]
                events.append(FinishEvent(number, 0, reason))
        return events

    def abort(self, number: int) -> bool:
        """As `Engine.abort`."""
        if number in self._open:
            del self._open[number]
            self._events.append(FinishEvent(number, 0, "abort"))
            return True
        return False

    @property
    def busy(self) -> bool:
        """As `Engine.busy`."""
        return bool(self._open or self._events)

    def stats(self) -> dict[str, int]:
        """What is under way."""
        return {"version": self.version, "running": len(self._open), "waiting": 0}
