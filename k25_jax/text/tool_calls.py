"""Calls of tools in what the assistant says: written from messages, read from sampled tokens (K2.5 §4).

    <|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{JSON}<|tool_call_end|>  ..
    <|tool_calls_section_end|>

without the line ends. INDEX counts the calls of the whole conversation from 0. The model may write anything: an id of another
form stands for the declared tool that it names, and gets the form of ours; no two calls have one id. What cannot be read so
becomes a `BadCall`, a value that says what is wrong, and never an exception.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from k25_jax.text.tokenizer import Tokenizer

ENDS = ("<|im_end|>", "[EOS]", "[EOT]")
LONGEST_ID = 200  # characters of one of another form
TOOL_NAME = re.compile(r"[\w.-]+")
CALL_ID = re.compile(rf"functions\.(?P<name>{TOOL_NAME.pattern}):\d+")


class CallError(ValueError):
    """A call in a message that cannot be rendered; the message says which field, and why."""


@dataclass(frozen=True)
class Call:
    """A call that can be made: the tool's name and its arguments."""

    id: str
    name: str
    arguments: dict


@dataclass(frozen=True)
class BadCall:
    """A call that cannot be made. `id` is what stood for it, or "unknown"; `error` goes back to the model."""

    id: str
    error: str


@dataclass(frozen=True)
class Said:
    """What the assistant said in one turn. `whole`: it ended the turn itself, it was not cut off."""

    reasoning: str
    content: str
    calls: tuple[Call | BadCall, ...]
    whole: bool


@dataclass
class CallIds:
    """The ids of a conversation's calls: those of another form are replaced, in calls and in their results."""

    count: int = 0
    _ours: dict = field(default_factory=dict)
    _taken: set = field(default_factory=set)

    def next(self, name: str, given: str) -> str:
        """The id of the next call of messages, where what is written twice stays so."""
        ours = given if CALL_ID.fullmatch(given) else f"functions.{name}:{self.count}"
        self.count += 1
        self._taken.add(ours)
        if given:
            self._ours[given] = ours
        return ours

    def read(self, written: str, names: Collection[str] = ()) -> tuple[str, str] | None:
        """(id, name) of the next call that a model makes, as `named` reads it; the id is one that no other call has."""
        name, number = named(written, names), self.count
        self.count += 1
        if name is None:
            return None
        ours, match = written.strip(), CALL_ID.fullmatch(written.strip())
        if match is None or match["name"] != name:
            ours = f"functions.{name}:{number}"
        while ours in self._taken:
            ours, number = f"functions.{name}:{number}", number + 1
        self._taken.add(ours)
        return ours, name

    def copy(self) -> "CallIds":
        """These ids, to go on from apart."""
        return CallIds(self.count, dict(self._ours), set(self._taken))

    def known(self, given: str) -> str:
        """The id that stands for this one."""
        return self._ours.get(given, given)


def call_parts(call: Mapping, ids: CallIds) -> tuple[str, str]:
    """Id and arguments of `{"id", "function": {"name", "arguments"}}`; the id may be left out. Raises CallError."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise CallError(" must be {'id': .., 'function': {'name': .., 'arguments': ..}}")
    name, arguments, given = function.get("name"), function.get("arguments"), call.get("id") or ""
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise CallError(f".function.name must be letters, digits, '_', '.' and '-', not {name!r}")
    if not isinstance(given, str):
        raise CallError(f".id must be a string, not {type(given).__name__}")
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError) as problem:
            raise CallError(f".function.arguments cannot be written as JSON: {problem}") from None
    if not isinstance(arguments, str):
        raise CallError(f".function.arguments must be a mapping or its JSON, not {type(arguments).__name__}")
    return ids.next(name, given), arguments


def named(written: str, names: Collection[str] = ()) -> str | None:
    """The tool that an id stands for: NAME of functions.NAME:INDEX, or the longest of the declared `names` that it ends in.

    Before a declared name other words may stand, with one of . : / or space between, and behind it : and anything.
    """
    written = written.strip()
    match = CALL_ID.fullmatch(written)
    own = match["name"] if match else None
    if own in names or len(written) > LONGEST_ID:
        return own
    starts = [0, *(gap.end() for gap in re.finditer(r"[.:/\s]+", written))]
    ends = [len(written), *(gap.start() for gap in re.finditer(r"\s*:", written))]
    found = [written[start:end] for start in starts for end in ends if written[start:end] in names]
    return max(found, key=len, default=own)


def parse(
    said: Sequence[int] | str,
    tokenizer: Tokenizer,
    mode: str = "plain",
    names: Collection[str] = (),
    ids: CallIds | None = None,
) -> Said:
    """What was said after the prompt of this mode (`text.chat.MODES`), from sampled tokens, or from text with markers.

    Thinking ends with </think>, or where calls begin. In sampled tokens only special tokens count as markers. `names` are
    those of the declared tools, `ids` those of the conversation so far, which go on.
    """
    tokens = list(tokenizer.encode(said, allow_special=True) if isinstance(said, str) else said)
    special = tokenizer.special
    ends = {special[name] for name in ENDS if name in special}
    whole = bool(tokens) and tokens[-1] in ends
    while tokens and tokens[-1] in ends:
        tokens.pop()
    reasoning: list[int] = []
    begin, end, section = (special.get(name) for name in ("<think>", "</think>", "<|tool_calls_section_begin|>"))
    opened = bool(tokens) and tokens[0] == begin and mode != "instant"
    if opened or mode == "thinking":
        stop = next((i for i, token in enumerate(tokens) if token in (end, section)), len(tokens))
        reasoning, tokens = tokens[int(opened) : stop], tokens[stop + (tokens[stop : stop + 1] == [end]) :]
    stop = tokens.index(section) if section in tokens else len(tokens)
    ids = CallIds() if ids is None else ids
    calls = _read_section(tokens[stop + 1 :], tokenizer, names, ids) if section in tokens else ()
    return Said(tokenizer.decode(reasoning), tokenizer.decode(tokens[:stop]), calls, whole)


def _read_section(
    tokens: Sequence[int], tokenizer: Tokenizer, names: Collection[str], ids: CallIds
) -> tuple[Call | BadCall, ...]:
    """The calls after the beginning of a section."""
    special = tokenizer.special
    end = special["<|tool_calls_section_end|>"]
    stop = tokens.index(end) if end in tokens else len(tokens)
    before, *pieces = _split(tokens[:stop], special["<|tool_call_begin|>"])
    calls = [_read_call(piece, tokenizer, names, ids) for piece in pieces]
    for stray in (before, tokens[stop + 1 :]):
        if text := tokenizer.decode(stray).strip():
            calls.append(BadCall("unknown", f"text outside of a call is not read: {text[:100]!r}"))
    calls = calls or [BadCall("unknown", "a section of calls without a call")]
    ids.count += len(calls) - len(pieces)
    return tuple(calls)


def _read_call(tokens: Sequence[int], tokenizer: Tokenizer, names: Collection[str], ids: CallIds) -> Call | BadCall:
    """One call, from the token after its beginning."""
    body, *rest = _split(tokens, tokenizer.special["<|tool_call_end|>"])
    id_part, *arguments = _split(body, tokenizer.special["<|tool_call_argument_begin|>"])
    written = tokenizer.decode(id_part).strip()
    read = ids.read(written, names)
    if read is None:
        return BadCall(written[:100] or "unknown", "the id of a call must be functions.NAME:INDEX")
    shown, name = read
    if len(arguments) != 1:
        return BadCall(shown, "between the id and <|tool_call_end|> there must be one <|tool_call_argument_begin|>")
    if not rest:
        return BadCall(shown, "the call was cut off: there is no <|tool_call_end|>")
    if any(tokenizer.decode(piece).strip() for piece in rest):
        return BadCall(shown, "there is text between <|tool_call_end|> and the next call")
    try:
        value = json.loads(tokenizer.decode(arguments[0]).strip() or "{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        return BadCall(shown, f"the arguments are not JSON: {problem}")
    if not isinstance(value, dict):
        return BadCall(shown, f"the arguments must be a JSON object, not a {type(value).__name__}")
    return Call(shown, name, value)


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _split(tokens: Sequence[int], separator: int) -> list[Sequence[int]]:
    """Like str.split."""
    cuts = [-1, *(i for i, token in enumerate(tokens) if token == separator), len(tokens)]
    return [tokens[a + 1 : b] for a, b in zip(cuts, cuts[1:], strict=False)]
