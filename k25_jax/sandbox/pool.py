"""Kernels that are started before they are needed (K2.5 §4.4)."""

import collections
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.kernel import Kernel, Limits
from k25_jax.sandbox.sandbox import Sandbox


class KernelPool:
    """Keeps `size` kernels that nobody has used; each is used once. For any number of threads."""

    def __init__(self, size: int, limits: Limits | None = None, unconfined: bool = False):
        if size < 1:
            raise ValueError(f"size={size}: a pool holds at least one kernel")
        self._size, self._limits, self._unconfined = size, limits or Limits(), unconfined
        self._changed, self._closed = threading.Condition(), False
        self._kernels: collections.deque[Kernel] = collections.deque()
        self._problem: SandboxError | None = None
        self._filler = threading.Thread(target=self._keep_full, name="k25-kernel-pool", daemon=True)
        self._filler.start()

    def __enter__(self) -> "KernelPool":
        return self

    def __exit__(self, *_):
        self.close()

    @contextmanager
    def sandbox(self) -> Iterator[Sandbox]:
        """A sandbox for one episode; when its interpreter dies, the next one comes from here too."""
        with Sandbox(self._limits, start=self._take) as sandbox:
            yield sandbox

    def close(self):
        """End all kernels that wait; sandboxes in use end theirs."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._filler.join()
        while self._kernels:
            self._kernels.popleft().close()

    def waiting(self) -> int:
        """How many kernels wait."""
        return len(self._kernels)

    def _take(self) -> Kernel:
        """The kernel that has waited longest; another one is started in its place."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._kernels or self._problem or self._closed)
                if self._closed:
                    raise SandboxError("the pool of kernels is closed")
                if not self._kernels:
                    problem, self._problem = self._problem, None  # whoever asks next makes it try again
                    self._changed.notify_all()
                    raise problem
                kernel = self._kernels.popleft()
                self._changed.notify_all()
                if kernel.alive():
                    return kernel
                kernel.close()

    def _keep_full(self):
        """Start what is missing. Kernels become ready while nobody waits for them."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._lacks())
                if self._closed:
                    return
            kernel = problem = None
            try:
                kernel = Kernel(self._limits, self._unconfined)
            except Exception as error:  # told to whoever asks for a kernel next
                problem = (
                    error if isinstance(error, SandboxError) else SandboxError(f"a kernel cannot be started: {error}")
                )
            with self._changed:
                self._problem = problem
                if kernel is not None:
                    self._kernels.append(kernel)
                self._changed.notify_all()

    def _lacks(self) -> bool:
        return len(self._kernels) < self._size and self._problem is None
