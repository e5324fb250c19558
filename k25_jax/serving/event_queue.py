"""From the engine's thread to an event loop, without waiting on either side."""

import asyncio
import collections

from k25_jax.sampling.requests import Event
from k25_jax.serving.errors import ApiError


class EventQueue:
    """Events for one request, put by the engine's thread and taken by the event loop."""

    def __init__(self):
        self._loop, self._filled = asyncio.get_running_loop(), asyncio.Event()
        self._events: collections.deque[tuple[int, Event]] = collections.deque()
        self._told = False
        self._error: ApiError | None = None

    def put(self, number: int, event: Event) -> None:
        """An event of the request for prompt `number`; from any thread."""
        self._events.append((number, event))
        if not self._told:
            self._told = True
            self._loop.call_soon_threadsafe(self._tell)

    def fail(self, error: ApiError) -> None:
        """Let whoever takes raise this."""
        self._error = error
        self._filled.set()

    def _tell(self):
        self._told = False
        self._filled.set()

    async def take(self) -> list[tuple[int, Event]]:
        """All that is there, at least one; raises the ApiError of `fail`."""
        await self._filled.wait()
        if self._error:
            raise self._error
        self._filled.clear()
        return [self._events.popleft() for _ in range(len(self._events))]
