"""Code that a model writes, run in IPython in a sandbox: text and images in, an observation out (K2.5 §4.4).

Nothing that the code does raises here: a deadline, a crash, too much memory are observations. What raises SandboxError
is this machine's doing.
"""

import base64
import functools
import io
import re
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.images import ImageCheck
from k25_jax.sandbox.kernel import Kernel, Limits
from k25_jax.sandbox.observation import Observation
from k25_jax.sandbox.outputs import Outputs
from k25_jax.vision.cost import too_costly

SPARE = 0.3  # seconds for images after the end of a call whose deadline has passed
_FILE = "application/x-k25-file"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NAME = re.compile(r"\w[\w .-]{0,99}")
_PUT = (
    "__import__('pathlib').Path({name!r}).write_bytes("
    "__import__('IPython').get_ipython().kernel.get_parent()['buffers'][0]); None"
)
_GET = """
with __import__('pathlib').Path({name!r}).open('rb') as k25_file:
    for k25_piece in iter(lambda: k25_file.read({piece}), b''):
        __import__('IPython').display.publish_display_data(
            {{{mime!r}: __import__('base64').b64encode(k25_piece).decode()}})
"""
_PIECE = 2**21  # bytes of a file in one message


class Sandbox:
    """An interpreter that keeps its state between calls, and starts anew after its death.

    Without bubblewrap it raises SandboxError, unless `unconfined`: then code has all rights of this user. `start` gives
    it a kernel in another way: `sandbox.pool`.
    """

    def __init__(
        self, limits: Limits | None = None, unconfined: bool = False, start: Callable[[], Kernel] | None = None
    ):
        self._limits = limits or Limits()
        self._start = start or functools.partial(Kernel, self._limits, unconfined)
        self._files: dict[str, bytes] = {}
        self._images, self._closing = ImageCheck(), None
        self._kernel: Kernel | None = self._start()
        self._closed = False

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all its processes; nothing is left of it."""
        if self._kernel is not None:
            self._kernel.close()
        self._join()
        self._images.close()
        self._kernel, self._closed = None, True

    def put(self, name: str, data: bytes | np.ndarray, seconds: float = 60.0):
        """Write a file into the working folder; an array [height, width, 3] of uint8 becomes a PNG.

        It is written again when the interpreter starts anew.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a file: letters, digits, '_', '-', '.' and spaces can")
        if isinstance(data, np.ndarray):
            file = io.BytesIO()
            Image.fromarray(data).save(file, "PNG")
            data = file.getvalue()
        self._ready()
        self._write(name, data, seconds)
        self._files[name] = data

    def get(self, name: str, seconds: float = 60.0) -> bytes | None:
        """The bytes of a file, by its path in the working folder; None if there is none, or if it cannot be had."""
        found, failed = bytearray(), []

        def heard(kind: str, content: Mapping | None, size: int):
            if kind == "error":
                failed.append(content)
            elif kind == "display_data" and _FILE in content["data"]:
                found.extend(base64.b64decode(content["data"][_FILE], validate=True))
                if len(found) > self._limits.disk_mb * 2**20:
                    raise ValueError("more than a file can hold")

        if self._kernel is None:
            return None
        self._kernel.wait()
        end = self._kernel.execute(_GET.format(mime=_FILE, name=name, piece=_PIECE), seconds, heard, data=b"")
        return None if end or failed else bytes(found)

    def run(self, code: str, seconds: float = 60.0) -> Observation:
        """Run code: what it prints and shows, the value of its last line, its error; and what became of it.

        At the deadline it is interrupted; with the default limits the answer comes at most a second later.
        """
        try:
            code.encode()
        except UnicodeEncodeError as problem:
            return Observation(f"[This code was not run: {problem}]", status="error")
        if self._kernel is not None and self._kernel.ready and not self._kernel.alive():
            ending = self._kernel.ending()
            self._restart()
            text = f"[The interpreter had ended since the last call ({ending}). This code was not run. {_ANEW}]"
            return Observation(text, status="died")
        self._ready()
        until = time.monotonic() + seconds + self._limits.stop_seconds + SPARE
        heard = Outputs(self._limits.output_chars, self._limits.images, lambda image: self._problem(image, until))
        end = self._kernel.execute(code, seconds, heard.add)
        if not end:
            return heard.observation("error" if heard.failed else "ok", "")
        if end == "interrupted":
            note = (
                f"[Stopped: the call took longer than {seconds:g} seconds. The interpreter and its variables are kept.]"
            )
            return heard.observation("deadline", note)
        self._restart()
        status = "deadline" if "deadline" in end else "died"
        return heard.observation(status, f"[The interpreter was lost: {end}. {_ANEW}]")

    def _problem(self, image: bytes, until: float) -> str:
        return too_costly(image) or self._images.problem(image, until)

    def _ready(self):
        """A kernel that can be spoken to."""
        if self._closed:
            raise SandboxError("the sandbox was closed")
        if self._kernel is None:
            self._join()
            self._kernel = self._start()
            self._kernel.wait()
            for name, data in self._files.items():
                self._write(name, data, self._limits.start_seconds)
        self._kernel.wait()

    def _restart(self):
        """Close the kernel, which may take a second, and start another one when it is needed."""
        self._closing = threading.Thread(target=self._kernel.close, name="k25-kernel-close")
        self._closing.start()
        self._kernel = None

    def _join(self):
        if self._closing is not None:
            self._closing.join()
            self._closing = None

    def _write(self, name: str, data: bytes, seconds: float):
        problems = []

        def heard(kind: str, content: Mapping | None, size: int):
            if kind == "error":
                problems.append(content)

        end = self._kernel.execute(_PUT.format(name=name), seconds, heard, data)
        if end or problems:
            self._restart()
            problem = end or f"{problems[0].get('ename')}: {problems[0].get('evalue')}"[:300]
            raise SandboxError(f"{name} ({len(data)} bytes) cannot be written into the sandbox: {problem}")


_ANEW = "A new one has no variables and only the files that were given at the start."
