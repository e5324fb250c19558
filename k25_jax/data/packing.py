"""Examples to packed batches: several documents in each row, their clips in vision packs (K2.5 §3.2, §3.3).

Rows are filled best-fit; packs best-fit and then so that all have about the same to compute. Documents in a row do not
see each other: segments differ and positions restart. A media_pad token stands where one vision token goes; it is never
a target. A batch without a clip has no packs, so that its vision costs nothing.

For reinforcement learning (K2.5 §3.5) a document is a sample, with the log-probability that each sampled token was drawn
with and the advantage of the whole. It is trained on whole or not at all. A model can sample the media_pad token itself:
that one is a target as any other, and no image stands there.
"""

import bisect
import copy
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import flax.struct
import numpy as np

from k25_jax.config import DataConfig, K25Config
from k25_jax.vision.patchpack import Clip, VisionPack, balance, pack_clips, waste


class PackingError(ValueError):
    """Examples that cannot be packed; the message says which, and the remedy."""


@dataclass(frozen=True, eq=False)
class Example:
    """One document. `loss_weights[i]` weighs the prediction of `tokens[i]`; `clips` are in order of appearance."""

    tokens: np.ndarray  # int32, with one media_pad for each vision token
    loss_weights: np.ndarray  # float32
    clips: list[Clip] = field(default_factory=list)
    truncated: bool = False  # its end was cut off
    name: str = ""  # in errors
    old_logprobs: np.ndarray | None = (
        None  # of a sample, float32: the sampled tokens' are numbers, those of weight 0 NaN
    )
    advantages: np.ndarray | None = None  # of a sample, float32, for each token

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
    routes: tuple[np.ndarray, ...] | None = None  # on a mesh, how features travel to tokens: parallel/dep.py
    old_logprobs_BL: np.ndarray | None = None  # of samples, float32: of targets_BL, when it was drawn; else NaN
    advantages_BL: np.ndarray | None = None  # of samples, float32: of the sample that targets_BL belongs to; else NaN


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


def make_sample(
    tokens: Sequence[int],
    sampled: Sequence[bool],
    logprobs: Sequence[float],
    advantage: float | Sequence[float],
    clips: Sequence[Clip],
    media_pad_id: int,
    name: str = "sample",
) -> Example:
    """An Example of T tokens of which the model drew some, `sampled`, with these log-probabilities; raises PackingError.

    media_pad stands once for each vision token of `clips`. All sampled tokens weigh 1, whatever their advantage: one for
    all, or one for each token.
    """
    tokens, sampled, logprobs = (
        np.asarray(tokens, np.int32),
        np.asarray(sampled, bool),
        np.asarray(logprobs, np.float32),
    )
    if not tokens.shape == sampled.shape == logprobs.shape:
        raise PackingError(f"{name}: {len(tokens)} tokens, {len(sampled)} of `sampled`, {len(logprobs)} of `logprobs`")
    if sampled[:1].any():
        raise PackingError(f"{name}: its first token was sampled, but nothing before predicts it; give the prompt too")
    logprobs = np.where(sampled, logprobs, np.float32(np.nan))
    advantages = np.broadcast_to(np.asarray(advantage, np.float32), tokens.shape)
    if not (np.isfinite(logprobs) & np.isfinite(advantages))[sampled].all():
        raise PackingError(f"{name}: a sampled token has no finite log-probability or advantage; leave the sample out")
    wanted, pads = sum(clip.tokens for clip in clips), int(np.sum((tokens == media_pad_id) & ~sampled))
    if pads != wanted:
        raise PackingError(f"{name}: {pads} media_pad tokens for {wanted} vision tokens of its clips; give one each")
    return Example(tokens, sampled.astype(np.float32), list(clips), False, name, logprobs, advantages)


def _repeats(tokens: Sequence[int], counts: Sequence[int], media_pad_id: int) -> np.ndarray:
    is_pad = np.asarray(tokens, np.int32) == media_pad_id
    if is_pad.sum() != len(counts):
        raise PackingError(
            f"{is_pad.sum()} media_pad tokens (id {media_pad_id}) for {len(counts)} clips; give one each"
        )
    repeats = np.ones(len(is_pad), np.int64)
    repeats[is_pad] = counts
    return repeats


def piece(example: Example, start: int, length: int) -> Example:
    """`length` tokens of a document without media, from `start` on.

    The last token of a piece is the first of the next, so that every token after the first is predicted once.
    """
    if start == 0 and length == len(example):
        return example
    _refuse_sample(example)
    return Example(example.tokens[start : start + length], example.loss_weights[start : start + length])


def truncate(example: Example, seq_len: int, model: K25Config) -> Example:
    """At most the first `seq_len` tokens, cut where no media block is torn."""
    if len(example) <= seq_len:
        return example
    _refuse_sample(example)
    begins = np.flatnonzero(example.tokens == model.media_begin_id)
    ends = np.flatnonzero(example.tokens == model.media_end_id)
    kept = int(np.sum(ends < seq_len))
    cut = seq_len if kept == len(begins) else min(seq_len, int(begins[kept]))
    return Example(example.tokens[:cut], example.loss_weights[:cut], example.clips[:kept], truncated=True)


def _refuse_sample(example: Example) -> None:
    if example.old_logprobs is not None:
        raise PackingError(f"{example.name}: a sample of {len(example)} tokens is not cut; raise data.seq_len")


class Rooms:
    """How much room is left in bins of one size. What comes goes where it leaves the least (best fit)."""

    def __init__(self, bins: int, size: int):
        self.used = [0] * bins
        self._size = size
        self._order = [(size, number) for number in range(bins)]  # (room, bin), rising

    @property
    def largest(self) -> int:
        """The most that still fits."""
        return self._order[-1][0] if self._order else 0

    def add(self, size: int) -> tuple[int, int] | None:
        """(bin, place in it) of something of this size, or None where it finds no room."""
        at = bisect.bisect_left(self._order, (size, -1))
        if at == len(self._order):
            return None
        room, number = self._order.pop(at)
        bisect.insort(self._order, (room - size, number))
        self.used[number] += size
        return number, self._size - room

    def copy(self) -> "Rooms":
        other = Rooms(0, self._size)
        other.used, other._order = list(self.used), list(self._order)
        return other


class Placed(NamedTuple):
    """An example in a batch: its row, its first column there, and the pack of each of its clips."""

    example: Example
    row: int
    column: int
    packs: tuple[int, ...]


class Filling:
    """A batch that is being filled: rooms in rows and packs, and what was placed, in this order."""

    def __init__(self, data: DataConfig):
        self.rows, self.packs = Rooms(data.batch_size, data.seq_len), Rooms(data.packs, data.pack_patches)
        self.placed: list[Placed] = []

    def add(self, example: Example) -> bool:
        """Put the example into the row and its clips into the packs where they leave the least room; or say no."""
        if len(example) > self.rows.largest:
            return False
        packs, chosen = self.packs, []
        if example.clips:
            packs = packs.copy()
            for clip in example.clips:
                where = packs.add(len(clip.patches))
                if where is None:
                    return False
                chosen.append(where[0])
        row, column = self.rows.add(len(example))
        self.packs = packs
        self.placed.append(Placed(example, row, column, tuple(chosen)))
        return True

    def copy(self) -> "Filling":
        other = copy.copy(self)
        other.rows, other.packs, other.placed = self.rows.copy(), self.packs.copy(), list(self.placed)
        return other


def build(fillings: Sequence[Sequence[Placed]], data: DataConfig, model: K25Config) -> Batch:
    """The batch whose rows and packs are, in this order, those of the fillings; `data` says how many it has in all.

    Clips are then balanced over all packs, which moves no token.
    """
    rows, packs = data.batch_size // len(fillings), data.packs // len(fillings)
    entries = [
        Placed(one.example, one.row + number * rows, one.column, tuple(pack + number * packs for pack in one.packs))
        for number, placed in enumerate(fillings)
        for one in placed
    ]
    clips = [clip for entry in entries for clip in entry.example.clips]
    planned = [pack for entry in entries for pack in entry.packs]
    vision = model.vision
    place = functools.partial(balance, config=vision, planned=planned)
    number = data.packs if clips else 0
    pack, starts = pack_clips(clips, number, data.pack_patches, vision.merge, vision.patch_dim, place)
    batch = _blank(pack, data, model)
    if any(entry.example.old_logprobs is not None for entry in entries):
        batch = with_samples(batch)
    documents, first_clip = [0] * data.batch_size, 0
    for entry in entries:
        documents[entry.row] += 1
        clip_starts = starts[first_clip : first_clip + len(entry.packs)]
        _write(batch, entry, documents[entry.row], clip_starts, model)
        first_clip += len(entry.packs)
    return batch


def _blank(pack: VisionPack, data: DataConfig, model: K25Config) -> Batch:
    shape = (data.batch_size, data.seq_len)
    return Batch(
        tokens_BL=np.full(shape, model.pad_id, np.int32),
        targets_BL=np.full(shape, model.pad_id, np.int32),
        loss_weights_BL=np.zeros(shape, np.float32),
        segments_BL=np.zeros(shape, np.int32),
        positions_BL=np.zeros(shape, np.int32),
        media_BL=np.full(shape, -1, np.int32),
        vision=pack,
    )


def with_samples(batch: Batch) -> Batch:
    """The batch as one of samples, though it holds none yet: loss_fn of train/rl.py takes it."""
    blank = lambda: np.full(batch.tokens_BL.shape, np.nan, np.float32)  # noqa: E731
    return batch.replace(old_logprobs_BL=blank(), advantages_BL=blank())


def row_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """What a batch has for each place of its rows, by name."""
    names = [f.name for f in dataclasses.fields(Batch) if f.name.endswith("_BL")]
    return {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}


def _write(batch: Batch, entry: Placed, segment: int, starts: np.ndarray, model: K25Config):
    example, row, column = entry.example, entry.row, entry.column
    length, is_media = len(example), example.tokens == model.media_pad_id
    if example.old_logprobs is not None:
        is_media &= example.loss_weights == 0
    place = (row, slice(column, column + length))
    before = (row, slice(column, column + length - 1))  # where the next token is in the same document
    batch.tokens_BL[place] = example.tokens
    batch.targets_BL[before] = example.tokens[1:]
    batch.loss_weights_BL[before] = np.where(is_media[1:], 0.0, example.loss_weights[1:])
    if example.old_logprobs is not None:
        batch.old_logprobs_BL[before] = example.old_logprobs[1:]
        batch.advantages_BL[before] = example.advantages[1:]
    batch.segments_BL[place] = segment
    batch.positions_BL[place] = np.arange(length)
    spans = [np.arange(start, start + clip.tokens) for start, clip in zip(starts, example.clips, strict=True)]
    if spans:
        columns = column + np.flatnonzero(is_media)
        batch.media_BL[row, columns] = np.concatenate(spans)


def pack_examples(examples: Sequence[Example], data: DataConfig, model: K25Config) -> Batch:
    """One batch of all the examples; raises PackingError when one does not fit."""
    filling = Filling(data)
    for index, example in enumerate(examples):
        if not filling.add(example):
            patches = sum(len(clip.patches) for clip in example.clips)
            raise PackingError(
                f"{example.name or f'examples[{index}]'} ({len(example)} tokens, {patches} patches) finds no room "
                f"in {data.batch_size} rows of {data.seq_len} tokens and {data.packs} packs of "
                f"{data.pack_patches} patches; raise one of these, or give fewer examples"
            )
    return build([filling.placed], data, model)


def pack_samples(samples: Sequence[Example], data: DataConfig, model: K25Config) -> Batch:
    """One batch of all samples (`make_sample`), the longest first; raises PackingError when one does not fit."""
    documents = [sample.name for sample in samples if sample.old_logprobs is None]
    if documents:
        raise PackingError(
            f"{documents[0] or 'an example'} has no log-probabilities of sampled tokens; use make_sample"
        )
    batch = pack_examples(sorted(samples, key=len, reverse=True), data, model)
    return batch if samples else with_samples(batch)


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
