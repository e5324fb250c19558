"""What a process does when another one dies: it says so and leaves, instead of waiting for it for ever.

Every process counts up a number in the key-value store of JAX's coordination service, in process 0, once a second, and looks
at those of the others. One that stops counting, or has written why it ends, ends all. A process leaves by os._exit: most of
what it would close waits for the others.
"""

import contextlib
import ctypes
import itertools
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
from jax._src import distributed  # the client of the coordination service has no public name
from rich.console import Console

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as dead
SUSPECT = 5.0  # the same, when something went wrong here: on CPUs an exchange fails at once when a process dies
FAREWELL = 4.0  # seconds that process 0, which serves the others, waits for them before it leaves
COMPILATION = 3_600_000  # milliseconds that one process may need more than another to compile a step
LOST, USAGE, INTERRUPTED = 1, 2, 130  # exit statuses


@contextlib.contextmanager
def watched(resume: Callable[[], str], command: str = "k25 train"):
    """Watch the other processes for as long as this lasts; yields a `Watch`, or None where there are none.

    `resume()` says where the run of `command` will go on when it is started again. An error in here ends the process.
    """
    if jax.process_count() == 1:
        yield None
        return
    watch = Watch(distributed.global_state.client, jax.process_index(), jax.process_count(), resume, command)
    with leaving(watch):
        yield watch
    watch.finish()


@contextlib.contextmanager
def leaving(watch: "Watch | None"):
    """An error in here ends the process before anything outside is closed, if there is a watch."""
    try:
        yield
    except BaseException as error:
        if watch is not None:
            watch.fail(error)
        raise


class Watch:
    """Signs of life of `count` processes, and the end of this one when it or another fails."""

    def __init__(self, client, index: int, count: int, resume: Callable[[], str], command: str = "k25 train"):
        self._client, self._index, self._resume, self._command = client, index, resume, command
        self._others = [p for p in range(count) if p != index]
        now = time.monotonic()
        self._beats = {p: ("", now) for p in self._others}  # of each process the last sign, and when it came
        self._contact = now  # with process 0
        self._reasons: dict[int, str] = {}
        self._done: set[int] = set()
        self._asked = 0.0  # when process 0 was asked something that it has not answered yet
        self._unreachable = self._judging = self._finished = False
        self._exit = threading.Lock()
        self._compilations = itertools.count()  # of all functions, so that each is waited for at a barrier of its own
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_delete(f"k25/done/{index}")
        # JAX aborts when process 0 is gone. This is sleep(6), 6 being SIGABRT's number: time to say why.
        libc = ctypes.CDLL(None)
        libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def together(self, function):
        """The jitted `function`, called when all have compiled it: CPUs give up an exchange after thirty seconds."""
        compiled = {}

        def call(*arguments):
            shapes = tuple(a.shape for a in jax.tree.leaves(arguments))
            if shapes not in compiled:
                compiled[shapes] = function.lower(*arguments).compile()
                self._client.wait_at_barrier(f"k25/compiled/{next(self._compilations)}", COMPILATION)
            return compiled[shapes](*arguments)

        return call

    def finish(self) -> None:
        """This process has done its work; its silence is no reason to worry."""
        self._finished = True
        self._client.key_value_set(f"k25/done/{self._index}", "", allow_overwrite=True)

    def fail(self, error: BaseException):
        """Say what happened, here or to another process, let the others know, and leave."""
        self._judging = True
        reason, deadline = None, time.monotonic() + SUSPECT + 2 * BEAT
        while not isinstance(error, KeyboardInterrupt) and reason is None and time.monotonic() < deadline:
            time.sleep(BEAT / 4)
            reason = self._blame(SUSPECT)
        if reason:
            self._follow(reason)
        name = f"process {self._index} "
        if isinstance(error, KeyboardInterrupt):
            self._leave(name + "was interrupted", "", INTERRUPTED)
        summary = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        if type(error).__module__.startswith("k25_jax") or isinstance(error, OSError):
            self._leave(f"{name}failed ({summary})", str(error), USAGE)
        self._leave(f"{name}failed ({summary})", "".join(traceback.format_exception(error)), LOST)

    def _talk(self):
        """Give a sign of life and take those of the others, once a second."""
        number = 0
        while not self._finished:
            number += 1
            self._asked = time.monotonic()
            try:
                self._client.key_value_set(f"k25/beat/{self._index}", str(number), allow_overwrite=True)
                beats, reasons, done = (self._read(name) for name in ("beat", "failed", "done"))
            except Exception:  # whatever it is, process 0 does not answer
                self._unreachable = True
                return
            self._contact, self._asked = time.monotonic(), 0.0
            for process, beat in beats.items():
                if process in self._beats and beat != self._beats[process][0]:
                    self._beats[process] = beat, self._contact
            self._reasons, self._done = reasons, set(done)
            time.sleep(BEAT)

    def _read(self, name: str) -> dict[int, str]:
        return {int(key.rsplit("/", 1)[1]): value for key, value in self._client.key_value_dir_get(f"k25/{name}/")}

    def _judge(self):
        while not self._finished:
            time.sleep(BEAT / 4)
            if not self._judging and (reason := self._blame(SILENCE)):
                self._follow(reason)

    def _blame(self, patience: float) -> str | None:
        """Which other process is to blame for the end of the run, if one is."""
        reasons = [reason for process, reason in sorted(self._reasons.items()) if process != self._index]
        if reasons:
            return reasons[0]
        now = time.monotonic()
        if self._unreachable or (self._asked and now - self._asked > BEAT and aborting()):
            self._unreachable = True
            return "process 0, which coordinates, has died" if self._index else "JAX has aborted, as said above"
        if now - self._contact > patience:
            self._unreachable = True
            return f"process 0, which coordinates, has not answered for {now - self._contact:.0f} seconds"
        for process, (_, when) in self._beats.items():
            if now - when > patience and process not in self._done:
                return f"process {process} has died: no sign of life for {now - when:.0f} seconds"
        return None

    def _follow(self, reason: str):
        """Leave because of another process. Never returns."""
        remedy = f"Start all processes again with the same command: the run goes on {self._resume()}"
        self._leave(reason, f"{reason}. {remedy}", INTERRUPTED if reason.endswith("was interrupted") else LOST)

    def _leave(self, reason: str, message: str, status: int):
        """Tell the others `reason` and the user `message`, and end this process. Never returns."""
        self._exit.acquire()
        if sys.stderr.isatty():
            Console(stderr=True).show_cursor()  # a progress bar hid it
        if message:
            print(f"\n{self._command}: error: process {self._index}: {message.strip()}", file=sys.stderr, flush=True)
        if not self._unreachable:
            teller = threading.Thread(target=self._tell, args=(reason,), daemon=True)
            teller.start()
            teller.join(FAREWELL)
        sys.stdout.flush()
        os._exit(status)

    def _tell(self, reason: str):
        with contextlib.suppress(Exception):  # process 0 may be gone
            self._client.key_value_set(f"k25/failed/{self._index}", reason, allow_overwrite=True)
            while self._index == 0 and not set(self._others) <= self._reasons.keys() | self._done:
                time.sleep(BEAT / 10)


def aborting() -> bool:
    """Whether a thread of this process is in the handler of SIGABRT, and so blocks this signal, but not all signals."""
    abort, term = (1 << (number - 1) for number in (signal.SIGABRT, signal.SIGTERM))
    for status in pathlib.Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # a thread that has ended
            blocked = int(status.read_text().partition("SigBlk:")[2].split()[0], 16)
            if blocked & abort and not blocked & term:
                return True
    return False
