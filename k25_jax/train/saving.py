"""When a run writes a checkpoint: after so many steps, and after so many minutes without one (K2.5 §3.8)."""

import time

from k25_jax.config import TrainConfig
from k25_jax.sharding import processes


class SaveTimes:
    """After which steps to save. All processes decide alike: where minutes count, the clock is that of process 0."""

    def __init__(self, config: TrainConfig):
        self._every, self._seconds = config.checkpoint_every, 60 * config.checkpoint_minutes
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after `step`, a step that the devices may still work on; all processes ask at every step."""
        late = bool(self._seconds) and processes.from_first(time.monotonic() - self._saved >= self._seconds)
        if not late and step % self._every:
            return False
        self._saved = time.monotonic()
        return True
