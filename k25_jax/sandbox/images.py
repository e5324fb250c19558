"""Whether an image can be decoded: tried in a process that is ended when it takes too long or too much memory.

As a script it is that process, which knows Pillow and no more of k25_jax: a line with the length of an image and the
most pixels, then its bytes, come in; a line that says what is wrong, empty if nothing is, goes out.
"""

import io
import os
import resource
import select
import subprocess
import sys
import time

MOST_PIXELS = 2**24
MEMORY = 512 * 2**20  # bytes of addresses
SECONDS = 5.0  # for one image, if the call has as many left; what costs more than two is refused before
START = 5.0  # more, for the first
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class ImageCheck:
    """The process starts with the first image, and again after it was ended."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def problem(self, image: bytes, until: float) -> str:
        """Why it cannot be shown, "" if it can. `until`: when this is known at the latest, as time.monotonic() has it."""
        if not image:
            return "it is empty"
        started = self._process is None
        if started:
            command = [sys.executable, "-I", os.path.realpath(__file__)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, env={"LANG": "C.UTF-8"}, **pipes)
        until = min(until, time.monotonic() + SECONDS + (START if started else 0.0))
        try:
            answer = self._ask(image, until)
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            self.close()
            return "its decoding took too long or too much memory"
        return answer.decode(errors="replace").strip()

    def close(self):
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _ask(self, image: bytes, until: float) -> bytes:
        writing, reading = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(writing, False)
        left, answer = memoryview(f"{len(image)} {MOST_PIXELS}\n".encode() + image), b""
        while not answer.endswith(b"\n"):
            waiting = select.select([reading], [writing] if left else [], [], max(0.0, until - time.monotonic()))
            if waiting[1]:
                left = left[os.write(writing, left) :]
            piece = os.read(reading, 4096) if waiting[0] else b""
            answer += piece
            if not any(waiting) or (waiting[0] and not piece):
                break
        return answer


def _decode(data: bytes, most_pixels: int) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > most_pixels:
                return f"{image.width} x {image.height} pixels are more than {most_pixels}"
            image.load()
    except Exception as problem:  # Pillow raises nearly every type there is
        return " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
    return ""


def _serve():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    while line := sys.stdin.buffer.readline():
        length, most_pixels = map(int, line.split())
        print(_decode(sys.stdin.buffer.read(length), most_pixels), flush=True)


if __name__ == "__main__":
    _serve()
