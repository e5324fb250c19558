"""A conversation as tokens that only grow: what was sampled is never tokenised again (K2.5 §4.4).

Reinforcement learning and the cache both need it: a turn that is added leaves all tokens before it as they are. So the
thinking of earlier turns stays, as `text.chat.render` with its default `keep_thinking=True` has it.
"""

from collections.abc import Mapping, Sequence

from k25_jax.text.chat import ChatError, LoadMedia, Rendered, Renderer
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.text.tool_calls import Said, parse


class Conversation:
    """Tokens, weights (1 on what was sampled) and media of a conversation; modes and tools as in `text.chat.render`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping] = (),
        mode: str = "thinking",
        load_media: LoadMedia | None = None,
    ):
        self._tokenizer, self._mode = tokenizer, mode
        self._renderer = Renderer(tokenizer, load_media, mode, tools)
        self._names = frozenset(tool["function"]["name"] for tool in tools)
        self._turns, self._open = 0, False

    @property
    def rendered(self) -> Rendered:
        """All tokens so far. It is for reading; further turns are appended to it."""
        return self._renderer.rendered

    def add(self, message: Mapping):
        """Append a whole turn: what a user says, the result of a call, an example of what to say. Raises ChatError."""
        if self._open:
            raise ChatError(f"turn {self._turns}: the assistant has been asked to speak; say() its tokens first")
        self._renderer.message(message, f"turn {self._turns}")
        self._turns += 1

    def prompt(self) -> list[int]:
        """The tokens to go on from: the assistant's turn is opened, unless it is open already."""
        if not self._open:
            self._renderer.open_assistant()
            self._open = True
        return list(self.rendered.tokens)

    def say(self, tokens: Sequence[int]) -> Said:
        """Append what was sampled after `prompt()`, as it is, and read it.

        A turn that was cut off gets its <|im_end|> with weight 0. It is also cut where the model writes a <|media_pad|>,
        for which there is no image.
        """
        if not self._open:
            raise ChatError(f"turn {self._turns}: ask for prompt() before the assistant speaks")
        special = self._tokenizer.special
        end, pad = special["<|im_end|>"], special["<|media_pad|>"]
        tokens = [int(token) for token in tokens]
        if pad in tokens:
            tokens = tokens[: tokens.index(pad)]
        if end in tokens[:-1]:
            raise ChatError(f"turn {self._turns}: sampling must stop at <|im_end|> (token {end})")
        said = parse(tokens, self._tokenizer, self._mode, self._names, self._renderer.ids)
        rendered = self.rendered
        rendered.tokens += tokens
        rendered.weights += [1.0] * len(tokens)
        if tokens[-1:] != [end]:
            rendered.tokens.append(end)
            rendered.weights.append(0.0)
        self._turns, self._open = self._turns + 1, False
        return said
