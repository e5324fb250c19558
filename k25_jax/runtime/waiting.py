"""Long work says what is waited for, and since when."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

TIMES = (3.0, 10.0, 30.0)  # seconds after which it is said; from then on every 30
EVERY = 30.0


@contextlib.contextmanager
def waiting(what: str, times: tuple[float, ...] = TIMES, every: float = EVERY) -> Iterator[None]:
    """Log, at level INFO, what has gone on for some seconds inside; nothing when it is quick. Commands show this level."""
    done, began = threading.Event(), time.monotonic()
    since = time.strftime("%H:%M:%S")

    def watch():
        for number in range(10**9):
            due = times[number] if number < len(times) else times[-1] + every * (number - len(times) + 1)
            if done.wait(began + due - time.monotonic()):
                return
            logger.info("%s .. %.0f s, since %s", what, due, since)

    watcher = threading.Thread(target=watch, name="k25-waiting", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def first_call(function: Callable, what: str) -> Callable:
    """`function`, whose first call is waited for: that of a jitted one compiles it."""
    called = False

    def call(*arguments):
        nonlocal called
        with contextlib.nullcontext() if called else waiting(what):
            called = True
            return function(*arguments)

    return call
