"""Records to an endless stream of packed batches that can be saved and resumed exactly (K2.5 §3.3, §3.8).

Every source is shuffled anew each epoch and cut into one part for each process; the sources are mixed by weight;
records become examples in threads; examples fill batches first-fit. The state of the iterator is small and JSON: where
the stream is, and which examples already read are still waiting. They are read again on restoring.
"""

import collections
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from k25_jax.config import DataConfig, K25Config
from k25_jax.data.forms import prepare
from k25_jax.data.packing import Batch, BatchBuilder, Example, split
from k25_jax.data.records import DataError, Record, RecordError, Source
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import Tokenizer, load_tokenizer
from k25_jax.vision.patchpack import fits

logger = logging.getLogger(__name__)

LOOKAHEAD = 8  # a batch is closed when so many examples are waiting for room
LOGGED = 20  # skipped records of one reason that are named in the log; after that every thousandth
READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)  # decoded images are large: a short buffer
BATCHES_AHEAD = 2
_CHANGED = RecordError("changed", "has fewer pieces than when the state was saved")


def make_pipeline(
    data: DataConfig, model: K25Config, shard_index: int = 0, shard_count: int = 1
) -> grain.DatasetIterator[Batch]:
    """An iterator of batches for process `shard_index` of `shard_count`, with `get_state`, `set_state` and `close`.

    The state belongs to the batch that was handed out last, whatever was read ahead. Raises DataError.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    check(data, model, tokenizer)
    if not 0 <= shard_index < shard_count:
        raise DataError(f"shard_index={shard_index} must lie in [0, shard_count={shard_count})")
    sources = [open_source(config) for config in data.sources]
    batches = PackedDataset(sources, Preparer(tokenizer, data, model), shard_index, shard_count)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD))


def check(data: DataConfig, model: K25Config, tokenizer: Tokenizer):
    """Raise DataError when data, model and tokenizer cannot go together."""
    if not data.sources:
        raise DataError("data.sources is empty; name at least one source")
    for name, least in (("seq_len", 2), ("seed", 0), ("packs", 0)):
        if getattr(data, name) < least:
            raise DataError(f"data.{name}={getattr(data, name)} must be at least {least}")
    if data.packs and data.pack_patches % model.vision.group:
        raise DataError(f"data.pack_patches={data.pack_patches} must be a multiple of {model.vision.group}")
    if tokenizer.vocab_size > model.text.vocab_size:
        raise DataError(
            f"data.tokenizer has {tokenizer.vocab_size} tokens, model.text.vocab_size={model.text.vocab_size}; raise it"
        )
    names = {"media_begin_id": "<|media_begin|>", "media_end_id": "<|media_end|>", "media_pad_id": "<|media_pad|>"}
    for field, name in names.items():
        if tokenizer.special[name] != getattr(model, field):
            raise DataError(
                f"model.{field}={getattr(model, field)}, but {name} is {tokenizer.special[name]} in "
                f"data.tokenizer={data.tokenizer!r}; use the tokenizer of this model, or set the field"
            )


class Preparer:
    """A record to examples that fit a batch, or to the reason why there are none. Called in threads; keeps no state."""

    def __init__(self, tokenizer: Tokenizer, data: DataConfig, model: K25Config):
        self.data, self.model = data, model
        self._tokenizer = tokenizer

    def __call__(self, record: Record) -> "Prepared":
        """Never raises: a record that cannot be used must not stop a run."""
        try:
            return Prepared(record.name, self._examples(record))
        except RecordError as problem:
            return Prepared(record.name, problem=problem)
        except Exception as cause:  # a damaged file can break a library in ways that its documents do not name
            problem = RecordError("unknown", f"{type(cause).__name__}: {cause}")
            problem.__cause__ = cause  # for the log
            return Prepared(record.name, problem=problem)

    def _examples(self, record: Record) -> list[Example]:
        example = prepare(record, self._tokenizer, self.data, self.model)
        pieces = [piece for piece in split(example, self.data.seq_len, self.model) if piece.loss_weights[1:].any()]
        if not pieces:
            raise RecordError("no loss", f"no token to learn among {len(example)} (data.seq_len={self.data.seq_len})")
        sizes = [len(clip.patches) for clip in pieces[0].clips]
        if not fits(sizes, self.data.packs, self.data.pack_patches):
            raise RecordError(
                "patches",
                f"{len(sizes)} clips of {sum(sizes)} patches exceed data.packs={self.data.packs} of "
                f"data.pack_patches={self.data.pack_patches}; raise these or lower data.max_image_patches",
            )
        return pieces


class Prepared(NamedTuple):
    """What became of a record."""

    name: str
    examples: Sequence[Example] = ()
    problem: RecordError | None = None


class _Waiting(NamedTuple):
    """An example, with where it came from: record of the stream, piece of the record."""

    index: int
    piece: int
    example: Example


class PackedDataset(grain.IterDataset[Batch]):
    """Batches from sources; see `make_pipeline`."""

    def __init__(self, sources: Sequence[Source], preparer: Preparer, shard_index: int = 0, shard_count: int = 1):
        super().__init__()
        data = preparer.data
        self.preparer = preparer
        self.records = mix(sources, data, shard_index, shard_count).map(preparer)
        self.identity = {
            "records": [len(source) for source in sources],
            "weights": [config.weight for config in data.sources],
            "shuffle": data.shuffle,
            "seed": data.seed,
            "shard": [shard_index, shard_count],
        }
        total = sum(self.identity["weights"])
        passes = zip(self.identity["records"], self.identity["weights"], strict=True)
        self.patience = 2 * math.ceil(max(records * total / weight for records, weight in passes)) + len(sources)

    def __iter__(self) -> "PackedIterator":
        return PackedIterator(self)


def mix(sources: Sequence[Source], data: DataConfig, shard_index: int, shard_count: int) -> grain.MapDataset[Record]:
    """An endless stream of records: each source shuffled each epoch, this process's share of it, mixed by weight."""
    streams = []
    for number, (source, config) in enumerate(zip(sources, data.sources, strict=True)):
        if len(source) < shard_count:
            raise DataError(
                f"data.sources: {config.path} has {len(source)} records for {shard_count} processes; give each one"
            )
        stream = grain.MapDataset.source(source)
        if data.shuffle:
            seed = int(np.random.SeedSequence([data.seed, number]).generate_state(1)[0])
            stream = stream.shuffle(seed=seed)
        streams.append(stream.slice(slice(shard_index, None, shard_count)).repeat())
    return grain.MapDataset.mix(streams, [config.weight for config in data.sources])


class PackedIterator(grain.DatasetIterator[Batch]):
    """Fills batches first-fit. Waiting examples are tried first in the next batch, in the order in which they came."""

    def __init__(self, dataset: PackedDataset):
        super().__init__(iter(dataset.records.to_iter_dataset(read_options=READ_OPTIONS)))
        self._dataset = dataset
        self._restart(next_index=0, next_piece=0)
        self._waiting: list[_Waiting] = []
        self._counts = collections.Counter(batches=0, records=0, truncated=0)

    def __next__(self) -> Batch:
        builder = BatchBuilder(self._dataset.preparer.data, self._dataset.preparer.model)
        waiting = [entry for entry in self._waiting if not builder.add(entry.example)]
        while len(waiting) < LOOKAHEAD and not builder.full:
            entry = self._read()
            if not builder.add(entry.example):
                waiting.append(entry)
        self._waiting = waiting
        self._counts["batches"] += 1
        return builder.build()

    def get_state(self) -> dict:
        """Where the stream is, what waits, and the counts; JSON."""
        return {
            "next_index": self._index,
            "next_piece": self._piece,
            "waiting": [[entry.index, entry.piece] for entry in self._waiting],
            "counts": dict(self._counts),
            "identity": dict(self._dataset.identity),
        }

    def set_state(self, state: dict):
        """Continue after the batch that `state` belongs to; raises DataError when the data is not the same."""
        if state["identity"] != self._dataset.identity:
            raise DataError(
                f"the saved data state is of {state['identity']}, the data is now {self._dataset.identity}; restore "
                "the sources, seed and number of processes, or start without the data state"
            )
        self._restart(state["next_index"], state["next_piece"])
        self._counts = collections.Counter(state["counts"])
        self._waiting = []
        for index, piece in state["waiting"]:
            prepared = self._dataset.records[index]
            if piece < len(prepared.examples):
                self._waiting.append(_Waiting(index, piece, prepared.examples[piece]))
            else:
                self._skip(prepared.name, prepared.problem or _CHANGED)

    def _restart(self, next_index: int, next_piece: int):
        self._parent.set_state({"next_index": next_index})
        self._index, self._piece = next_index, next_piece  # of the next example
        self._record: Prepared | None = None  # the record at _index, once it was read

    def _read(self) -> _Waiting:
        """The next example of the stream."""
        for _ in range(self._dataset.patience):
            if self._record is None:
                self._record = next(self._parent)
            record, index, piece = self._record, self._index, self._piece
            if piece < len(record.examples):
                self._counts["truncated"] += record.examples[piece].truncated
                self._advance(record, piece + 1)
                return _Waiting(index, piece, record.examples[piece])
            self._skip(record.name, record.problem or _CHANGED)
            self._advance(record, piece)
        raise DataError(
            f"all of the last {self._dataset.patience} records were skipped ({dict(self._counts)}); the log says why"
        )

    def _advance(self, record: Prepared, piece: int):
        if piece < len(record.examples):
            self._piece = piece
        else:
            self._counts["records"] += 1
            self._index, self._piece, self._record = self._index + 1, 0, None

    def _skip(self, name: str, problem: RecordError):
        key = f"skipped: {problem.reason}"
        self._counts[key] += 1
        if self._counts[key] <= LOGGED or self._counts[key] % 1000 == 0:
            logger.warning(
                "%s: skipped (%s, number %d): %s",
                *(name, problem.reason, self._counts[key], problem),
                exc_info=problem.__cause__ if problem.reason == "unknown" else None,
            )


def counts(iterator: grain.DatasetIterator[Batch]) -> dict[str, int]:
    """Of all batches handed out: batches, records read, examples truncated, records skipped by reason."""
    return dict(iterator.get_state()["counts"])
