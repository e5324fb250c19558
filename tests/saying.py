"""An engine behind the server that says what a test wants, and ends answers by the engine's own rule."""

from k25_jax.sampling.async_engine import Stream
from k25_jax.sampling.requests import FinishEvent, Request, TokenEvent
from k25_jax.sampling.sequences import Sequence
from k25_jax.text.stops import StopTexts
from k25_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()


def drawn(request: Request, said: str, sample: int = 0) -> list:
    """The events of one sample for a model that says this."""
    stops = StopTexts(TOKENIZER, request.stop, request.form) if request.stop else None
    sequence, events = Sequence(0, sample, 0, request, [], stops, list(request.tokens)), []
    for token in TOKENIZER.encode(said, allow_special=True):
        reason, by = sequence.accept(token, -0.5)
        events.append(TokenEvent(0, sample, token, -0.5, 0))
        if reason:
            return [*events, FinishEvent(0, sample, reason, by)]
    return [*events, FinishEvent(0, sample, "length")]


class SayingEngine:
    """As `AsyncEngine`; `said` is the next answer, `requests` are those so far."""

    def __init__(self, said: str = "hello<|im_end|>"):
        self.said, self.requests = said, []

    def submit(self, request: Request, on_event) -> Stream:
        """Say it, as often as is asked."""
        self.requests.append(request)
        for sample in range(request.n):
            for event in drawn(request, self.said, sample):
                on_event(event)
        return Stream(request.n, 1, on_event)

    def abort(self, stream: Stream) -> bool:
        """There is nothing to abort."""
        return False

    def stats(self) -> dict[str, int]:
        """Only what the server asks for."""
        return {"version": 0, "running": 0, "waiting": 0}
