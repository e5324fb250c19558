"""Every record of some sources read in full, and what they hold counted (K2.5 §3.3).

`collect` is what `k25 data build`, `inspect` and `check` have in common: each record is decoded and tokenised as for
training, in several processes; what was found adds up in a `Counts`.
"""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from k25_jax.config import DataConfig, K25Config, SourceConfig
from k25_jax.data.forms import form_of, prepare, unforeseen
from k25_jax.data.normalise import canonical
from k25_jax.data.packing import Example
from k25_jax.data.records import DataError, Record, RecordError, Source
from k25_jax.data.sources import open_source
from k25_jax.data.workers import DEADLINE, Lost, Unit, run
from k25_jax.text.tokenizer import Tokenizer, load_tokenizer

UNIT = 128  # records between two results of a worker
SUMMED = ("records", "tokens", "loss_tokens", "media_tokens", "clips", "patches")


class Bad(NamedTuple):
    """A record that cannot be used."""

    index: int
    name: str
    reason: str
    detail: str


@dataclass
class Counts:
    """What records hold. `forms`: form -> `SUMMED`; `lengths`: n -> records of at most 2^n tokens, and more than half."""

    forms: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: collections.Counter = field(default_factory=collections.Counter)
    bad: list[Bad] = field(default_factory=list)
    left_out: collections.Counter = field(default_factory=collections.Counter)  # files that gave no record, by reason

    def add(self, form: str, example: Example, media_pad_id: int):
        """Count one good record."""
        row = self.forms.setdefault(form, dict.fromkeys(SUMMED, 0))
        found = (
            1,
            len(example),
            int(np.count_nonzero(example.loss_weights[1:])),
            int(np.count_nonzero(example.tokens == media_pad_id)),
            len(example.clips),
            sum(len(clip.patches) for clip in example.clips),
        )
        for key, value in zip(SUMMED, found, strict=True):
            row[key] += value
        self.lengths[math.ceil(math.log2(len(example)))] += 1

    def merge(self, other: "Counts"):
        """Add what another counted."""
        for form, row in other.forms.items():
            mine = self.forms.setdefault(form, dict.fromkeys(SUMMED, 0))
            for key in SUMMED:
                mine[key] += row[key]
        self.lengths.update(other.lengths)
        self.bad += other.bad

    @property
    def good(self) -> int:
        return self.total("records")

    def total(self, key: str) -> int:
        """The sum of one of `SUMMED` over the forms."""
        return sum(row[key] for row in self.forms.values())

    @property
    def reasons(self) -> dict[str, int]:
        """Bad records by reason, most frequent first."""
        found = collections.Counter(bad.reason for bad in self.bad)
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def summary(self) -> dict:
        """All but the names of bad records, as JSON has it; in an order that does not depend on who was first."""
        return {
            "records": self.good + len(self.bad),
            "good": self.good,
            "bad": self.reasons,
            "left_out": dict(sorted(self.left_out.items())),
            **{key: self.total(key) for key in SUMMED[1:]},
            "forms": {form: self.forms[form] for form in sorted(self.forms)},
            "lengths": {str(2**power): self.lengths[power] for power in sorted(self.lengths)},
        }

    def to_json(self) -> dict:
        """Everything; `from_json` reads it."""
        return {"forms": self.forms, "lengths": {str(k): v for k, v in self.lengths.items()}, "bad": self.bad}

    @classmethod
    def from_json(cls, values: dict) -> "Counts":
        """What `to_json` wrote."""
        lengths = collections.Counter({int(k): v for k, v in values["lengths"].items()})
        return cls(values["forms"], lengths, [Bad(*bad) for bad in values["bad"]])


class Joined:
    """Several sources one after another."""

    def __init__(self, configs: Sequence[SourceConfig]):
        self.sources: list[Source] = [open_source(config) for config in configs]
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        source, place = self._place(index)
        return source[place]

    @property
    def left_out(self) -> collections.Counter[str]:
        """Files of all sources that gave no record, by reason."""
        return sum((source.left_out for source in self.sources), collections.Counter())

    def label(self, index: int) -> str:
        """What the record is called; it is not read."""
        source, place = self._place(index)
        return source.label(place)

    def _place(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[number], index - (int(self._ends[number - 1]) if number else 0)


@dataclass(frozen=True)
class Reader:
    """How records are read: the configuration that they are tokenised and scaled down for."""

    sources: tuple[SourceConfig, ...]
    data: DataConfig
    model: K25Config

    def start(self) -> Callable[[Unit, Lost, Callable[[int], None]], dict]:
        """In a worker: count units."""
        joined, tokenizer = Joined(self.sources), load_tokenizer(self.data.tokenizer)

        def work(unit: Unit, lost: Lost, begin: Callable[[int], None]) -> dict:
            counts = Counts()
            for index in range(*unit[1:]):
                begin(index)
                self.examine(index, joined, tokenizer, lost, counts)
            return counts.to_json()

        return work

    def examine(
        self,
        index: int,
        joined: Joined,
        tokenizer: Tokenizer,
        lost: Lost,
        counts: Counts,
        change: Callable[[Record], Record] = lambda record: record,
    ) -> Record | None:
        """Read one record as `change` makes it, count it, and return it if it is good."""
        name = joined.label(index)
        try:
            if index in lost:
                raise RecordError(*lost[index])
            record = change(canonical(joined[index]))
            example = prepare(record, tokenizer, self.data, self.model)
            counts.add(form_of(record.data), example, self.model.media_pad_id)
            return record
        except DataError:
            raise
        except RecordError as problem:
            reason, detail = problem.reason, str(problem)
        except MemoryError:
            reason, detail = "memory", "more memory was asked for than a worker has"
        except Exception as problem:  # a damaged file can break a library in ways that its documents do not name
            reason, detail = "unknown", str(unforeseen(problem))
        counts.bad.append(Bad(index, name, reason, detail))
        return None


def units(total: int, size: int, step: int = 1) -> list[Unit]:
    """Ranges of about `size` read records each; every `step`-th of `total` records is read."""
    firsts = range(0, total, size * step)
    return [Unit(number, first, min(total, first + size * step), step) for number, first in enumerate(firsts)]


def collect(
    reader: Reader,
    limit: int = 0,
    workers: int = 0,
    deadline: float = DEADLINE,
    report: Callable[[int, int, int], None] = lambda done, total, bad: None,
) -> Counts:
    """Read all records, or `limit` of them evenly spaced; `report` hears done, total and bad. Raises DataError."""
    joined = Joined(reader.sources)
    total = len(joined)
    step = math.ceil(total / limit) if limit else 1
    counts, parts = Counts(left_out=joined.left_out), units(total, UNIT, step)
    read = len(range(0, total, step))
    for part in _counted(reader, parts, workers, deadline, lambda done: report(done, read, len(counts.bad))):
        counts.merge(part)
    counts.bad.sort()
    report(read, read, len(counts.bad))
    return counts


def _counted(reader: Reader, parts: list[Unit], workers: int, deadline: float, report) -> Iterator[Counts]:
    for _, result in run(reader, parts, workers, deadline, report):
        yield Counts.from_json(result)
