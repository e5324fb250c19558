"""Examples to packed batches: several documents in each row, their clips in vision packs (K2.5 §3.2, §3.3).

Rows are filled first-fit, in order of arrival; packs so that all have about the same to compute. Documents in a row do
not see each other: segments differ and positions restart. A media_pad token stands where one vision token goes; it is
never a target. A batch without a clip has no packs, so that its vision costs nothing.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import flax.struct
import numpy as np

from k25_jax.config import DataConfig, K25Config
from k25_jax.vision.patchpack import Clip, PackPlan, VisionPack, balance, pack_clips, waste


class PackingError(ValueError):
    """Examples that cannot be packed; the message says which, and the remedy."""


@dataclass(frozen=True, eq=False)
class Example:
    """One document. `loss_weights[i]` weighs the prediction of `tokens[i]`; `clips` are in order of appearance."""

    tokens: np.ndarray  # int32, with one media_pad for each vision token
    loss_weights: np.ndarray  # float32
    clips: list[Clip] = field(default_factory=list)
    truncated: bool = False  # its end was cut off

    def __len__(self) -> int:
        return len(self.tokens)


@flax.struct.dataclass
class Batch:
    """B rows of L tokens and P packs of patches, on the host; a pytree for jit."""

    tokens_BL: np.ndarray  # int32
    targets_BL: np.ndarray  # int32, the next token of the same document; pad where there is none
    loss_weights_BL: np.ndarray  # float32, weight of predicting targets_BL here; 0 where there is no target
    segments_BL: np.ndarray  # int32, 1, 2, .. number of the document in its row; 0 on padding
    positions_BL: np.ndarray  # int32, from 0 in each document
    media_BL: np.ndarray  # int32, index into the vision features flattened to [P * M]; -1 elsewhere
    vision: VisionPack
    routes: tuple[np.ndarray, np.ndarray] | None = None  # on a mesh, how features travel to tokens: parallel/dep.py


def expand_media(tokens: Sequence[int], counts: Sequence[int], media_pad_id: int) -> np.ndarray:
    """Tokens int32 with the i-th media_pad repeated `counts[i]` times; raises PackingError when the numbers differ."""
    return np.repeat(np.asarray(tokens, np.int32), _repeats(tokens, counts, media_pad_id))


def make_example(tokens: Sequence[int], weights: Sequence[float], clips: Sequence[Clip], media_pad_id: int) -> Example:
    """An Example from tokens with one media_pad for each clip; media_pad gets weight 0."""
    repeats = _repeats(tokens, [clip.tokens for clip in clips], media_pad_id)
    expanded = np.repeat(np.asarray(tokens, np.int32), repeats)
    expanded_weights = np.repeat(np.asarray(weights, np.float32), repeats)
    expanded_weights[expanded == media_pad_id] = 0.0
    return Example(expanded, expanded_weights, list(clips))


def _repeats(tokens: Sequence[int], counts: Sequence[int], media_pad_id: int) -> np.ndarray:
    is_pad = np.asarray(tokens, np.int32) == media_pad_id
    if is_pad.sum() != len(counts):
        raise PackingError(
            f"{is_pad.sum()} media_pad tokens (id {media_pad_id}) for {len(counts)} clips; give one each"
        )
    repeats = np.ones(len(is_pad), np.int64)
    repeats[is_pad] = counts
    return repeats


def split(example: Example, seq_len: int, model: K25Config) -> list[Example]:
    """Pieces of at most `seq_len` tokens.

    Text is cut into consecutive pieces that share one token: the last of a piece is the first of the next, so every
    token after the first is predicted once. A document with media loses its end instead, cut where no media block is
    torn.
    """
    if len(example) <= seq_len:
        return [example]
    if example.clips:
        return [_truncate(example, seq_len, model)]
    starts = range(0, len(example) - 1, seq_len - 1)
    return [Example(example.tokens[s : s + seq_len], example.loss_weights[s : s + seq_len]) for s in starts]


def _truncate(example: Example, seq_len: int, model: K25Config) -> Example:
    begins = np.flatnonzero(example.tokens == model.media_begin_id)
    ends = np.flatnonzero(example.tokens == model.media_end_id)
    kept = int(np.sum(ends < seq_len))
    cut = seq_len if kept == len(begins) else min(seq_len, int(begins[kept]))
    return Example(example.tokens[:cut], example.loss_weights[:cut], example.clips[:kept], truncated=True)


class BatchBuilder:
    """Collects examples until they no longer fit; `build` gives the batch."""

    def __init__(self, data: DataConfig, model: K25Config):
        self._data, self._model = data, model
        self._plan = PackPlan(data.packs, data.pack_patches)
        self._used = [0] * data.batch_size
        self._placed: list[tuple[Example, int, int]] = []  # example, row, first column; in order of arrival

    @property
    def full(self) -> bool:
        """Whether no row has room for a document of two tokens."""
        return min(self._used) > self._data.seq_len - 2

    def add(self, example: Example) -> bool:
        """Put the example into the first row with room, and its clips into the first packs with room; or say no."""
        room = self._data.seq_len - len(example)
        row = next((row for row, used in enumerate(self._used) if used <= room), None)
        if row is None or not self._plan.add([len(clip.patches) for clip in example.clips]):
            return False
        self._placed.append((example, row, self._used[row]))
        self._used[row] += len(example)
        return True

    def build(self) -> Batch:
        """The batch of what was added."""
        clips = [clip for example, _, _ in self._placed for clip in example.clips]
        vision = self._model.vision
        place = functools.partial(balance, config=vision)
        packs = self._data.packs if clips else 0
        pack, starts = pack_clips(clips, packs, self._data.pack_patches, vision.merge, vision.patch_dim, place)
        batch = self._blank(pack)
        documents, first_clip = [0] * self._data.batch_size, 0
        for example, row, column in self._placed:
            documents[row] += 1
            clip_starts = starts[first_clip : first_clip + len(example.clips)]
            self._write(batch, example, row, column, documents[row], clip_starts)
            first_clip += len(example.clips)
        return batch

    def _blank(self, pack: VisionPack) -> Batch:
        shape = (self._data.batch_size, self._data.seq_len)
        return Batch(
            tokens_BL=np.full(shape, self._model.pad_id, np.int32),
            targets_BL=np.full(shape, self._model.pad_id, np.int32),
            loss_weights_BL=np.zeros(shape, np.float32),
            segments_BL=np.zeros(shape, np.int32),
            positions_BL=np.zeros(shape, np.int32),
            media_BL=np.full(shape, -1, np.int32),
            vision=pack,
        )

    def _write(self, batch: Batch, example: Example, row: int, column: int, segment: int, starts: np.ndarray):
        length = len(example)
        place = (row, slice(column, column + length))
        before = (row, slice(column, column + length - 1))  # where the next token is in the same document
        batch.tokens_BL[place] = example.tokens
        batch.targets_BL[before] = example.tokens[1:]
        batch.loss_weights_BL[before] = np.where(
            example.tokens[1:] == self._model.media_pad_id, 0.0, example.loss_weights[1:]
        )
        batch.segments_BL[place] = segment
        batch.positions_BL[place] = np.arange(length)
        spans = [np.arange(start, start + clip.tokens) for start, clip in zip(starts, example.clips, strict=True)]
        if spans:
            columns = column + np.flatnonzero(example.tokens == self._model.media_pad_id)
            batch.media_BL[row, columns] = np.concatenate(spans)


def pack_examples(examples: Sequence[Example], data: DataConfig, model: K25Config) -> Batch:
    """One batch of all the examples; raises PackingError when one does not fit."""
    builder = BatchBuilder(data, model)
    for index, example in enumerate(examples):
        if not builder.add(example):
            patches = sum(len(clip.patches) for clip in example.clips)
            raise PackingError(
                f"examples[{index}] ({len(example)} tokens, {patches} patches) finds no room "
                f"in {data.batch_size} rows of {data.seq_len} tokens and {data.packs} packs of "
                f"{data.pack_patches} patches; raise one of these, or give fewer examples"
            )
    return builder.build()


def batch_stats(batch: Batch) -> dict[str, float]:
    """What a batch holds, and the share of its token and patch slots that is padding."""
    used = batch.segments_BL > 0
    return {
        "documents": int(batch.segments_BL.max(axis=1).sum()),
        "tokens": int(used.sum()),
        "loss_tokens": int((batch.loss_weights_BL > 0).sum()),
        "media_tokens": int((batch.media_BL >= 0).sum()),
        "clips": int(batch.vision.segments_PN.max(axis=1, initial=0).sum()),
        "waste_tokens": 1.0 - float(used.mean()),
        "waste_patches": waste(batch.vision),
    }
