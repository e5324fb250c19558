"""One answer in the making: its tokens, its place in the engine, what it draws with, and when it ends."""

import dataclasses
import itertools
import math
from collections.abc import Sequence as Items

import numpy as np

from k25_jax.sampling.encoder_cache import Encoded
from k25_jax.sampling.paged_cache import PagedCache, clip_digest, page_keys
from k25_jax.sampling.requests import Request
from k25_jax.text.stops import StopTexts
from k25_jax.vision.patchpack import Clip


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """An image of a prompt and the places of its tokens."""

    clip: Clip
    digest: bytes
    places: np.ndarray


def images_of(request: Request, media_pad_id: int) -> list[Shown]:
    """The images of a prompt with the places of their tokens."""
    places = np.flatnonzero(np.asarray(request.tokens) == media_pad_id)
    ends = itertools.accumulate(clip.tokens for clip in request.clips)
    return [Shown(c, clip_digest(c), places[end - c.tokens : end]) for c, end in zip(request.clips, ends, strict=True)]


class Home:
    """What device `number` has of an engine for the sequences that run there: pages, slots, the pages of each slot."""

    def __init__(self, number: int, slots: int, pages: int, width: int):
        self.number, self.pages = number, PagedCache(pages)
        self.slots = list(range(slots - 1, -1, -1))
        self.tables = np.zeros((slots, width), np.int32)

    @property
    def running(self) -> int:
        """How many sequences run here."""
        return len(self.tables) - len(self.slots)


@dataclasses.dataclass(eq=False)
class Sequence:
    """Sample `sample` of a request; `order` numbers all sequences by arrival.

    Of its tokens, those before `computed` have their latents in the cache, or will have when the steps that are under way
    are done. `coming` tokens are drawn in such steps and not yet read.
    """

    id: int
    sample: int
    order: int
    request: Request
    shown: Items[Shown]
    stops: StopTexts | None
    tokens: list[int]
    keys: list[bytes] = dataclasses.field(default_factory=list)
    home: Home | None = None  # the device's share of the engine that it runs in
    slot: int = -1
    table: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    kept: int = 0  # full pages that others may find
    coming: int = 0
    decoding: bool = False  # its last token is on the device
    epoch: int = -1  # which weights its latents are of
    features: dict[int, Encoded] = dataclasses.field(default_factory=dict)  # by number of the image
    done: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def begun(self) -> bool:
        """Whether any of its tokens was drawn."""
        return len(self.tokens) > self.prompt_length or self.coming > 0

    @property
    def wants_more(self) -> bool:
        """Whether a token is to be drawn beyond those that are coming."""
        drawn = len(self.tokens) - self.prompt_length + self.coming
        return not self.done and drawn < self.request.sampling.max_tokens

    def full_keys(self, size: int) -> list[bytes]:
        """Keys of all its full pages of `size` tokens."""
        if len(self.keys) < len(self.tokens) // size:
            images = [(int(s.places[0]), int(s.places[-1]) + 1, s.digest) for s in self.shown]
            self.keys = page_keys(self.tokens, size, images, self.keys)
        return self.keys

    def media_rows(self, start: int, stop: int) -> np.ndarray:
        """The rows of features of its tokens [start, stop); -1 where they are text."""
        rows = np.full(stop - start, -1, np.int32)
        for number, shown in enumerate(self.shown):
            here = (shown.places >= start) & (shown.places < stop)
            if here.any():
                rows[shown.places[here] - start] = self.features[number].rows_M[here]
        return rows

    def leave(self) -> None:
        """Out of its slot, with nothing computed."""
        self.home, self.slot, self.table, self.features = None, -1, [], {}
        self.computed, self.kept, self.decoding = 0, 0, False

    def accept(self, token: int, logprob: float) -> tuple[str, int | str | None]:
        """Take a token that was drawn: (why the answer ends or "", the stop token or text)."""
        self.tokens.append(token)
        sampling = self.request.sampling
        if not math.isfinite(logprob):
            return "error", None
        if token in sampling.stop_ids:
            return "stop", token
        if self.stops is not None:
            self.stops.push(token)
            if self.stops.found:
                return "stop", self.stops.found
        if len(self.tokens) - self.prompt_length >= sampling.max_tokens:
            return "length", None
        return "", None
