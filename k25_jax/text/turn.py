"""Where in an assistant's turn a token stands: in its thinking, in its content or among its calls (K2.5 §4).

One rule for all that read a turn token by token: only special tokens are marks, thinking ends with </think> or where calls
begin, and behind the section of calls there is content again.
"""

from dataclasses import dataclass

from k25_jax.text.tokenizer import Tokenizer

THINK, THOUGHT = "<think>", "</think>"
SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


@dataclass(frozen=True)
class TurnForm:
    """How the prompt begins a turn (`text.chat.MODES`), whether calls are read from it, and whether one is begun."""

    mode: str = "plain"
    reads_calls: bool = False
    in_call: bool = False


class Turn:
    """`place` is that of the next token: reasoning, content or calls. Without a form all is content."""

    def __init__(self, tokenizer: Tokenizer, form: TurnForm | None = None):
        names = [] if form is None else [THINK, THOUGHT, *([SECTION, SECTION_END] if form.reads_calls else [])]
        self._marks = {tokenizer.special[name]: name for name in names if name in tokenizer.special}
        self._may_think = form is not None and form.mode != "instant"  # if it begins with <think>
        self.place = "content"
        if form is not None and (form.in_call or form.mode == "thinking"):
            self.place = "calls" if form.in_call else "reasoning"

    def push(self, token: int) -> None:
        """Go on behind this token."""
        mark, may_think, self._may_think = self._marks.get(token), self._may_think, False
        if mark == THINK and may_think and self.place != "calls":
            self.place = "reasoning"
        elif mark == THOUGHT and self.place == "reasoning":
            self.place = "content"
        elif mark == SECTION:
            self.place = "calls"
        elif mark == SECTION_END and self.place == "calls":
            self.place = "content"
