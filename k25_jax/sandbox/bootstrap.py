"""The first Python in the sandbox: puts the limits on itself, then becomes a Jupyter kernel.

It runs as a script, where nothing else of k25_jax can be seen. Standard input holds a JSON object: `connection` (a
Jupyter connection file), `connection_file` (where to write it) and `limits` (of `resource.setrlimit`).

What a call prints is told under its id, and so is what its threads and child processes print after its end: nobody
takes it for the output of a later call. Code that reads the memory of its own process can find a later id all the
same and forge what it likes in there: only a process of one's own for each call would prevent that.
"""

import _thread
import codecs
import concurrent.futures
import contextvars
import ctypes
import functools
import json
import mmap
import os
import resource
import select
import sys
import tempfile
import threading
import warnings

import zmq
from ipykernel.iostream import OutStream
from ipykernel.kernelapp import IPKernelApp
from IPython.core import page
from IPython.display import display
from jupyter_client.jsonutil import json_clean, json_default

PIECE = 2**20  # characters
_NO_HUGE_PAGES = 41  # of prctl


def pack(content: object) -> bytes:
    """As JSON; halves of characters, which have no UTF-8, stay what they are."""
    try:
        text = json.dumps(content, default=json_default, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = json.dumps(json_clean(content), default=json_default, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


class Pipe:
    """What children of one call write to; `ended` when its end has been read, which is once."""

    def __init__(self, descriptor: int, parent: dict):
        self.descriptor, self.parent, self.ended = descriptor, parent, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def readable(self) -> bool:
        """Whether there is anything to read now."""
        try:
            return bool(select.select([self.descriptor], [], [], 0)[0])
        except OSError:  # another thread has closed it
            return False


class Stream(OutStream):
    """Sends what is printed in pieces, and waits for each to be sent: a loop of prints does not fill the memory.

    What is written to the descriptor, by a child process as a rule, comes over a pipe; each call has one of its own.
    """

    every, last = [], None  # both; and the one that was written to, which is sent before the other: the order stays

    def __init__(self, session, pub_thread, name, **settings):
        super().__init__(session, pub_thread, name, **settings)
        self._descriptor, self._pipe, self._unsent = {"stdout": 1, "stderr": 2}[name], None, 0
        self._reading = threading.Lock()
        Stream.every.append(self)

    def fileno(self) -> int:
        """The descriptor that children write to."""
        return self._descriptor

    def begin(self):
        """A pipe for a new call. The last one stays for the children that still hold it."""
        try:
            reading, writing = os.pipe()
        except OSError:  # too many files are open: the last one goes on
            return
        os.set_blocking(reading, False)
        os.dup2(writing, self._descriptor)
        os.close(writing)
        self._pipe = Pipe(reading, self.parent_header)
        loop, take = self.pub_thread.io_loop, functools.partial(self._take, self._pipe)
        loop.add_callback(loop.add_handler, reading, lambda *_: take(False), loop.READ)

    def write(self, string: str) -> int:
        """As a file's."""
        if not isinstance(string, str):
            return super().write(string)  # which says what is wrong with it
        self._drain()
        self._take_turn()
        for begin in range(0, len(string), PIECE):
            piece = string[begin : begin + PIECE]
            super().write(piece)
            self._unsent += len(piece)
            if self._unsent >= PIECE:
                self._unsent = 0
                super().flush()
        return len(string)

    def flush(self):
        """As a file's; and what children have written by now is sent."""
        self._drain()
        super().flush()

    def _drain(self):
        """What children have written comes before what is written now."""
        for stream in Stream.every if self._is_master_process() else ():
            while (pipe := stream._pipe) and pipe.readable() and stream._take(pipe):
                pass

    def _take_turn(self):
        before, Stream.last = Stream.last, self
        if before is not None and before is not self:
            OutStream.flush(before)

    def _take(self, pipe: Pipe, wait: bool = True) -> bool:
        """Pass on what is in the pipe, as printed by the call that the pipe is of.

        Who holds the lock may wait for the thread that sends: that one never waits for the lock.
        """
        if not self._reading.acquire(blocking=wait):
            return False
        try:
            if pipe.ended:  # its descriptor may be another one's by now
                return False
            try:
                data = os.read(pipe.descriptor, 2**16)
            except OSError:  # another thread has read it
                return False
            self._take_turn()
            token = self._parent_header.set(pipe.parent)
            try:
                super().write(pipe.decoder.decode(data, final=not data))
            finally:
                self._parent_header.reset(token)
            if not data:
                pipe.ended, loop = True, self.pub_thread.io_loop
                loop.add_callback(self._end, loop, pipe)
            return bool(data)
        finally:
            self._reading.release()

    def _end(self, loop, pipe: Pipe):
        loop.remove_handler(pipe.descriptor)
        if self._pipe is pipe:
            self._pipe = None
        os.close(pipe.descriptor)


class SharedMemory(mmap.mmap):
    """Shared memory without a file gets one in /dev/shm, where its size is limited."""

    def __new__(cls, fileno, length, *more, **named):
        """As mmap.mmap."""
        flags = more[0] if more else named.get("flags", mmap.MAP_SHARED)
        if fileno != -1 or not flags & mmap.MAP_SHARED:
            return super().__new__(cls, fileno, length, *more, **named)
        if more:
            more = (flags & ~mmap.MAP_ANONYMOUS, *more[1:])
        elif "flags" in named:
            named["flags"] = flags & ~mmap.MAP_ANONYMOUS
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            os.posix_fallocate(file.fileno(), 0, length)
            return super().__new__(cls, file.fileno(), length, *more, **named)


class Kernel(IPKernelApp):
    """What is published waits until it is read, instead of being lost when there is much of it."""

    def init_iopub(self, context):
        """As its base."""
        context.setsockopt(zmq.XPUB_NODROP, 1)
        super().init_iopub(context)


def keep_parents(stdout: Stream):
    """What a thread shows belongs to the call that started it, not to the one that runs; and what a pool does, too."""
    start, submit = _thread.start_new_thread, concurrent.futures.ThreadPoolExecutor.submit

    def start_in_context(function, arguments, *more):
        if stdout.parent_header:
            function, arguments = functools.partial(contextvars.copy_context().run, function), arguments
        return start(function, arguments, *more)

    def submit_in_context(self, function, /, *arguments, **named):
        return submit(self, contextvars.copy_context().run, function, *arguments, **named)

    _thread.start_new_thread = threading._start_new_thread = start_in_context
    concurrent.futures.ThreadPoolExecutor.submit = submit_in_context


def tell(payload: dict):
    """Show what IPython would put into the next cell."""
    if payload.get("source") == "set_next_input":
        display({"text/plain": payload["text"]}, raw=True)


def main():
    """Never returns: a kernel runs until it is killed."""
    settings = json.load(sys.stdin)
    with open(settings["connection_file"], "w") as file:
        json.dump(settings["connection"], file)
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.nice(5)  # whoever watches goes first, else memory fills while it waits for a processor
    ctypes.CDLL(None).prctl(_NO_HUGE_PAGES, 1, 0, 0, 0)
    mmap.mmap = SharedMemory
    os.closerange(3, 1024)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # errors up to here are told to whoever waits for the kernel
        os.dup2(nothing, stream)
    own = ("outstream_class=__main__.Stream", "capture_fd_output=False")
    own = [*(f"--IPKernelApp.{setting}" for setting in own), "--Session.packer=__main__.pack"]
    kernel = Kernel.instance()
    kernel.initialize(["-f", settings["connection_file"], "--HistoryManager.enabled=False", *own])
    # The threads are the kernel's own, so Python 3.12's warning of fork tells the code nothing.
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork.*", DeprecationWarning)
    streams, shell = (sys.stdout, sys.stderr), kernel.shell
    shell.set_hook("show_in_pager", page.as_hook(page.display_page), 0)
    shell.payload_manager.write_payload = tell
    shell.events.register("pre_execute", lambda: [stream.begin() for stream in streams])
    keep_parents(sys.stdout)
    kernel.start()


if __name__ == "__main__":
    main()
