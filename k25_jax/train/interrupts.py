"""Ctrl-C between two steps: one that comes amid a write or an exchange can leave a lock that nobody opens any more."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

NOTICE = b"\nstopping after this step; Ctrl-C again to stop at once\n"


@contextlib.contextmanager
def between_steps(alone: bool = True) -> Iterator[Callable[[], None]]:
    """Gives `check()`, which raises KeyboardInterrupt if Ctrl-C was pressed before, as leaving the context does.

    A second Ctrl-C acts at once. Outside the main thread, where no signals arrive, `check` does nothing; nor does it when
    not `alone`: others would wait in an exchange for a process that has left after its step (sharding/peers.py ends all).
    """
    pressed = False

    def check():
        if pressed:
            raise KeyboardInterrupt

    def note(number, frame):
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)
        os.write(sys.__stderr__.fileno(), NOTICE)  # print() may be in the middle of a line

    before = signal.getsignal(signal.SIGINT)
    hears = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if not alone or not hears:
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()
