"""Signals that end a command: at once while it has nothing to lose, and a run after the step in hand, which it saves.

While the main thread compiles, for minutes, no handler of Python's is called. The C part of a handler still writes the
number of the signal into a pipe, which a thread reads here (`signal.set_wakeup_fd`).
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE = b"\nstopping after this step, which is saved; Ctrl-C again to stop at once\n"
REPEATED = 1.0  # seconds in which SIGTERM counts once: `timeout` and others send it to a process and to its group
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interrupted(KeyboardInterrupt):
    """A signal came, and all that had to be saved is saved; the message says where the work goes on."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that a shell shows for a process that such a signal ended."""
        return 128 + self.number


class AtOnce:
    """A handler that ends the process, called in any thread."""

    def __init__(self, name: str, remark: str):
        self.name, self.remark = name, remark
        self._leaving = threading.Lock()

    def __call__(self, number, frame) -> None:
        self.hear(number)

    def hear(self, number: int) -> None:
        """Say so, and leave."""
        if not self._leaving.acquire(blocking=False):
            time.sleep(60)  # another thread leaves: this one must not go on to an end of its own meanwhile
            return
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(0.5)  # whoever reads our output may have stopped reading
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hid it
        _say(f"{cursor}\n{self.name}: ended by {signal.Signals(number).name}{self.remark}\n".encode())
        os._exit(128 + number)


class Stop:
    """A handler that notes the first signal, or raises Interrupted; the second goes to the handler from before."""

    def __init__(self, raises: bool = False):
        self.number = 0  # of the signal that came
        self._raises = raises
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __call__(self, number, frame) -> None:
        if not self.overheard:
            self.hear(number)

    @property
    def overheard(self) -> bool:
        """Whether the thread hears signals for this handler."""
        return not self._raises and any(thread.name == _listen.__name__ for thread in threading.enumerate())

    def hear(self, number: int) -> None:
        """Note it, or act at once."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
            if self._raises:
                raise Interrupted(number)
            _say(NOTICE)
        elif number == signal.SIGINT or time.monotonic() - self._since > REPEATED:
            before = self._before.get(number, signal.SIG_DFL)
            if isinstance(before, AtOnce):
                before.hear(number)
            raise Interrupted(number)

    def arm(self) -> None:
        """Hear from now on, where the process has not decided otherwise; outside the main thread nothing comes."""
        if not self._before:
            self._before = _replace(dict.fromkeys(SIGNALS, self))

    def disarm(self) -> None:
        """Hear no more."""
        _restore(self._before)
        self._before = {}


@contextlib.contextmanager
def at_once(name: str, remark: str = "") -> Iterator[None]:
    """In the process of a command: a signal ends it at once, unless one of the contexts below says otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _replace(dict.fromkeys(SIGNALS, AtOnce(name, remark)))
    pipe, end = os.pipe()
    os.set_blocking(end, False)
    other = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    threading.Thread(target=_listen, name=_listen.__name__, args=(pipe,), daemon=True).start()
    _guard_forks()
    try:
        yield
    finally:
        signal.set_wakeup_fd(other)
        _restore(before)
        os.close(end)


@contextlib.contextmanager
def between_steps(alone: bool = True) -> Iterator[Stop]:
    """A run: once its `arm` was called, after the first step, the first signal is noted, the second ends all at once.

    A signal that came raises Interrupted at the end. When not `alone`, the processes have to agree on the step (saving.py),
    and what ends one of them at once is told to the others (sharding/peers.py): so before the first step signals act as
    Python has them.
    """
    stop, plain = Stop(), {}
    if not alone:
        plain = _replace({signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL})
    try:
        yield stop
    finally:
        stop.disarm()
        _restore(plain)
    if stop.number:
        raise Interrupted(stop.number)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Processes of ours are to be ended first: the first signal raises Interrupted, the second ends this one at once."""
    stop = Stop(raises=True)
    stop.arm()
    try:
        yield
    finally:
        stop.disarm()


def _replace(handlers: dict) -> dict:
    """Set them where nobody has set others, or ignores the signal; what was there."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in handlers}
    before = {number: was for number, was in before.items() if was in DEFAULTS or isinstance(was, AtOnce)}
    for number in before:
        signal.signal(number, handlers[number])
    return before


def _restore(before: dict) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _listen(pipe: int) -> None:
    """Hear signals in a thread of its own."""
    while number := os.read(pipe, 1):
        handler = signal.getsignal(number[0])
        if isinstance(handler, AtOnce) or (isinstance(handler, Stop) and handler.overheard):
            handler.hear(number[0])
    os.close(pipe)


@functools.cache
def _guard_forks() -> None:
    """A process that is forked here has our pipe: what is sent to it must not be taken for a signal to this one."""
    masks = []

    def forget():
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if isinstance(signal.getsignal(number), (AtOnce, Stop)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        unblock()

    def block():
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))

    def unblock():
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=forget)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def _say(text: bytes) -> None:
    with contextlib.suppress(OSError):  # print() may be in the middle of a line; the terminal may be gone
        os.write(2, text)
