"""Which rows of the engine's buffer of vision features are whose: a clip is encoded once for all who show it."""

import bisect
import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from k25_jax.config import VisionConfig
from k25_jax.vision.patchpack import Clip, VisionPack, pack_clips


@dataclasses.dataclass(eq=False)
class Encoded:
    """The rows of one clip's tokens, and how many sequences still need them."""

    digest: bytes
    rows_M: np.ndarray
    users: int = 0


class EncoderCache:
    """`count` rows. What nobody needs stays until its room is needed."""

    def __init__(self, count: int):
        self._free = list(range(count - 1, -1, -1))
        self._found: dict[bytes, Encoded] = {}
        self._idle: OrderedDict[bytes, Encoded] = OrderedDict()  # longest idle first

    def claim(self, wanted: Sequence[tuple[bytes, Clip]]) -> tuple[list[Encoded], list[tuple[Encoded, Clip]]] | None:
        """(the rows of each clip, those of them that are yet to be encoded); None, and no change, without room."""
        new = {digest: clip for digest, clip in wanted if digest not in self._found}
        asked = {digest for digest, _ in wanted}
        room = len(self._free) + sum(len(e.rows_M) for digest, e in self._idle.items() if digest not in asked)
        if sum(clip.tokens for clip in new.values()) > room:
            return None
        for digest in asked:
            self._idle.pop(digest, None)
        fresh = []
        for digest, clip in new.items():
            while len(self._free) < clip.tokens:
                self._drop(self._idle.popitem(last=False)[1])
            rows_M = np.array([self._free.pop() for _ in range(clip.tokens)], np.int32)
            self._found[digest] = Encoded(digest, rows_M)
            fresh.append((self._found[digest], clip))
        given = [self._found[digest] for digest, _ in wanted]
        for encoded in given:
            encoded.users += 1
        return given, fresh

    def release(self, given: Sequence[Encoded]) -> None:
        """One user less of each."""
        for encoded in given:
            encoded.users -= 1
            if not encoded.users:
                if self._found.get(encoded.digest) is encoded:
                    self._idle[encoded.digest] = encoded
                else:
                    self._free += encoded.rows_M.tolist()

    def forget(self) -> None:
        """No clip is found any more; who uses one keeps it."""
        for encoded in self._idle.values():
            self._free += encoded.rows_M.tolist()
        self._idle.clear()
        self._found.clear()

    def _drop(self, encoded: Encoded) -> None:
        del self._found[encoded.digest]
        self._free += encoded.rows_M.tolist()


def packs(
    fresh: Sequence[tuple[Encoded, Clip]], sizes: Sequence[int], vision: VisionConfig
) -> Iterator[tuple[VisionPack, np.ndarray, int]]:
    """Clips in packs of as many as fit in the largest of `sizes`, in patches: (pack, the row of each token, clips in it).

    A row is -1 where the pack has no token.
    """
    while fresh:
        totals = list(itertools.accumulate(len(clip.patches) for _, clip in fresh))
        count = max(1, bisect.bisect_right(totals, sizes[-1]))
        part, fresh = fresh[:count], fresh[count:]
        patches = next(size for size in sizes if size >= totals[count - 1])
        pack, starts = pack_clips([clip for _, clip in part], 1, patches, vision.merge, vision.patch_dim)
        rows_M = np.full(patches // vision.group, -1, np.int32)
        for (encoded, clip), start in zip(part, starts, strict=True):
            rows_M[start : start + clip.tokens] = encoded.rows_M
        yield pack, rows_M, count
