"""The tool `ipython` with pictures in it, as zero-vision SFT teaches and asks for it (K2.5 §3.4)."""

import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from k25_jax.agents.tools import IPython
from k25_jax.data.tasks.programmed import PREAMBLE
from k25_jax.sandbox.observation import InfrastructureError, Observation
from k25_jax.sandbox.sandbox import Sandbox

Lend = Callable[[], contextlib.AbstractContextManager[Sandbox]]  # Sandboxes.lend, KernelPool.sandbox, or Sandbox itself


class Pictures(IPython):
    """Python in a sandbox in which `np`, `Image`, `ndimage` and the pictures of this episode, `images`, are there.

    The sandbox is had from `lend` with the first call: a model that makes none keeps none busy. `statuses` are those of the
    calls. Close it; that waits for a call under way.
    """

    description = "Run Python. np, Image, ndimage and the pictures, images, are there."
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}

    def __init__(self, lend: Lend, seconds: float = 60.0):
        self._lend, self._seconds, self._lent = lend, seconds, contextlib.ExitStack()
        self._sandbox: Sandbox | None = None
        self._laid_out: Sequence[np.ndarray] | None = ()
        self._problem: InfrastructureError | None = None
        self._one_call = threading.Lock()
        self.statuses: list[str] = []

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Give the sandbox back; whoever lent it hears of an InfrastructureError."""
        with self._one_call:
            problem, self._problem, self._sandbox = self._problem, None, None
            self._lent.__exit__(type(problem) if problem else None, problem, None)

    def lay_out(self, pictures: Sequence[np.ndarray]):
        """`show` them when code is next run."""
        self._laid_out, self.statuses = pictures, []

    def call(self, arguments: Mapping) -> Observation:
        """Run `code`, with the pictures that were laid out."""
        with self._one_call:
            try:
                if self._laid_out is not None:
                    self._show(self._laid_out)
                    self._laid_out = None
                observation = super().call(arguments)
            except InfrastructureError as problem:
                self._problem = problem
                raise
            self.statuses.append(observation.status)
            return observation

    def _show(self, pictures: Sequence[np.ndarray]):
        """Begin a new episode with these pictures, uint8 [h, w, 3]; nothing of the last one is left."""
        if self._sandbox is None:
            self._sandbox = self._lent.enter_context(self._lend())
        file = io.BytesIO()
        np.savez(file, *pictures)
        self._sandbox.put("pictures.npz", file.getvalue())
        load = "with np.load('pictures.npz') as file: images=list(file.values())\ndel file"
        begun = self._sandbox.run(f"%reset -f\n{PREAMBLE}\n{load}")
        if begun.status != "ok":
            raise InfrastructureError(f"the pictures cannot be loaded in the sandbox: {begun.text}")


class Sandboxes:
    """Sandboxes that serve one episode after the other, as many as are in use at once, for any number of threads. Close it.

    `%reset` clears what an episode leaves in the interpreter's names, which is enough for questions to a model. What is to
    be rewarded gets a fresh kernel each time: `sandbox.pool.KernelPool`.
    """

    def __init__(self):
        self._idle: list[Sandbox] = []
        self._closed = False

    def __enter__(self) -> "Sandboxes":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End those that are idle; the others end when they are given back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    @contextlib.contextmanager
    def lend(self) -> Iterator[Sandbox]:
        """A sandbox, a new one when none is idle."""
        try:
            sandbox = self._idle.pop()
        except IndexError:
            sandbox = Sandbox()
        try:
            yield sandbox
        except BaseException:
            sandbox.close()
            raise
        self._idle.append(sandbox)
        if self._closed:
            self.close()
