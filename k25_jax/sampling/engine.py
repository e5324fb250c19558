"""The sampling engine: continuous batching over a paged latent cache, synchronous and in one thread (K2.5 §4).

Each `step` decodes a token of every running answer and reads pieces of prompts beside them. Prompts that begin alike share
full pages of the cache, the samples of one prompt too. When pages run out the youngest answer leaves and is computed
again later, with its tokens as a part of its prompt; the oldest always goes on.

Drawn tokens do not depend on the company, except where rounding decides: a batch of another shape may add up in another
order, so that two tokens with the same probability to six digits may change places.
"""

import bisect
import collections
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

import jax
import numpy as np

from k25_jax.config import K25Config
from k25_jax.sampling.encoder_cache import EncoderCache, packs
from k25_jax.sampling.layout import Layout, devices_of, engine_mesh
from k25_jax.sampling.model_runner import Drawn, ModelRunner, Plan
from k25_jax.sampling.requests import (
    Completion,
    EngineConfig,
    EngineError,
    Event,
    FinishEvent,
    Overloaded,
    Request,
    TokenEvent,
    check_request,
)
from k25_jax.sampling.sequences import Home, Sequence, images_of
from k25_jax.text.stops import StopTexts
from k25_jax.text.tokenizer import Tokenizer

LATENTS = ("keep", "recompute", "drain")


class Flight(NamedTuple):
    """A step that was sent off: the sequence of each drawn token or None, and the version of the weights."""

    drawn: Drawn
    sequences: list[Sequence | None]
    version: int


class Engine:
    """A model that answers many requests at once. Not thread-safe: see sampling/async_engine.py.

    `tokenizer` is needed for stop texts only. The engine runs on `devices`, by default on those where `params` lie, and
    takes its own copy of these, laid out in its own way (sampling/layout.py).
    """

    def __init__(
        self,
        params,
        config: K25Config,
        settings: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        version: int = 0,
        devices: Items[jax.Device] | None = None,
    ):
        self.config, self.settings, self.tokenizer = config, settings or EngineConfig(), tokenizer
        layout = Layout(engine_mesh(config, devices or devices_of(params), self.settings.tensor))
        self._share = s = self.settings.share(layout.devices)
        self.max_length = min(s.max_length or config.text.max_length, config.text.max_length, s.pages * s.page_size)
        width = -(-self.max_length // s.page_size)
        self._runner = ModelRunner(params, config, s, layout, width)
        self._homes = [Home(z, s.rows[-1], s.pages, width) for z in range(layout.devices)]
        self._features = EncoderCache(s.vision_tokens)
        self._waiting: list[Sequence] = []  # both by arrival
        self._running: list[Sequence] = []
        self._flight: Flight | None = None
        self._next: tuple[dict, int] | None = None  # weights that wait for the answers under way
        self._events: list[Event] = []
        self._ids, self._orders = itertools.count(), itertools.count()
        self._version, self._epoch = version, 0
        self._counts = dict.fromkeys(("steps", "drawn", "read", "reused", "preempted", "encoded"), 0)

    # ------------------------------------------------------------------------------------------------- what callers do
    def warm_up(self) -> None:
        """Compile all programs, so that no request waits for the compiler."""
        for _ in self.compiling():
            pass

    def compiling(self) -> Iterator[str]:
        """`warm_up` a program at a time, those first that a first request needs; from any thread, beside steps."""
        return self._runner.warm_up()

    def submit(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises PromptError for one that can never be answered, Overloaded when the queue is full.
        """
        self.check(request)
        if len(self._waiting) + request.n > self.settings.queue:
            raise Overloaded(
                f"{len(self._waiting)} samples wait and the queue holds {self.settings.queue}: no room for n={request.n} "
                "more; try again later, or raise engine.queue"
            )
        number, images = next(self._ids), images_of(request, self.config.media_pad_id)
        for sample in range(request.n):
            stops = StopTexts(self.tokenizer, request.stop, request.form) if request.stop else None
            self._waiting.append(
                Sequence(number, sample, next(self._orders), request, images, stops, [int(t) for t in request.tokens])
            )
        return number

    def check(self, request: Request) -> None:
        """Raise PromptError for a request that this engine can never answer."""
        finds_texts = self.tokenizer is not None
        check_request(request, self.config, self.settings, self.max_length, finds_texts, self.sees)

    def abort(self, number: int) -> bool:
        """End a request; its finish events come with the next step. False when it is not here (any more)."""
        mine = [sequence for sequence in (*self._running, *self._waiting) if sequence.id == number]
        for sequence in mine:
            self._finish(sequence, "abort")
        return bool(mine)

    def update_weights(self, params, version: int, latents: str = "keep") -> None:
        """Go on with other weights of the same model, of which the engine takes a copy.

        `latents` says what becomes of answers under way. "keep": their further tokens carry the new version, but see
        latents as the old weights made them. "recompute": all that they have said is read again, with the new weights.
        "drain": they end with the old weights, and those that wait begin with the new ones, which lie beside them so long.
        No later request gets to see old latents: what is kept of prompts and images is forgotten.
        """
        if latents not in LATENTS:
            raise EngineError(f"latents={latents!r} must be one of {', '.join(LATENTS)}")
        self._next = self._runner.prepared(params), version
        if latents == "recompute":
            for sequence in list(self._running):
                self._preempt(sequence)
        if latents != "drain" or self._drained:
            self._change_weights()

    @property
    def _drained(self) -> bool:
        """Whether no answer has been begun that has not ended."""
        return not self._running and not any(sequence.begun for sequence in self._waiting)

    def _change_weights(self) -> None:
        (self._runner.params, self._version), self._next = self._next, None
        self._epoch += 1
        for home in self._homes:
            home.pages.forget()
        self._features.forget()

    @property
    def sees(self) -> bool:
        """Whether it takes images."""
        return self._runner.sees

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to tell."""
        return bool(self._waiting or self._running or self._flight or self._events)

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what there is now."""
        pages = len(self._homes) * self._share.pages
        return self._counts | {
            "waiting": len(self._waiting),
            "running": len(self._running),
            "devices": len(self._homes),
            "pages": pages,
            "pages_used": pages - sum(home.pages.available for home in self._homes),
            "pages_kept": sum(home.pages.idle for home in self._homes),
            "cache_bytes": self._runner.cache_bytes,
            "compilations": self._runner.compilations,
            "version": self._version,
        }

    def generate(self, requests: Items[Request]) -> list[list[Completion]]:
        """The completions of each request, one a sample; for an engine that has nothing else to do."""
        if self.busy:
            raise EngineError("generate() needs an idle engine; submit() the requests and step() instead")
        for request in requests:
            self.check(request)
        queue, done = list(reversed(requests)), {}
        out: list[list[Completion]] = []
        while queue or self.busy:
            while queue and len(self._waiting) + queue[-1].n <= self.settings.queue:
                out.append([Completion() for _ in range(queue[-1].n)])
                done[self.submit(queue.pop())] = out[-1]
            for event in self.step():
                done[event.request][event.sample].add(event)
        return out

    def step(self) -> list[Event]:
        """Send off a step, then read the one before: what happened since the last call."""
        flight = self._send()
        self._read()
        self._flight = flight
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------------------------------------------ scheduling
    def _send(self) -> Flight | None:
        if self._next and self._drained:
            self._change_weights()
        rows = self._rows()
        self._admit()
        pieces = self._pieces()
        if not rows and not pieces:
            return None
        plan, sequences = self._plan(rows, pieces)
        self._counts["steps"] += 1
        return Flight(self._runner.step(plan), sequences, self._version)

    def _rows(self) -> list[Sequence]:
        """The answers that decode a token in this step, each with room for it."""
        rows = []
        for sequence in list(self._running):
            if sequence.slot < 0 or not sequence.decoding or not sequence.wants_more:
                continue
            if sequence.computed == len(sequence.table) * self._share.page_size:
                pages = sequence.home.pages
                while not pages.available and sequence.slot >= 0:
                    self._preempt(next(s for s in reversed(self._running) if s.home is sequence.home))
                if sequence.slot < 0:
                    continue
                self._grow(sequence, pages.take(1))
            rows.append(sequence)
        return rows

    def _preempt(self, sequence: Sequence) -> None:
        self._counts["preempted"] += 1
        self._vacate(sequence)
        bisect.insort(self._waiting, sequence, key=lambda s: s.order)

    def _vacate(self, sequence: Sequence) -> None:
        """Take a running sequence out of its slot."""
        self._running.remove(sequence)
        sequence.home.pages.release(sequence.table)
        self._features.release(list(sequence.features.values()))
        sequence.home.slots.append(sequence.slot)
        sequence.leave()

    def _grow(self, sequence: Sequence, pages: Items[int]) -> None:
        start = len(sequence.table)
        sequence.table += pages
        sequence.home.tables[sequence.slot, start : len(sequence.table)] = pages

    def _admit(self) -> None:
        """Give slots and pages to those who wait, in the order of arrival, as long as there are any.

        A sequence goes where most of its beginning is, of such devices to the one with the fewest. One whose next page is
        about to be filled for somebody else waits for that page, unless more of them wait there than there are slots.
        """
        if not self._waiting or not any(home.slots for home in self._homes):
            return
        awaited: list[set[bytes]] = [set() for _ in self._homes]
        for sequence in self._running:
            awaited[sequence.home.number].update(self._about_to_fill(sequence))
        promised = [0] * len(self._homes)
        for sequence in list(self._waiting):
            if sequence.coming:
                break  # a token that is yet to be read belongs to the prompt
            if self._next and not sequence.begun:
                continue
            most = (len(sequence.tokens) - 1) // self._share.page_size  # its last token is computed in any case
            keys = sequence.full_keys(self._share.page_size)[:most]
            if not self._find_home(sequence, keys, awaited, promised):
                break

    def _find_home(self, sequence: Sequence, keys: list[bytes], awaited: list[set[bytes]], promised: list[int]) -> bool:
        """Let a sequence enter, or wait for a page; False when no device has room for it."""
        homes = [home for home in self._homes if home.slots]
        found = {home.number: home.pages.match(keys) for home in homes}
        reach = {z: _reach(keys, len(pages), awaited[z]) for z, pages in found.items()}
        homes.sort(key=lambda home: (-reach[home.number], home.running))
        for home in homes:
            z, shared = home.number, found[home.number]
            if reach[z] > len(shared):
                if promised[z] < len(home.slots) or len(self._homes) == 1:
                    promised[z] += 1
                    return True
            elif self._enter(sequence, home, shared):
                awaited[z].update(self._about_to_fill(sequence))
                return True
        return False

    def _about_to_fill(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages that reading its prompt will fill."""
        if sequence.decoding or sequence.epoch != self._epoch:
            return []
        size = self._share.page_size
        return sequence.full_keys(size)[sequence.computed // size :]

    def _enter(self, sequence: Sequence, home: Home, shared: list[int]) -> bool:
        """Into a slot, on pages that are shared and new ones; False, and no change, without room."""
        size, pages, running = self._share.page_size, home.pages, home.running
        pages.hold(shared)
        count, start = -(-len(sequence.tokens) // size) - len(shared), len(shared) * size
        unseen = [(i, s) for i, s in enumerate(sequence.shown) if s.places[-1] >= start]
        claimed = None
        if count + running <= pages.available or (not running and count <= pages.available):
            claimed = self._features.claim([(s.digest, s.clip) for _, s in unseen])
        if claimed is None:
            pages.release(shared)
            return False
        given, fresh = claimed
        for pack, rows_M, images in packs(fresh, self.settings.vision_patches, self.config.vision):
            self._runner.encode(pack, rows_M)
            self._counts["encoded"] += images
        self._waiting.remove(sequence)
        bisect.insort(self._running, sequence, key=lambda s: s.order)
        sequence.home, sequence.slot, sequence.epoch = home, home.slots.pop(), self._epoch
        sequence.computed, sequence.kept = start, len(shared)
        sequence.features = dict(zip([i for i, _ in unseen], given, strict=True))
        self._grow(sequence, shared + pages.take(count))
        self._counts["reused"] += start
        return True

    def _pieces(self) -> list[tuple[Sequence, int, int]]:
        """(sequence, first place, place behind the last) of the pieces of prompts to read in this step."""
        pieces, most = [], self._share.pieces[-1]
        taken = [0] * len(self._homes)
        for sequence in self._running:
            z = sequence.home.number
            while not sequence.decoding and taken[z] < most:
                taken[z] += 1
                stop = min(sequence.computed + self._share.piece, len(sequence.tokens))
                pieces.append((sequence, sequence.computed, stop))
                sequence.computed, sequence.decoding = stop, stop == len(sequence.tokens)
                self._keep(sequence)
        return pieces

    def _keep(self, sequence: Sequence) -> None:
        """Let others find the full pages whose tokens are known; a step that is sent later may already read them."""
        if sequence.epoch == self._epoch:
            size = self._share.page_size
            keys = sequence.full_keys(size)
            for number in range(sequence.kept, min(sequence.computed, len(sequence.tokens)) // size):
                sequence.home.pages.keep(sequence.table[number], keys[number])
                sequence.kept = number + 1

    def _plan(self, rows, pieces) -> tuple[Plan, list[Sequence | None]]:
        """The arrays of a step, in the smallest shape that takes them, and whose tokens it draws, device by device."""
        s = self._share
        row_places, most_rows = _places(rows)
        piece_places, most_pieces = _places([sequence for sequence, _, _ in pieces])
        shape = next(n for n in s.rows if n >= most_rows), next(n for n in (0, *s.pieces) if n >= most_pieces)
        plan, drawn = self._runner.empty_plan(*shape), sum(shape)
        sequences: list[Sequence | None] = [None] * (drawn * len(self._homes))
        for at, sequence in zip(row_places, rows, strict=True):
            plan.slots_ZB[at], plan.positions_ZB[at] = sequence.slot, sequence.computed
            plan.tables_ZBW[at] = sequence.home.tables[sequence.slot]
            sequence.computed += 1
            sequences[at[0] * drawn + at[1]] = sequence
        for at, (sequence, start, stop) in zip(piece_places, pieces, strict=True):
            plan.tokens_ZPC[at][: stop - start] = sequence.tokens[start:stop]
            plan.media_ZPC[at][: stop - start] = sequence.media_rows(start, stop)
            plan.starts_ZP[at], plan.lengths_ZP[at] = start, stop - start
            plan.tables_ZPW[at] = sequence.home.tables[sequence.slot]
            if stop == len(sequence.tokens):
                sequences[at[0] * drawn + shape[0] + at[1]] = sequence
                self._features.release(list(sequence.features.values()))
                sequence.features = {}
            self._counts["read"] += stop - start
        for n, sequence in enumerate(sequences):
            if sequence is not None:
                at, request = divmod(n, drawn), sequence.request
                sampling = request.sampling
                plan.targets_ZN[at], plan.seeds_ZN[at], plan.samples_ZN[at] = (
                    sequence.slot,
                    sampling.seed,
                    sequence.sample,
                )
                plan.temperatures_ZN[at], plan.top_p_ZN[at] = sampling.temperature, sampling.top_p
                plan.alternatives_Z[at[0]] |= request.alternatives > 0
                sequence.coming += 1
        return plan, sequences

    # --------------------------------------------------------------------------------------------------------- results
    def _read(self) -> None:
        """Wait for the step that was sent before, and hand out its tokens."""
        if self._flight is None:
            return
        (drawn, sequences, version), self._flight = self._flight, None
        tokens_N, logprobs_N = (np.asarray(a).ravel().tolist() for a in (drawn.tokens_ZN, drawn.logprobs_ZN))
        likeliest = None
        for n, sequence in enumerate(sequences):
            if sequence is None:
                continue
            sequence.coming -= 1
            if sequence.done:
                continue
            alternatives, count = (), sequence.request.alternatives
            if count:
                if likeliest is None:
                    likeliest = [
                        np.asarray(a).reshape(len(sequences), -1)
                        for a in (drawn.likeliest_ZNK, drawn.likeliest_logprobs_ZNK)
                    ]
                alternatives = tuple(zip(*(a[n, :count].tolist() for a in likeliest), strict=True))
            self._counts["drawn"] += 1
            reason, by = sequence.accept(tokens_N[n], logprobs_N[n])
            if reason != "error":
                event = TokenEvent(sequence.id, sequence.sample, tokens_N[n], logprobs_N[n], version, alternatives)
                self._events.append(event)
            if sequence.slot >= 0:
                self._keep(sequence)
            if reason:
                self._finish(sequence, reason, by)

    def _finish(self, sequence: Sequence, reason: str, stopped_by=None) -> None:
        sequence.done = True
        if sequence.slot >= 0:
            self._vacate(sequence)
        else:
            self._waiting.remove(sequence)
        error = "the model gave a token no finite log-probability; its weights may be broken" * (reason == "error")
        self._events.append(FinishEvent(sequence.id, sequence.sample, reason, stopped_by, error))


def _places(sequences: Items[Sequence]) -> tuple[list[tuple[int, int]], int]:
    """(device, place among those there) of each sequence, and how many the device with most of them has."""
    taken, places = collections.Counter(), []
    for sequence in sequences:
        places.append((sequence.home.number, taken[sequence.home.number]))
        taken[sequence.home.number] += 1
    return places, max(taken.values(), default=0)


def _reach(keys: Items[bytes], found: int, awaited: set[bytes]) -> int:
    """How many of the pages of a beginning are there, or about to be filled."""
    while found < len(keys) and keys[found] in awaited:
        found += 1
    return found
