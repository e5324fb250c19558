"""What an answer says so far: sampled tokens to thinking, content and calls of tools, while they come.

`text.tool_calls.parse` reads a whole turn; this gives the same piece by piece. What has not the form of a call stays
content, and special tokens are no text.
"""

from collections.abc import Collection
from typing import NamedTuple

from k25_jax.text.tokenizer import Tokenizer
from k25_jax.text.tool_calls import CallIds
from k25_jax.text.turn import Turn, TurnForm

CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


class Piece(NamedTuple):
    """Some text of `reasoning`, `content` or `arguments`; or a `call` that begins, with its id and the tool's `name`."""

    kind: str
    text: str
    name: str = ""


class OutputParser:
    """Tokens to pieces, for a turn of this form. Its calls are of the tools `names`; `ids` are those given so far."""

    def __init__(self, tokenizer: Tokenizer, form: TurnForm, names: Collection[str] = (), ids: CallIds | None = None):
        self._turn, self._names, self._ids = Turn(tokenizer, form), names, ids or CallIds()
        marks = [CALL, ARGUMENTS, CALL_END] if form.reads_calls else []
        self._marks = {tokenizer.special[name]: name for name in marks if name in tokenizer.special}
        self._inside = "arguments" if form.in_call else ""  # of a call: id, arguments, or between two of them
        self._id = self._blank = ""  # of a call: its id so far, and space before its arguments
        self._argued = False  # whether it has arguments

    def push(self, token: int | None, text: str) -> list[Piece]:
        """The pieces that a token gives."""
        out, before = self._said(text), self._turn.place
        if token is None:
            return out
        self._turn.push(token)
        mark = self._marks.get(token)
        if self._turn.place != before:
            return out + self._leave("")
        if before != "calls" or mark is None:
            return out
        if mark != ARGUMENTS:
            return out + self._leave("id" if mark == CALL else "")
        return out + (self._begin() if self._inside == "id" else [])

    def finish(self, whole: bool) -> list[Piece]:
        """What is left of an id that became no call; a turn that is `whole` has arguments in its calls."""
        if whole or self._inside == "id":
            return self._leave("")
        return []

    def _leave(self, inside: str) -> list[Piece]:
        """To another part of the calls, or out of them."""
        before, self._inside = self._inside, inside
        if before == "arguments" and not self._argued:
            return [Piece("arguments", "{}")]
        text, self._id = self._id, ""
        return [Piece("content", text)] if text.strip() else []

    def _said(self, text: str) -> list[Piece]:
        if self._turn.place != "calls":
            return [Piece(self._turn.place, text)] if text else []
        if self._inside == "id":
            self._id += text
            return []
        if not self._inside or self._argued:
            kind = self._inside or "content"
            return [Piece(kind, text)] if text and (self._inside or text.strip()) else []
        self._blank += text
        self._argued = bool(self._blank.strip())
        return [Piece("arguments", self._blank)] if self._argued else []

    def _begin(self) -> list[Piece]:
        """The arguments of a call, if its id is one."""
        read = self._ids.read(self._id, self._names)
        if read is None:
            return self._leave("")
        self._id, self._blank, self._argued, self._inside = "", "", False, "arguments"
        return [Piece("call", *read)]
