"""A trace of some steps of a run, as `profile` of the experiment says; TensorBoard's profile plugin and Perfetto show it."""

import logging
import pathlib
import tempfile

import jax

from k25_jax.config import ProfileConfig
from k25_jax.runtime.paths import AnyPath, write

log = logging.getLogger(__name__)


class ProfileWindow:
    """Traces the steps of `config` into directory/profile/process_N, of process 0 or of all. Use it as a context manager."""

    def __init__(self, config: ProfileConfig, directory: AnyPath, start: int):
        """`start` is the step that the run goes on from."""
        self._config, self._last = config, config.start + config.steps - 1
        self._here = config.everywhere or jax.process_index() == 0
        self._folder = directory / "profile" / f"process_{jax.process_index()}"
        self._local: tempfile.TemporaryDirectory | None = None  # while it is being traced
        if 0 < config.start <= start and self._here:
            log.warning(
                "profile.start=%d is before step %d, the first of this start: no profile", config.start, start + 1
            )

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *exception) -> None:
        self._stop("the end of the run")

    def before(self, step: int) -> None:
        """Begin, if `step` is the first of the window."""
        if self._here and step == self._config.start:
            log.info("profile: begins with step %d, to end with step %d", step, self._last)
            self._local = tempfile.TemporaryDirectory(prefix="k25-profile-")
            jax.profiler.start_trace(self._local.name)

    def after(self, step: int, on_device) -> None:
        """End, if `step` is the last of the window, when the devices have done it: when its results are there."""
        if self._local is not None and step == self._last:
            jax.block_until_ready(on_device)
            self._stop(f"step {step}")

    def _stop(self, when: str) -> None:
        """Write the trace where the run lives, which may be a bucket: the profiler writes to disks alone."""
        if self._local is None:
            return
        with self._local as local:
            self._local = None
            jax.profiler.stop_trace()
            for file in sorted(pathlib.Path(local).rglob("*")):
                if file.is_file():
                    write(self._folder / file.relative_to(local), file.read_bytes())
        log.info("profile: ended with %s, is in %s (tensorboard --logdir=%s)", when, self._folder, self._folder.parent)
