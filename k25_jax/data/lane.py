"""One lane of a batch: the documents that wait, and how they fill rows and packs (K2.5 §3.3, §3.8).

Images come in full packs or not at all: documents with clips wait until they fill the packs to the brim, most of them in
order of arrival, then the largest, and the small ones in the gaps. They are handed out when their modality lacks at least
half of what they hold. Text takes the rest of the rows, the longest that fits first, and plain text is cut at the end of a
row. A text that has waited for long goes first, if text lacks any, so nothing waits for ever.

A lane depends on its number, the number of lanes, the seed and the data; never on threads or hosts. Its state is small and
JSON: how far each source was read, which documents wait, and the account of the mixture. What waits is read again on
restoring.
"""

import bisect
import collections
import concurrent.futures
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain

from k25_jax.config import DataConfig, K25Config
from k25_jax.data.mixture import Mixture
from k25_jax.data.packing import Example, Filling, Placed, piece, truncate
from k25_jax.data.records import DataError, RecordError

logger = logging.getLogger(__name__)

LOOKAHEAD = 32  # documents without clips that wait, at most
ROWS_AHEAD, PACKS_AHEAD = 2.0, 1.5  # what waits, in batches, at most
OLD = 8  # batches after which a document goes first
FIRST_COME = 0.6  # the part of the packs that goes to documents in order of arrival
SHORTEST = 64  # a text is cut to fill the end of a row, if it is this part of the row or more
ADVISED_AT = (100, 1000, 10000)  # batches after which packs that do not go with the share of vision are named
FEW_PACKS, MANY_PACKS, MANY_PACKS_IN_LANES = 1.02, 0.25, 0.8  # patches that are wanted, over those that packs hold
LOGGED = 20  # skipped records of one reason that are named in the log; after that every thousandth
MODALITY = RecordError("modality", "has media, but its source counts as text; set the modality of the source to vision")
CHANGED = RecordError("changed", "is shorter than when the state was saved")


class Prepared(NamedTuple):
    """What became of a record."""

    name: str
    example: Example | None = None
    problem: RecordError | None = None


class Stream:
    """The records of one source in one lane, prepared a few ahead in threads."""

    def __init__(
        self, records: grain.MapDataset, epoch: int, limit: float, pool: concurrent.futures.Executor, ahead: int
    ):
        self.epoch, self.limit = epoch, limit  # records in an epoch; records to give at most
        self.next_index = 0
        self._records, self._pool, self._ahead = records, pool, ahead
        self._coming: collections.deque[concurrent.futures.Future[Prepared]] = collections.deque()

    @property
    def over(self) -> bool:
        return self.next_index >= self.limit

    def take(self) -> tuple[int, Prepared]:
        """The next record and its number."""
        while len(self._coming) <= self._ahead and self.next_index + len(self._coming) < self.limit:
            self._coming.append(self._pool.submit(self._records.__getitem__, self.next_index + len(self._coming)))
        self.next_index += 1
        return self.next_index - 1, self._coming.popleft().result()

    def go_to(self, index: int):
        """Continue with record `index`."""
        for future in self._coming:
            future.cancel()
        self._coming.clear()
        self.next_index = index

    def read_again(self, index: int) -> concurrent.futures.Future[Prepared]:
        """A record that was taken before."""
        return self._pool.submit(self._records.__getitem__, index)


@dataclass(eq=False)
class Waiting:
    """A document, or what is left of it from token `start` on, and where it came from."""

    source: int
    index: int
    start: int
    waits: int  # batches that went without it
    example: Example

    @property
    def rest(self) -> int:
        return len(self.example) - self.start

    @property
    def patches(self) -> int:
        return sum(len(clip.patches) for clip in self.example.clips)

    @property
    def largest_clip(self) -> int:
        return max(len(clip.patches) for clip in self.example.clips)

    @property
    def plain(self) -> bool:
        """Text that is learnt as a whole, which may be cut anywhere."""
        return bool(self.example.loss_weights[self.start + 1 :].all())

    def part(self, length: int) -> Example:
        """Its next `length` tokens."""
        return piece(self.example, self.start, length)

    def advance(self, length: int, seq_len: int) -> bool:
        """Leave out the next `length` tokens, and pieces after them of which nothing is learnt; False at the end."""
        while length < self.rest:
            self.start += length - 1
            length = min(self.rest, seq_len)
            if self.example.loss_weights[self.start + 1 : self.start + length].any():
                return True
        return False


class Lane:
    """Fills one batch after the other with what the mixture asks for."""

    def __init__(self, streams: Sequence[Stream], mixture: Mixture, data: DataConfig, model: K25Config, identity: dict):
        """`data` has the rows and packs of this lane alone."""
        self._streams, self._mixture, self._data, self._model = streams, mixture, data, model
        self._identity = identity
        self._restart()

    def _restart(self):
        self._waiting: list[Waiting] = []
        self.counts = collections.Counter(batches=0, records=0, truncated=0, patches=0)
        self._dry: set[int] = set()  # sources that ended because nothing in them could be used

    def next(self) -> list[Placed]:
        """What the next batch holds; nothing when all budgets and epochs are spent. Raises DataError."""
        mixture, filling = self._mixture, Filling(self._data)
        mixture.begin(self.counts["batches"])
        self._gather("vision")
        self._gather("text")
        for entry in [entry for entry in self._waiting if entry.waits >= OLD and not entry.example.clips]:
            room = self._data.batch_size * self._data.seq_len - sum(filling.rows.used)
            if mixture.goal(mixture.modalities[entry.source], room) > 0:
                self._place(filling, entry, self._length(entry))
        filling = self._with_clips(filling)
        self._fill(filling)
        self._cut(filling)
        for entry in self._waiting:
            entry.waits += not entry.example.clips
        self.counts["batches"] += 1
        self.counts["patches"] += sum(filling.packs.used)
        if self.counts["batches"] in ADVISED_AT and self._identity["lane"][0] == 0:
            self._advise()
        if not filling.placed:
            self._end()
        return filling.placed

    def _advise(self):
        """Warn when the packs are far too many or too few for the share of vision that is asked for."""
        data, lanes = self._data, self._identity["lane"][1]
        tokens = self._mixture.tokens("vision")
        if not tokens or not data.packs or not self._mixture.due("vision"):
            return
        wanted = self._mixture.due("vision") * data.batch_size * data.seq_len * self.counts["patches"] / tokens
        part = wanted / (data.packs * data.pack_patches)
        if FEW_PACKS < part or part < (MANY_PACKS if lanes == 1 else MANY_PACKS_IN_LANES):
            logger.warning(
                "the data has %.2f of the patches that data.packs=%d x data.pack_patches=%d hold: %s; the share of vision "
                "asks for about data.packs=%d",
                *(part, data.packs * lanes, data.pack_patches),
                "less vision is read than asked for" if part > 1 else "packs stay empty or come seldom",
                max(math.ceil(wanted / data.pack_patches), 1) * lanes,
            )

    # -------------------------------------------------------------------------------------------------------- reading
    def _gather(self, modality: str):
        """Read until enough of this modality waits."""
        while (source := self._mixture.next_source(modality)) is not None and self._lacks(modality):
            self._read(source)

    def _lacks(self, modality: str) -> bool:
        data, slots = self._data, self._data.batch_size * self._data.seq_len
        own = [entry for entry in self._waiting if self._mixture.modalities[entry.source] == modality]
        texts = [entry.rest for entry in own if not entry.example.clips]
        if len(texts) >= LOOKAHEAD or (len(texts) > 4 and sum(texts) >= ROWS_AHEAD * slots):
            return False
        if modality == "text" or not data.packs:
            return True
        clips = [entry for entry in own if entry.example.clips]
        few = sum(entry.patches for entry in clips) < PACKS_AHEAD * data.packs * data.pack_patches
        return few and sum(entry.rest for entry in clips) < PACKS_AHEAD * slots

    def _read(self, number: int):
        """One more document of a source, or note that it has no more."""
        stream, mixture = self._streams[number], self._mixture
        for _ in range(2 * stream.epoch + 1):
            if stream.over:
                break
            index, record = stream.take()
            self.counts["records"] += 1
            problem = record.problem
            if problem is None and record.example.clips and mixture.modalities[number] == "text":
                problem = MODALITY
            if problem is None:
                self.counts["truncated"] += record.example.truncated
                self._wait(Waiting(number, index, 0, 0, record.example))
                return
            self._skip(record.name, problem)
        else:
            self._dry.add(number)
            logger.warning(
                "all of the last %d records of %s were skipped; it gives no more", 2 * stream.epoch + 1,
                self._data.sources[number].path,
            )  # fmt: skip
        mixture.gone[number] = True
        mixture.begin(self.counts["batches"])

    def _wait(self, entry: Waiting):
        self._waiting.append(entry)
        self._mixture.waiting[entry.source] += entry.rest

    def _leave(self, entry: Waiting):
        self._waiting.remove(entry)
        self._mixture.waiting[entry.source] -= entry.rest

    def _skip(self, name: str, problem: RecordError):
        key = f"skipped: {problem.reason}"
        self.counts[key] += 1
        if self.counts[key] <= LOGGED or self.counts[key] % 1000 == 0:
            logger.warning(
                "%s: skipped (%s, number %d): %s",
                *(name, problem.reason, self.counts[key], problem),
                exc_info=problem.__cause__ if problem.reason == "unknown" else None,
            )

    # -------------------------------------------------------------------------------------------------------- filling
    def _place(self, filling: Filling, entry: Waiting, length: int) -> bool:
        """Put `length` tokens of the entry into the batch; says whether there was room."""
        example = entry.example if entry.example.clips else entry.part(length)
        if not length or not filling.add(example):
            return False
        self._taken(entry, len(example))
        return True

    def _taken(self, entry: Waiting, length: int):
        mixture, modality = self._mixture, self._mixture.modalities[entry.source]
        mixture.hand_out(entry.source, length)
        mixture.waiting[entry.source] -= entry.rest
        if not entry.example.clips and entry.advance(length, self._data.seq_len):
            mixture.waiting[entry.source] += entry.rest
            entry.waits = 0
        else:
            self._waiting.remove(entry)
        if mixture.left(modality) <= 0:
            self._spend(modality)

    def _spend(self, modality: str):
        """The budget is spent: what waits is not wanted any more."""
        self._mixture.spent[modality] = True
        for entry in [entry for entry in self._waiting if self._mixture.modalities[entry.source] == modality]:
            self._leave(entry)
        self._mixture.begin(self.counts["batches"])

    def _length(self, entry: Waiting) -> int:
        """Tokens of a text that go into a row together: what is left, as much as the budget and a row allow."""
        left = self._mixture.left(self._mixture.modalities[entry.source])
        return int(min(entry.rest, self._data.seq_len, left))

    def _with_clips(self, before: Filling) -> Filling:
        """`before` with documents with clips, in full packs, if it is their turn."""
        mixture, data = self._mixture, self._data
        entries = [entry for entry in self._waiting if entry.example.clips]
        if not entries or not mixture.due("vision"):
            return before
        slots, capacity = data.batch_size * data.seq_len, data.packs * data.pack_patches
        goal, left = mixture.goal("vision", slots - sum(before.rows.used)), mixture.left("vision")
        patches, tokens = sum(entry.patches for entry in entries), sum(entry.rest for entry in entries)
        alone = not mixture.due("text")
        small = capacity * tokens / patches > slots  # so small that rows are full before packs
        limit = min(left, max(goal, 0)) if small and not alone else left
        entries = self._in_turn(entries, small)
        filling, chosen, taken = before.copy(), [], 0
        for entry in entries:
            if taken + entry.rest <= limit and filling.add(entry.example):
                chosen.append(entry)
                taken += entry.rest
        if not chosen and left < min(entry.rest for entry in entries):
            return self._last_with_clips(before, entries)
        if not chosen or (not alone and taken > 2 * goal):
            return before
        more = any(not self._streams[i].over for i in range(len(self._streams)) if mixture.targets[i])
        brim = patches >= capacity or small or not more or left <= tokens
        for entry in entries:
            entry.waits += 1
        if not brim and not any(entry.waits > OLD for entry in entries):
            return before
        for entry in chosen:
            self._taken(entry, entry.rest)
        return filling

    def _in_turn(self, entries: list[Waiting], small: bool) -> list[Waiting]:
        """Most of a batch in order of arrival, then what is largest, and so on down to what fills the gaps."""
        size = (lambda entry: entry.rest) if small else (lambda entry: entry.patches)
        data = self._data
        bound = FIRST_COME * (data.batch_size * data.seq_len if small else data.packs * data.pack_patches)
        first = bisect.bisect_right(list(itertools.accumulate(map(size, entries))), bound) + 1
        largest = (lambda entry: -entry.rest) if small else (lambda entry: -entry.largest_clip)
        return entries[:first] + sorted(entries[first:], key=largest)

    def _last_with_clips(self, filling: Filling, entries: list[Waiting]) -> Filling:
        """The rest of the budget is shorter than any document: the one of which most can be kept is cut."""
        left = int(self._mixture.left("vision"))
        cuts = [(truncate(entry.example, left, self._model), entry) for entry in entries]
        cuts = [(cut, entry) for cut, entry in cuts if cut.clips and cut.loss_weights[1:].any()]
        if cuts:
            cut, entry = max(cuts, key=lambda pair: len(pair[0]))
            if not filling.add(cut):
                return filling  # there is room in the next batch
            self._mixture.hand_out(entry.source, len(cut))
        self._spend("vision")
        return filling

    def _fill(self, filling: Filling):
        """Documents without clips, whole, the longest that fits first."""
        while entry := self._longest(filling):
            self._place(filling, entry, self._length(entry))
            self._gather(self._mixture.modalities[entry.source])

    def _longest(self, filling: Filling) -> Waiting | None:
        fitting = [e for e in self._texts(filling) if 0 < self._length(e) <= filling.rows.largest]
        return max(fitting, key=self._length, default=None)

    def _texts(self, filling: Filling) -> list[Waiting]:
        """What waits without clips, less that of a modality of vision that has its share."""
        mixture = self._mixture
        room = self._data.batch_size * self._data.seq_len - sum(filling.rows.used)
        wanted = not mixture.due("text") or mixture.goal("vision", room) > 0
        return [
            entry
            for entry in self._waiting
            if not entry.example.clips and (wanted or mixture.modalities[entry.source] == "text")
        ]

    def _cut(self, filling: Filling):
        """Plain text, the oldest first, cut to fill what is left of the rows."""
        shortest = max(2, self._data.seq_len // SHORTEST)
        while filling.rows.largest >= shortest:
            entry = next((entry for entry in self._texts(filling) if entry.plain), None)
            if entry is None:
                return
            self._place(filling, entry, min(self._length(entry), filling.rows.largest))
            self._gather(self._mixture.modalities[entry.source])

    def _end(self):
        """Nothing was handed out. Raises DataError when that is the fault of records that cannot be used."""
        if self._dry and not any(self._mixture.targets):
            raise DataError(
                f"all of the last {max(2 * self._streams[number].epoch + 1 for number in self._dry)} records were "
                f"skipped ({dict(self.counts)}); the log says why"
            )

    # ---------------------------------------------------------------------------------------------------------- state
    def get_state(self) -> dict:
        """Where each source is, what waits, the counts and the account of the mixture; JSON."""
        return {
            "streams": [stream.next_index for stream in self._streams],
            "waiting": [[entry.source, entry.index, entry.start, entry.waits] for entry in self._waiting],
            "counts": dict(self.counts),
            "mixture": self._mixture.get_state(),
            "dry": sorted(self._dry),
            "identity": dict(self._identity),
        }

    def set_state(self, state: dict):
        """Continue after the batch that `state` belongs to; raises DataError when the data is not the same."""
        if state["identity"] != self._identity:
            raise DataError(
                f"the saved data state is of {state['identity']}, the data is now {self._identity}; restore the "
                "sources, seed and data.lanes, or start without the data state"
            )
        self._restart()
        self._mixture.set_state(state["mixture"])
        self.counts, self._dry = collections.Counter(state["counts"]), set(state["dry"])
        for stream, index in zip(self._streams, state["streams"], strict=True):
            stream.go_to(index)
        coming = [self._streams[source].read_again(index) for source, index, _, _ in state["waiting"]]
        for (source, index, start, waits), future in zip(state["waiting"], coming, strict=True):
            record = future.result()
            if record.example is not None and start + 1 < len(record.example):
                self._wait(Waiting(source, index, start, waits, record.example))
            else:
                self._skip(record.name, record.problem or CHANGED)
