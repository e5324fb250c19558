"""What a body may cost, stopped while it is paid: text and media up to the length of the context, media up to a deadline."""

import re
import time
from collections.abc import Collection, Mapping

from k25_jax.sampling.prompt import MediaReader
from k25_jax.sampling.sample import PromptError
from k25_jax.text.tokenizer import Tokenizer, pieces
from k25_jax.vision.patchpack import Clip


class Exceeded(PromptError):
    """More tokens than the context has."""


class BoundedTokenizer:
    """A tokenizer for one prompt, which raises Exceeded instead of giving more than `most` tokens in all.

    Text goes through it in the pieces into which it is cut anyway, so that what is far too long costs one piece too many.
    """

    def __init__(self, tokenizer: Tokenizer, most: int):
        self._tokenizer, self._most, self._left = tokenizer, most, most
        self.special = tokenizer.special

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        """As `Tokenizer.encode`."""
        names = self.special if allow_special is True else (allow_special or ())
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
        out, start = [], 0
        for mark in re.finditer(pattern, text):
            self._ordinary(text[start : mark.start()], out)
            self._take([self.special[mark[0]]], out)
            start = mark.end()
        self._ordinary(text[start:], out)
        return out

    def _ordinary(self, text: str, out: list[int]) -> None:
        for piece in pieces(text):
            self._take(self._tokenizer.encode(piece), out)

    def _take(self, tokens: list[int], out: list[int]) -> None:
        self._left -= len(tokens)
        if self._left < 0:
            raise Exceeded(f"more tokens of text than the context of {self._most}")
        out += tokens


class BoundedReader:
    """Reads the media of one request: not more than `most` tokens of them, and none that is begun after `seconds`."""

    def __init__(self, reader: MediaReader, most: int, seconds: float):
        self._reader, self._most, self._left = reader, most, most
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self.config = reader.config

    def load(self, part: Mapping) -> list[tuple[str | None, Clip]]:
        """As `MediaReader.load`."""
        if time.monotonic() > self._end:
            problem = f"reading the media took longer than the {self._seconds:g} seconds that a request has"
            raise PromptError(f"{problem}; send fewer or smaller ones")
        clips = self._reader.load(part)
        self._left -= sum(clip.tokens for _, clip in clips)
        if self._left < 0:
            raise Exceeded(f"more tokens of media than the context of {self._most}")
        return clips
