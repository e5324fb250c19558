"""The engine in a thread of its own, for callers in other threads and in event loops."""

import collections
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from k25_jax.config import K25Config
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import EngineConfig, EngineError, Event, FinishEvent, Request

logger = logging.getLogger(__name__)


class Stream(Iterator[Event]):
    """The events of one request in their order: iterate, which waits for each and ends behind the last.

    It holds `room` tokens that nobody has read yet; one more ends the request with an error. With `on_event` there is
    nothing to iterate over: it is called with each event in the engine's thread, and must not wait. `unfinished` are the
    samples that have not ended.
    """

    def __init__(self, samples: int, room: int, on_event: Callable[[Event], None] | None):
        self.id = -1
        self.unfinished = set(range(samples))
        self._room, self._on_event = room, on_event
        self._events: collections.deque[Event] = collections.deque()
        self._changed = threading.Condition()
        self._lost = ""  # why tokens do not arrive any more

    def __next__(self) -> Event:
        with self._changed:
            while not self._events:
                if not self.unfinished:
                    raise StopIteration
                self._changed.wait()
            return self._events.popleft()

    def put(self, event: Event) -> bool:
        """Take an event; False when the request should end because this one found no reader."""
        with self._changed:
            had_lost = bool(self._lost)
            if isinstance(event, FinishEvent):
                if self._lost:
                    event = dataclasses.replace(event, reason="error", stopped_by=None, error=self._lost)
                self._give(event)
                self.unfinished.discard(event.sample)
            elif not self._lost and len(self._events) >= self._room:
                self._lost = f"the reader left {self._room} tokens unread; read faster, or give the stream more room"
            elif not self._lost:
                self._give(event)
            self._changed.notify_all()
            return had_lost or not self._lost

    def _give(self, event: Event) -> None:
        if self._on_event is None:
            self._events.append(event)
            return
        try:
            self._on_event(event)
        except Exception as error:  # the caller's code must not end the others' requests
            self._lost = self._lost or f"on_event raised {type(error).__name__}: {error}"


class AsyncEngine:
    """Steps an engine as long as it has work. Nothing else may call that engine meanwhile.

    All methods may be called from any thread, and wait for the step under way, except `submit_soon` and `abort_soon`: they
    are for event loops, with asyncio.wrap_future and an on_event that goes through loop.call_soon_threadsafe.
    """

    def __init__(self, engine: Engine, room: int = 4096):
        self._engine, self._room = engine, room
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self._lock, self._closed = threading.Lock(), ""
        self._thread = threading.Thread(target=self._run, name="k25-engine", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def config(self) -> K25Config:
        """The model's."""
        return self._engine.config

    @property
    def settings(self) -> EngineConfig:
        """The engine's sizes."""
        return self._engine.settings

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer, at most."""
        return self._engine.max_length

    @property
    def sees(self) -> bool:
        """Whether it takes images."""
        return self._engine.sees

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Stream:
        """`Engine.submit`; the events come through the stream, or to `on_event`."""
        return self.submit_soon(request, on_event).result()

    def submit_soon(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Future:
        """`submit` without waiting: the stream to come. Until the engine takes the request it may be cancelled."""

        def command():
            stream = Stream(request.n, self._room, on_event)
            stream.id = self._engine.submit(request)
            self._streams[stream.id] = stream
            return stream

        return self._post(command)

    def abort(self, stream: Stream) -> bool:
        """`Engine.abort`; finish events follow on the stream."""
        return self.abort_soon(stream).result()

    def abort_soon(self, stream: Stream) -> Future:
        """`abort` without waiting."""
        return self._post(lambda: self._engine.abort(stream.id))

    def update_weights(self, params, version: int, latents: str = "keep") -> None:
        """`Engine.update_weights`, between two steps."""
        self._post(lambda: self._engine.update_weights(params, version, latents)).result()

    def stats(self) -> dict[str, int]:
        """`Engine.stats`."""
        return self._post(self._engine.stats).result()

    def close(self) -> None:
        """Stop; requests that are not done end with an error."""
        with self._lock:
            if not self._closed:
                self._commands.put(None)
        self._thread.join()

    def _post(self, function) -> Future:
        future: Future = Future()
        with self._lock:
            if self._closed:
                raise EngineError(self._closed)
            self._commands.put((future, function))
        return future

    def _run(self) -> None:
        reason = "the engine is closed"
        try:
            while self._obey():
                for event in self._engine.step():
                    self._deliver(event)
            self._leave()
        except Exception as error:  # out of memory, say: nothing that runs can go on, and all should hear of it
            logger.exception("the engine stopped")
            reason = f"the engine stopped: {type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._closed = reason
            self._refuse(reason)

    def _obey(self) -> bool:
        """Do what was asked, and wait for it if there is nothing else to do; False to stop."""
        wait = not self._engine.busy
        while wait or not self._commands.empty():
            command, wait = self._commands.get(), False
            if command is None:
                return False
            future, function = command
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        return True

    def _deliver(self, event: Event) -> None:
        stream = self._streams[event.request]
        if not stream.put(event):
            self._engine.abort(event.request)
        if not stream.unfinished:
            del self._streams[event.request]

    def _leave(self) -> None:
        """Leave the engine with nothing to do."""
        for number in self._streams:
            self._engine.abort(number)
        while self._engine.busy:
            self._engine.step()

    def _refuse(self, reason: str) -> None:
        """End all streams and answer all commands that still wait."""
        for stream in self._streams.values():
            for sample in sorted(stream.unfinished):
                stream.put(FinishEvent(stream.id, sample, "error", error=reason))
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None and command[0].set_running_or_notify_cancel():
                command[0].set_exception(EngineError(reason))
