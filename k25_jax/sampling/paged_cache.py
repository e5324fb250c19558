"""Which pages of the cache are whose: counted users, and beginnings of prompts that are kept for those who begin alike.

A full page goes by a key that stands for all tokens and images up to its end, so the keys form a tree whose nodes need no
links: a prompt walks down it as long as its keys are known. A page without users keeps its key until its room is needed.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from k25_jax.vision.patchpack import Clip


class PagedCache:
    """`count` pages. A page is free, in use by some sequences, or idle: kept for its key alone."""

    def __init__(self, count: int):
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that are kept for their key alone."""
        return len(self._idle)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of `keys` that is there."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """One more user of each."""
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1

    def take(self, count: int) -> list[int]:
        """`count` pages for one user each, at most `available`; the longest idle lose their keys."""
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
                self._free.append(page)
            pages.append(self._free.pop())
        self.hold(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each page of a sequence, in its order: its end is forgotten before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int, key: bytes) -> None:
        """A page in use is full, of what `key` stands for; of two such pages the first is the one to find."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def forget(self) -> None:
        """No page is found any more; who uses one keeps it."""
        self._free += reversed(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()


def page_keys(
    tokens: Sequence[int], size: int, images: Sequence[tuple[int, int, bytes]] = (), known: Sequence[bytes] = ()
) -> list[bytes]:
    """Keys of the full pages of `tokens`, of which the first are `known`.

    `images` are (first place, place behind the last, digest); a token of an image counts as its part of that image.
    """
    keys = list(known)
    for page in range(len(keys), len(tokens) // size):
        start, stop = page * size, (page + 1) * size
        key = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        key.update(np.asarray(tokens[start:stop], np.int64).tobytes())
        for first, end, digest in images:
            if first < stop and end > start:
                key.update(np.int64(first - start).tobytes() + digest)
        keys.append(key.digest())
    return keys


def clip_digest(clip: Clip) -> bytes:
    """What tells a clip from others: its patches and their grid."""
    digest = hashlib.blake2b(repr((clip.grid, clip.patches.shape, clip.patches.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(clip.patches))
    return digest.digest()
