"""What an answer says so far: sampled tokens to thinking, content and calls of tools, while they come.

`text.tool_calls.parse` reads a whole turn; this gives the same piece by piece. What has not the form of a call stays
content, and special tokens are no text.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from k25_jax.text.tokenizer import StreamDecoder, Tokenizer
from k25_jax.text.tool_calls import CALL_ID

THINK, THOUGHT = "<think>", "</think>"
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


class Piece(NamedTuple):
    """Some text of `reasoning`, `content` or `arguments`; or a `call` that begins, with its id."""

    kind: str
    text: str


def call_name(call_id: str) -> str | None:
    """The name of the tool in the id of a call; None for what is no such id."""
    match = CALL_ID.fullmatch(call_id)
    return match["name"] if match else None


class StopTexts:
    """Tokens with their texts, held back as long as they may belong to a text that ends the answer."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._stream, self._stops = StreamDecoder(tokenizer, skip_special=True), stops
        self._held = max(map(len, stops), default=1) - 1
        self._waiting: collections.deque[tuple[int | None, str]] = collections.deque()
        self._text = ""  # of those that wait
        self.length = 0  # characters of all tokens so far
        self.found = False  # a stop text

    def push(self, token: int) -> list[tuple[int | None, str]]:
        """The tokens that are free to go, with their texts; none behind a stop text."""
        return self._push(token, self._stream.push(token))

    def flush(self) -> list[tuple[int | None, str]]:
        """All that waits, at the end of the answer."""
        out = self._push(None, self._stream.flush())
        return out if self.found else out + self._release(len(self._text))

    def _push(self, token: int | None, text: str) -> list[tuple[int | None, str]]:
        if self.found:
            return []
        self.length += len(text)
        self._waiting.append((token, text))
        self._text += text
        cut = min((self._text.find(stop) for stop in self._stops if stop in self._text), default=None)
        if cut is None:
            return self._release(len(self._text) - self._held)
        self.found = True
        out = self._release(cut)
        left = cut - sum(len(text) for _, text in out)
        return out + [(token, text[:left]) for token, text in list(self._waiting)[:1] if left]

    def _release(self, free: int) -> list[tuple[int | None, str]]:
        """Those whose texts lie in the first `free` characters."""
        out = []
        while self._waiting and len(self._waiting[0][1]) <= free:
            out.append(self._waiting.popleft())
            free -= len(out[-1][1])
            self._text = self._text[len(out[-1][1]) :]
        return out


class OutputParser:
    """Tokens to pieces, for an answer to a prompt of this mode (`text.chat.MODES`).

    Calls are read if `reads_calls`; `call_id` is that of a call that the prompt has begun.
    """

    def __init__(self, tokenizer: Tokenizer, mode: str, reads_calls: bool, call_id: str | None = None):
        names = [THINK, THOUGHT, *([SECTION, SECTION_END, CALL, ARGUMENTS, CALL_END] if reads_calls else [])]
        self._marks = {tokenizer.special[name]: name for name in names if name in tokenizer.special}
        self._mode, self._first, self._id = mode, True, ""
        self.state = "arguments" if call_id else "reasoning" if mode == "thinking" else "content"

    def push(self, token: int | None, text: str) -> list[Piece]:
        """The pieces that a token gives."""
        mark, first, self._first = self._marks.get(token), self._first, False
        if mark is None:
            return self._said(text)
        if mark == THINK and first and self._mode != "instant":
            self.state = "reasoning"
        elif mark == THOUGHT and self.state == "reasoning":
            self.state = "content"
        elif self.state in ("reasoning", "content"):
            self.state = "section" if mark == SECTION else self.state
        elif mark == ARGUMENTS:
            return self._begin_arguments()
        elif mark in (CALL, CALL_END, SECTION_END):
            out = self.finish()
            self.state = {CALL: "id", CALL_END: "section", SECTION_END: "content"}[mark]
            return out
        return []

    def finish(self) -> list[Piece]:
        """What is left of an id that became no call."""
        text, self._id = self._id, ""
        return [Piece("content", text)] if text.strip() else []

    def _said(self, text: str) -> list[Piece]:
        if self.state == "id":
            self._id += text
            return []
        if self.state == "section":
            return [Piece("content", text)] if text.strip() else []
        return [Piece(self.state, text)] if text else []

    def _begin_arguments(self) -> list[Piece]:
        if self.state != "id":
            return []
        call_id = self._id.strip()
        if call_name(call_id) is None:
            self.state = "section"
            return self.finish()
        self._id, self.state = "", "arguments"
        return [Piece("call", call_id)]
