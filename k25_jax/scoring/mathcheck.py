"""Whether two mathematical answers say the same, by math-verify in a process that is ended when it takes too long.

A model may write 9^{9^{9^9}}: then neither a signal's handler nor a thread helps, and the memory goes, too. So there is one
process that has imported math-verify, and nothing else, and it forks a child for every pair: a spare that is always warm.
The kernel ends the child when its time is up. The processes know no environment variables, write no files, and go when
their parent does (K2.5 §3.5, §4).
"""

import atexit
import ctypes
import functools
import gc
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

from k25_jax.scoring.statements import MOST_TEXT, ascii_forms, boxes

DEADLINE = 2.0  # seconds for one comparison
GRACE = 0.5  # seconds more until an answer is no longer waited for
START = 120.0  # seconds until the process is ready: sympy is large
MEMORY = 2**30  # bytes of address space for one comparison
AT_ONCE = 16  # comparisons
MOST_ANSWER = 1000  # characters of a result, after runs of space became one
MOST_DEPTH = 25  # brackets within brackets
MOST_ITEMS = 100  # commas
PDEATHSIG = 1  # prctl's name for "a signal when the parent is gone"


class MathChecker:
    """Compares pairs, from any thread, several at once; the process starts with the first pair, and again if it was ended.

    `lost` counts the pairs that took too long or too much memory, or were too large to try: they count as different.
    """

    def __init__(self, deadline: float = DEADLINE):
        self.deadline, self.lost = deadline, 0
        self._renew()
        renew = weakref.WeakMethod(self._renew)
        os.register_at_fork(after_in_child=lambda: (method := renew()) and method())

    def same(self, answer: str, gold: str) -> bool:
        """Whether the last result in `answer` (in a \\boxed{}, between dollars, or a plain number) equals `gold`."""
        said, wanted = result_in(answer), result_in(gold)
        if said is None or wanted is None:
            return self._lose()
        if not said or not wanted:
            return False
        with self._places:
            reply = self._ask(json.dumps([self.deadline, said, wanted]).encode())
        return self._lose() if not reply else reply == b"true"

    def close(self):
        """End the process, and those that it forked."""
        self._end(self._process)

    def _renew(self):
        """Begin with nothing, as in a forked copy of this process, which must not talk to the parent's."""
        if (inherited := getattr(self, "_socket", None)) is not None:
            inherited.close()
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._lock, self._places = threading.Lock(), threading.BoundedSemaphore(AT_ONCE)

    def _lose(self) -> bool:
        with self._lock:
            self.lost += 1
        return False

    def _ask(self, question: bytes) -> bytes:
        """The reply of a child of the process; b"" when it was ended, or ran out of memory."""
        for _ in range(2):  # the process itself may have been ended in the meantime
            process, line = self._started()
            start = time.monotonic()
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    try:
                        socket.send_fds(line, [question], [theirs.fileno()])
                    except OSError:
                        self._end(process)
                        continue
                ours.settimeout(self.deadline + GRACE)
                try:
                    reply = ours.recv(16)
                except OSError:
                    reply = b""
                if reply:
                    return reply
                if _lives(process, 0.3 if time.monotonic() - start < self.deadline else 0.0):
                    return b""
        return b""

    def _started(self) -> tuple[subprocess.Popen, socket.socket]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._process, self._socket

    def _start(self):
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "k25_jax.scoring.mathcheck"],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath, "PYTHONPATH": path, "LANG": "C.UTF-8"},
                start_new_session=True,  # Ctrl-C is for the parent
            )
        self._socket.settimeout(START)
        try:
            ready = self._socket.recv(16) == b"ready"
        except OSError:
            ready = False
        if not ready:
            self._process.kill()
            raise RuntimeError("the process that compares answers did not start; is math-verify installed?")

    def _end(self, process: subprocess.Popen | None):
        """End a process, unless another took its place."""
        with self._lock:
            if process is not None and process is self._process:
                self._socket.close()
                process.kill()
                process.wait()
                self._process = self._socket = None


def _lives(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process is there yet after `seconds`: one that is being killed takes a moment."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        return True


@functools.cache
def _checker() -> MathChecker:
    checker = MathChecker()
    atexit.register(checker.close)
    return checker


def same_answer(answer: str, gold: str) -> bool:
    """`MathChecker.same`, in one process for all."""
    return _checker().same(answer, gold)


# ------------------------------------------------------------------------------------------------------ what is compared
def result_in(answer: str) -> str | None:
    """The result in an answer: its last boxes, or else its end; None when no reader would take it for a result."""
    text = " ".join(ascii_width(answer[-MOST_TEXT:]).split())
    found = boxes(text)
    if found:
        last = [found.pop()]
        while found and re.fullmatch(
            r"[\s$,;.\\()]{0,12}(?:and|or)?[\s$,;.\\()]{0,12}", text[found[-1][1] : last[0][0]]
        ):
            last.insert(0, found.pop())
        text = " and ".join(f"\\boxed{{{inside.strip().rstrip('.,;').strip()}}}" for _, _, inside in last)
    elif len(text) > MOST_ANSWER:
        text = text[-MOST_ANSWER:]
    depth = deepest = 0
    for character in text:
        depth = max(0, depth + (character in "({[") - (character in ")}]"))
        deepest = max(deepest, depth)
    return None if len(text) > MOST_ANSWER or deepest > MOST_DEPTH or text.count(",") > MOST_ITEMS else text


def ascii_width(text: str) -> str:
    """`text` with full-width letters, digits and signs as those of ASCII."""
    return re.sub("[！-～]+", lambda match: ascii_forms(match[0]), text)


# -------------------------------------------------------------------------------------------------------- in the process
def _serve():
    """Forks a child for each message [deadline, answer, gold] with a socket, until there is no parent to ask."""
    import math_verify  # a second of imports, and only here

    line, parent = socket.socket(fileno=0), os.getppid()
    for pair in (("\\boxed{x^2+2x+1}", "(x+1)^2"), ("\\boxed{\\frac{1}{2}, \\sqrt{8}}", "0.5"), ("$(1,2]$", "x=5")):
        _compare(math_verify, *pair)  # what is imported late is imported now
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child stays a zombie
    line.send(b"ready")
    while os.getppid() == parent:
        if not select.select([line], [], [], 5.0)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(line, 2**18, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            line.close()
            _answer(math_verify, message, descriptors[0])
        os.close(descriptors[0])


def _answer(math_verify, message: bytes, descriptor: int):
    """In a child: true or false into the socket, in no more than the deadline's time and MEMORY; else nothing."""
    deadline, answer, gold = json.loads(message)
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, deadline)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        reply = b"true" if _compare(math_verify, answer, gold) else b"false"
    except MemoryError:
        reply = b""
    except BaseException:  # sympy raises nearly every type there is
        reply = b"false"
    try:
        os.write(descriptor, reply)
    finally:
        os._exit(0)


def _compare(math_verify, answer: str, gold: str) -> bool:
    said = math_verify.parse(answer, parsing_timeout=None)
    for text in (f"${gold.strip('$ ')}$", gold):
        parsed = math_verify.parse(text, parsing_timeout=None)
        if parsed and math_verify.verify(parsed, said, timeout_seconds=None):
            return True
    return False


if __name__ == "__main__":
    _serve()
