"""Work over records in processes that may die: a decoder that hangs, crashes or takes all memory costs one record.

A worker says in shared memory which record it is at and since when. When it is over the deadline it is ended, when it
crashed it is replaced; the record is lost with a reason, and its unit starts again without it.
"""

import collections
import logging
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import NamedTuple, Protocol

from k25_jax.data.records import DataError

DEADLINE = 120.0  # seconds for one record
MEMORY = 6 * 2**30  # bytes that a worker may take beyond what it starts with
POLL = 0.1  # seconds between looks at the clock


class Unit(NamedTuple):
    """Every `step`-th record of [first, last)."""

    number: int
    first: int
    last: int
    step: int = 1


Lost = dict[int, tuple[str, str]]  # record -> reason and detail, of those that ended a worker


class Job(Protocol):
    """What workers do; sent to each of them once."""

    def start(self) -> Callable[[Unit, Lost, Callable[[int], None]], dict]:
        """In the worker: open what is needed. The function does a unit, and calls back with each record's number."""


def run(
    job: Job,
    units: Sequence[Unit],
    workers: int = 0,
    deadline: float = DEADLINE,
    report: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Unit, dict]]:
    """What `job` makes of each unit, in the order in which they end; `report` hears how many records are done.

    `workers=0`: one for each processor. Raises DataError when a source fails, RuntimeError when the job itself does.
    """
    waiting: collections.deque[tuple[Unit, Lost]] = collections.deque((unit, {}) for unit in units)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["k25_jax.data.statistics"])
    count = min(workers or len(os.sched_getaffinity(0)), len(units))
    crew = [_Worker(context, job) for _ in range(count)]
    done = 0
    try:
        while waiting or any(worker.unit for worker in crew):
            for worker in crew:
                if worker.unit is None and waiting:
                    worker.give(*waiting.popleft())
            busy = [worker for worker in crew if worker.unit]
            ready = connection.wait([worker.pipe for worker in busy], timeout=POLL)
            for worker in busy:
                if worker.pipe in ready and (result := worker.take()) is not None:
                    done += len(range(*worker.last[1:]))
                    yield worker.last, result
                elif worker.pipe in ready or worker.overdue(deadline):
                    waiting.appendleft(worker.bury("crash" if worker.pipe in ready else "deadline", deadline))
                    crew[crew.index(worker)] = _Worker(context, job)
            report(done + sum(worker.done for worker in crew if worker.unit))
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """One process, from the outside."""

    def __init__(self, context, job: Job):
        self.pipe, theirs = context.Pipe()
        self._at = context.RawArray("d", [-1.0, 0.0])  # record, since when
        self._process = context.Process(target=_serve, args=(job, theirs, self._at), daemon=True)
        self._process.start()
        theirs.close()
        self.unit: Unit | None = None
        self.last: Unit | None = None
        self._lost: Lost = {}

    def give(self, unit: Unit, lost: Lost):
        """Start it on a unit."""
        self.unit, self._lost = unit, lost
        try:
            self.pipe.send((unit, lost))
        except OSError:
            pass  # it died; the pipe says so again when it is read

    def take(self) -> dict | None:
        """The result of its unit; None when it died."""
        try:
            kind, result = self.pipe.recv()
        except (EOFError, OSError):
            return None
        if kind != "result":
            raise (DataError if kind == "source" else RuntimeError)(result)
        self.unit, self.last = None, self.unit
        return result

    @property
    def done(self) -> int:
        """Records of its unit that are done."""
        record = int(self._at[0])
        return max(0, record - self.unit.first) // self.unit.step if record >= 0 else 0

    def overdue(self, deadline: float) -> bool:
        """Whether it has been at one record for too long."""
        record, since = self._at
        return record >= 0 and time.monotonic() - since > deadline

    def bury(self, reason: str, deadline: float) -> tuple[Unit, Lost]:
        """End it; its unit, and the records that cannot be read, now one more."""
        record = int(self._at[0])
        self.end()
        signal_number = -(self._process.exitcode or 0)
        if reason == "deadline":
            detail = f"took more than {deadline:g} seconds"
        else:
            detail = f"ended its process (signal {signal_number}, status {self._process.exitcode})"
        if record < 0:
            raise RuntimeError(f"a worker {detail} before it came to a record; is there memory left?")
        return self.unit, self._lost | {record: (reason, detail)}

    def end(self):
        """Kill it, if it lives, and wait for it."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(job: Job, pipe, at) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends the workers
    warnings.simplefilter("ignore")  # of the decoders: what is wrong with a record is in its reason
    logging.disable(logging.WARNING)
    _limit_memory()
    parent = os.getppid()

    def begin(record: int):
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for the result
        at[1], at[0] = time.monotonic(), record

    try:
        work = job.start()
        while True:
            unit, lost = pipe.recv()
            result = work(unit, lost, begin)
            at[0] = -1.0
            pipe.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except DataError as problem:
        pipe.send(("source", str(problem)))
    except Exception:
        pipe.send(("bug", traceback.format_exc()))


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = held + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))
