"""Whether two mathematical answers say the same, by math-verify in a process that is ended when it takes too long.

A model may write 9^{9^{9^9}}: then neither a signal nor a thread helps, and the memory goes, too. The process knows no
environment variables, cannot write files, and stands for as many questions as there are (K2.5 §3.5, §4).
"""

import atexit
import functools
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time

DEADLINE = 30.0  # seconds for one comparison; the process itself gives up a step of it after PATIENCE
PATIENCE = 20
START = 120.0  # seconds until the process is ready: sympy is large
MEMORY = 3 * 2**30  # bytes
MOST_TEXT = 20_000  # characters of an answer that are read, from its end


class MathChecker:
    """Compares one pair at a time, in a process that is started when it is needed and again after it was ended.

    `lost` counts the pairs that took too long or too much memory: they count as different.
    """

    def __init__(self, deadline: float = DEADLINE):
        self.deadline, self.lost = deadline, 0
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def same(self, answer: str, gold: str) -> bool:
        """Whether the last result in `answer` (in a \\boxed{}, between dollars, or a plain number) equals `gold`."""
        line = json.dumps([answer[-MOST_TEXT:], gold]).encode() + b"\n"
        with self._lock:
            if self._process is None:
                self._start()
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                reply = self._read(self.deadline)
            except BrokenPipeError:
                reply = b""
            if not reply.endswith(b"\n"):
                self.lost += 1
                self._end()
            return reply == b"true\n"

    def close(self):
        """End the process."""
        with self._lock:
            self._end()

    def _start(self):
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "k25_jax.scoring.mathcheck"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "PYTHONPATH": path, "LANG": "C.UTF-8"},
        )
        if self._read(START) != b"ready\n":
            self._end()
            raise RuntimeError("the process that compares answers did not start; is math-verify installed?")

    def _read(self, seconds: float) -> bytes:
        """A line, or what there was of it when the time was up."""
        data, descriptor, until = b"", self._process.stdout.fileno(), time.monotonic() + seconds
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(descriptor, 65536) if ready else b""
            if not piece:
                break
            data += piece
        return data

    def _end(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.cache
def _checker() -> MathChecker:
    checker = MathChecker()
    atexit.register(checker.close)
    return checker


def same_answer(answer: str, gold: str) -> bool:
    """`MathChecker.same`, in one process for all."""
    return _checker().same(answer, gold)


def _serve():
    """In the process: a line [answer, gold] in, a line true or false out."""
    from math_verify import parse, verify  # a second of imports, and only here

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        try:
            said = parse(answer, parsing_timeout=PATIENCE)
            golds = [parse(text, parsing_timeout=PATIENCE) for text in (f"${gold.strip('$ ')}$", gold)]
            found = any(verify(parsed, said, timeout_seconds=PATIENCE) for parsed in golds if parsed)
        except Exception:  # sympy raises nearly every type there is
            found = False
        print(json.dumps(bool(found)), flush=True)


if __name__ == "__main__":
    _serve()
