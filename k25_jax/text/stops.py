"""Texts that end an answer, looked for while its tokens come."""

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

from k25_jax.text.tokenizer import StreamDecoder, Tokenizer
from k25_jax.text.turn import Turn, TurnForm

SIGNS = 0xD800  # the first of the surrogates, which stand in no text: for special tokens that a stop text names


class Waiting(NamedTuple):
    """A token, its text, and how it is written in what is searched."""

    token: int | None
    text: str
    spelt: str


class StopTexts:
    """Tokens with their texts, held back as long as they may belong to a text that ends the answer.

    A stop text counts in what the turn says, neither in its thinking nor in its calls. The name of a special token in it
    also means that token, and then it counts everywhere; as an ordinary text it still does so in what the turn says.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], form: TurnForm | None = None):
        self._turn, self._stream = Turn(tokenizer, form), StreamDecoder(tokenizer, skip_special=True)
        named = [name for name in tokenizer.special if any(name in stop for stop in stops)]
        signs = {name: chr(SIGNS + number) for number, name in enumerate(named)}
        self._signs = {tokenizer.special[name]: sign for name, sign in signs.items()}
        pattern = re.compile("|".join(re.escape(name) for name in sorted(named, key=len, reverse=True)) or r"(?!)")
        spelt = [(pattern.sub(lambda match: signs[match[0]], stop), stop) for stop in stops]
        self._texts, self._anywhere = list(stops), [(one, stop) for one, stop in spelt if one != stop]
        self._held = {  # characters that may still begin a stop text, in the content and elsewhere
            True: max(map(len, self._texts), default=1) - 1,
            False: max((len(one) for one, _ in self._anywhere), default=1) - 1,
        }
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._spelt = ""  # of those that wait
        self._content = 0 if self._turn.place == "content" else None  # where in it the content begins
        self.length = 0  # characters of all tokens so far
        self.thought = 0  # tokens of the thinking
        self.found = ""  # the stop text that ended the answer

    def push(self, token: int) -> list[tuple[int | None, str]]:
        """The tokens that are free to go, with their texts; none behind a stop text."""
        before = self._turn.place
        self.thought += before == "reasoning"
        self._turn.push(token)
        if self._turn.place == before:
            return self._add(token, self._stream.push(token), self._signs.get(token, ""))
        out = self._add(None, self._stream.flush())  # half a character does not go on elsewhere
        out += self._add(token, self._stream.push(token), self._signs.get(token, ""))
        self._content = len(self._spelt) if self._turn.place == "content" else None
        return out + ([] if self.found else self._release(len(self._spelt) - self._hold))

    def flush(self) -> list[tuple[int | None, str]]:
        """All that waits, at the end of the answer."""
        out = self._add(None, self._stream.flush())
        return out if self.found else out + self._release(len(self._spelt))

    @property
    def _hold(self) -> int:
        return self._held[False] if self._content is None else max(self._held.values())

    def _add(self, token: int | None, text: str, sign: str = "") -> list[tuple[int | None, str]]:
        if self.found:
            return []
        self.length += len(text)
        self._waiting.append(Waiting(token, text, sign or text))
        self._spelt += sign or text
        places = [(self._spelt.find(spelt), stop) for spelt, stop in self._anywhere]
        if self._content is not None:
            places += [(self._spelt.find(stop, self._content), stop) for stop in self._texts]
        places = [place for place in places if place[0] >= 0]
        if not places:
            return self._release(len(self._spelt) - self._hold)
        cut, self.found = min(places, key=lambda place: place[0])
        before = len(self._spelt)
        out = self._release(cut)
        left = cut - (before - len(self._spelt))
        return out + [(one.token, one.text[:left]) for one in list(self._waiting)[:1] if left]

    def _release(self, free: int) -> list[tuple[int | None, str]]:
        """Those that lie in the first `free` characters."""
        out = []
        while self._waiting and len(self._waiting[0].spelt) <= free:
            one = self._waiting.popleft()
            out.append((one.token, one.text))
            free -= len(one.spelt)
            self._spelt = self._spelt[len(one.spelt) :]
            if self._content is not None:
                self._content = max(0, self._content - len(one.spelt))
        return out
