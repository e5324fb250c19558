"""One in so many records of a source kept for validation, and the others for training, without a table of either.

Records come in blocks of `one_in`; a seeded draw says which one of a block is kept. The draw is of the number of the record
alone, so that lanes, hosts and the order of sources change nothing.
"""

import hashlib

from k25_jax.data.records import Record, Source


class Part(Source):
    """The held-out records of a source, or the others."""

    def __init__(self, source: Source, one_in: int, seed: int, held_out: bool):
        super().__init__()
        self.left_out = source.left_out
        self._source, self._one_in, self._seed, self._held_out = source, one_in, seed, held_out

    def __len__(self) -> int:
        kept = len(self._source) // self._one_in  # an unfinished block at the end is for training
        return kept if self._held_out else len(self._source) - kept

    def __getitem__(self, index: int) -> Record:
        return self._source[self.number(int(index))]

    def number(self, index: int) -> int:
        """The number in the whole source of a record of this part."""
        if self._held_out:
            return index * self._one_in + self._drawn(index)
        block, place = divmod(index, self._one_in - 1)
        if block >= len(self._source) // self._one_in:
            return index + len(self._source) // self._one_in
        return block * self._one_in + place + (place >= self._drawn(block))

    def files(self) -> list:
        """Those of the whole source."""
        return self._source.files()

    @property
    def modality(self) -> str:
        """That of the whole source."""
        return self._source.modality

    def _drawn(self, block: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{block}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self._one_in
