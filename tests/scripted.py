"""A model that says what a test wants, in the place of the engine: what is under test is all around it."""

from k25_jax.config import preset
from k25_jax.sampling.requests import Completion
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
    """`say(prompt)` gives the text of a turn from the text before it."""

    def __init__(self, say, max_length: int = 4096):
        self.config = preset("tiny")
        self.max_length, self._say = max_length, say
        self.requests = []

    def generate(self, requests):
        """As `Engine.generate`, one sample each."""
        self.requests += requests
        return [[self._complete(request)] for request in requests]

    def _complete(self, request) -> Completion:
        said = self._say(TOKENIZER.decode(list(request.tokens)))
        tokens = TOKENIZER.encode(said, allow_special=True)[: request.sampling.max_tokens]
        reason = "stop" if tokens[-1] in request.sampling.stop_ids else "length"
        return Completion(tokens, [0.0] * len(tokens), [0] * len(tokens), [()] * len(tokens), reason)
