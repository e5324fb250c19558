"""Records to an endless stream of packed batches that can be saved and resumed exactly (K2.5 §3.3, §3.8).

Every source is shuffled anew each epoch and cut into one part for each lane; records become examples in threads; each lane
fills its rows and packs (data/lane.py), and the lanes of this process together are its batch. The state is small and JSON.
"""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Sequence

import grain
import numpy as np

from k25_jax.config import DataConfig, K25Config, SourceConfig
from k25_jax.data.forms import prepare, unforeseen
from k25_jax.data.holdout import Part
from k25_jax.data.lane import Lane, Prepared, Stream
from k25_jax.data.mixture import Mixture, check_mixture, modality_of
from k25_jax.data.packing import Batch, Example, Filling, build, truncate
from k25_jax.data.records import DataError, Record, RecordError, Source
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

THREADS = 4  # that read and decode, for all lanes
AHEAD = 64  # records that are read ahead, for all lanes and sources: decoded images are large
BATCHES_AHEAD = 2


def make_pipeline(
    data: DataConfig, model: K25Config, steps: int, lanes: Sequence[int] | None = None, held_out: bool = False
) -> grain.DatasetIterator[Batch]:
    """An iterator of batches of some `lanes` of `data`, else of all, with `get_state`, `set_state` and `close`.

    `steps` is the length of the run, for schedules. Where data.lanes is 0 there is one. The state belongs to the batch that
    was handed out last, whatever was read ahead. With data.validation.one_in `held_out` says which part of the records:
    those, or the others. Raises DataError.
    """
    data = dataclasses.replace(data, lanes=data.lanes or 1)
    tokenizer = load_tokenizer(data.tokenizer)
    check(data, model, tokenizer)
    lanes = range(data.lanes) if lanes is None else lanes
    if not lanes or not all(0 <= lane < data.lanes for lane in lanes):
        raise DataError(f"lanes={list(lanes)} must be some of the data.lanes={data.lanes}")
    sources = [part_of(open_source(config), config, data, held_out) for config in data.sources]
    batches = PackedDataset(sources, data, model, tokenizer, steps, lanes)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD))


def part_of(source: Source, config: SourceConfig, data: DataConfig, held_out: bool) -> Source:
    """The records of a source that are trained on, or those held out; raises DataError where either are fewer than lanes."""
    one_in = data.validation.one_in
    if not one_in:
        return source
    parts = [Part(source, one_in, data.seed, held) for held in (False, True)]
    if min(map(len, parts)) < data.lanes:
        raise DataError(
            f"data.validation.one_in={one_in} leaves {len(parts[0])} of {len(source)} records of {config.path} for training, "
            f"{len(parts[1])} for validation, fewer than data.lanes={data.lanes}; lower it, or give data.validation.sources"
        )
    return parts[held_out]


def of_lanes(data: DataConfig, number: int) -> DataConfig:
    """The rows and packs of so many lanes."""
    share = {name: getattr(data, name) // data.lanes * number for name in ("batch_size", "packs")}
    return dataclasses.replace(data, lanes=number, **share)


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
    """A record to an example that fits a batch, or to the reason why there is none. Called in threads; keeps no state."""

    def __init__(self, tokenizer: Tokenizer, data: DataConfig, model: K25Config):
        """`data` has the rows and packs of one lane."""
        self.data, self.model = data, model
        self._tokenizer = tokenizer

    def __call__(self, record: Record) -> Prepared:
        """A record that cannot be used must not stop a run: raises only for a fault of our own code."""
        try:
            return Prepared(record.name, self._example(record))
        except RecordError as problem:
            return Prepared(record.name, problem=problem)
        except Exception as cause:  # a damaged file can break a library in ways that its documents do not name
            problem = unforeseen(cause)
            problem.__cause__ = cause  # for the log
            return Prepared(record.name, problem=problem)

    def _example(self, record: Record) -> Example:
        example = prepare(record, self._tokenizer, self.data, self.model)
        if example.clips:
            example = truncate(example, self.data.seq_len, self.model)
        if not example.loss_weights[1:].any():
            raise RecordError("no loss", f"no token to learn among {len(example)} (data.seq_len={self.data.seq_len})")
        if example.clips and not Filling(self.data).add(example):
            sizes = [len(clip.patches) for clip in example.clips]
            raise RecordError(
                "patches",
                f"{len(sizes)} clips of {sum(sizes)} patches exceed the {self.data.packs} packs of a lane, of "
                f"data.pack_patches={self.data.pack_patches}; raise these or lower data.max_image_patches",
            )
        return example


class PackedDataset(grain.IterDataset[Batch]):
    """Batches of some lanes; see `make_pipeline`."""

    def __init__(
        self,
        sources: Sequence[Source],
        data: DataConfig,
        model: K25Config,
        tokenizer: Tokenizer,
        steps: int,
        lanes: Sequence[int],
    ):
        super().__init__()
        self.data, self.model, self.lanes = data, model, lanes
        self._sources, self._steps = sources, steps
        self._preparer = Preparer(tokenizer, of_lanes(data, 1), model)
        self.modalities = [modality_of(s, config.modality) for s, config in zip(sources, data.sources, strict=True)]
        check_mixture(data, self.modalities)
        for source, config in zip(sources, data.sources, strict=True):
            if len(source) < data.lanes:
                raise DataError(
                    f"data.sources: {config.path} has {len(source)} records for data.lanes={data.lanes}; give each one"
                )

    def __iter__(self) -> "PackedIterator":
        return PackedIterator(self)

    def make_lane(self, number: int, pool: concurrent.futures.Executor) -> Lane:
        """Lane `number`, at its beginning."""
        data = self.data
        ahead = min(max(AHEAD // (len(self.lanes) * len(data.sources)), 1), 8)
        streams = []
        for place, (source, config) in enumerate(zip(self._sources, data.sources, strict=True)):
            epoch = len(range(number, len(source), data.lanes))
            limit = int(config.max_epochs * epoch) if config.max_epochs else np.inf
            records = records_of(source, data, place, number).map(self._preparer)
            streams.append(Stream(records, epoch, limit, pool, ahead))
        identity = {
            "records": [len(source) for source in self._sources],
            "modalities": self.modalities,
            "shuffle": data.shuffle,
            "seed": data.seed,
            "lane": [number, data.lanes],
        }
        mixture = Mixture(data, self.modalities, self._steps, number)
        return Lane(streams, mixture, self._preparer.data, self.model, identity)


def records_of(source: Source, data: DataConfig, place: int, lane: int) -> grain.MapDataset[Record]:
    """A lane's endless share of a source, which is shuffled anew each epoch."""
    stream = grain.MapDataset.source(source)
    if data.shuffle:
        seed = int(np.random.SeedSequence([data.seed, place]).generate_state(1)[0])
        stream = stream.shuffle(seed=seed)
    return stream.slice(slice(lane, None, data.lanes)).repeat()


class PackedIterator(grain.DatasetIterator[Batch]):
    """The batches of the lanes, one below the other."""

    def __init__(self, dataset: PackedDataset):
        super().__init__()
        self._dataset, self._data = dataset, of_lanes(dataset.data, len(dataset.lanes))
        self._pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="records")
        self._lanes = [dataset.make_lane(number, self._pool) for number in dataset.lanes]

    def __next__(self) -> Batch:
        return build([lane.next() for lane in self._lanes], self._data, self._dataset.model)

    def get_state(self) -> dict:
        """The states of the lanes."""
        return {"lanes": [lane.get_state() for lane in self._lanes]}

    def set_state(self, state: dict):
        """Continue after the batch that `state` belongs to; raises DataError when the data is not the same."""
        if len(state["lanes"]) != len(self._lanes):
            raise DataError(f"the saved data state is of {len(state['lanes'])} lanes, not of {len(self._lanes)}")
        for lane, own in zip(self._lanes, state["lanes"], strict=True):
            lane.set_state(own)

    def close(self):
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
        super().close()


def counts(iterator: grain.DatasetIterator[Batch]) -> dict[str, int]:
    """Of all lanes and batches handed out: batches, records read, examples truncated, records skipped by reason."""
    lanes = [lane["counts"] for lane in iterator.get_state()["lanes"]]
    added = {name: sum(one.get(name, 0) for one in lanes) for name in dict.fromkeys(n for one in lanes for n in one)}
    return added | {"batches": lanes[0]["batches"]}
