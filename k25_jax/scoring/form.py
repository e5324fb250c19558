"""Whether what a model said has the form that was asked for: turns ended, thinking closed, calls well-formed (K2.5 §3.5).

It is read from the sampled tokens, where only special tokens are marks: text that merely looks like one is text.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from k25_jax.scoring.execution import Verdict
from k25_jax.scoring.scores import MOST_TEXT
from k25_jax.text.chat import MODES, THINK
from k25_jax.text.tokenizer import Tokenizer
from k25_jax.text.tool_calls import ENDS, BadCall, CallIds, parse
from k25_jax.text.turn import SECTION, SECTION_END

CALL_MARKS = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")


@dataclass(frozen=True)
class Form:
    """What a reply must look like: `mode` as in `text.chat`, `names` of the tools that may be called.

    `answer` is a regular expression for the whole of the last turn's content without space around it ("." is any
    character; it is ours, and must not backtrack without bound). Its default is any text at all.
    """

    mode: str = "plain"
    names: Collection[str] = ()
    answer: str = r".+"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(MODES)}")
        re.compile(self.answer)

    def score(self, turns: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Verdict:
        """1 when every turn is well-formed and the last one is an answer of this form; `turns` are what was sampled."""
        ids = CallIds()
        for number, tokens in enumerate(turns, 1):
            if problem := self._problem(list(tokens), tokenizer, ids, last=number == len(turns)):
                return Verdict(0.0, f"turn {number}: {problem}")
        return Verdict(1.0) if turns else Verdict(0.0, "nothing was said")

    def _problem(self, tokens: list[int], tokenizer: Tokenizer, ids: CallIds, last: bool) -> str:
        """What is wrong with a turn; "" where nothing is."""
        said = parse(tokens, tokenizer, self.mode, self.names, ids)
        if not said.whole:
            return "was cut off"
        if problem := _misplaced(tokens[:-1], tokenizer, self.mode):
            return problem
        for call in said.calls:
            if isinstance(call, BadCall):
                return f"a call that cannot be made: {call.error}"
            if call.name not in self.names:
                return f"a call of {call.name}, which is no tool"
        if last and said.calls:
            return "ends with a call, not with an answer"
        content = said.content.strip()
        if last and (len(content) > MOST_TEXT or not re.fullmatch(self.answer, content, re.DOTALL)):
            return f"the answer does not have the form {self.answer}"
        return ""

    def validate(self, gold: str, tokenizer: Tokenizer) -> None:
        """Raise ValueError unless a gold answer scores 1, and an empty one or one without its end scores 0."""
        begin = [tokenizer.special[THINK[1]]] if self.mode == "thinking" else []
        whole = [*begin, *tokenizer.encode(gold), tokenizer.special[ENDS[0]]]
        if problem := self.score([whole], tokenizer).reason:
            raise ValueError(f"the gold answer {gold!r:.80} does not have the form that is asked for: {problem}")
        for wrong in ([], [whole[-1]], whole[:-1]):
            if self.score([wrong], tokenizer).score:
                raise ValueError(f"{tokenizer.decode(wrong)!r:.80} scores as much as the gold answer")


def _misplaced(tokens: Sequence[int], tokenizer: Tokenizer, mode: str) -> str:
    """The first special token of a turn without its end that must not stand where it does, or is missing; else ""."""
    names = {id_: name for name, id_ in tokenizer.special.items()}
    marks = [names[token] for token in tokens if token in names]
    opened = mode == "plain" and bool(tokens) and names.get(tokens[0]) == THINK[0]
    wanted = [*(THINK if opened else ()), *(THINK[1:] if mode == "thinking" else ())]
    if marks[: len(wanted)] != wanted:
        return "its thinking is not begun and closed once"
    rest = marks[len(wanted) :]
    if not rest:
        return ""
    if rest[0] != SECTION or rest[-1] != SECTION_END or names.get(tokens[-1]) != SECTION_END:
        stray = next((mark for mark in rest if mark not in (SECTION, SECTION_END, *CALL_MARKS)), None)
        return f"{stray} in what it says" if stray else "its section of calls is not whole, or is not its end"
    stray = next((mark for mark in rest[1:-1] if mark not in CALL_MARKS), None)
    return f"{stray} among its calls" if stray else ""
