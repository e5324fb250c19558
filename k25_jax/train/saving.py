"""When a run writes a checkpoint, and when it stops: after so many steps, so many minutes, or a signal (K2.5 §3.8).

All processes must decide alike, and none may wait for the devices. Process 0 decides, by its own clock and what it has heard
of signals, and tells the others through the coordination service, while the step is being worked on.
"""

import time
from typing import NamedTuple

from k25_jax.config import TrainConfig
from k25_jax.sharding import processes


class Decision(NamedTuple):
    """What to do after a step."""

    save: bool
    stop: int  # the number of the signal that ends the run, or 0


class Saving:
    """Decides after which steps to save, and after which to stop."""

    def __init__(self, config: TrainConfig):
        self._every, self._seconds = config.checkpoint_every, 60 * config.checkpoint_minutes
        self._saved = time.monotonic()

    def decide(self, step: int, signal: int) -> Decision:
        """What to do after `step`, which the devices may still work on; `signal` came to this process, or is 0.

        All processes ask at every step.
        """
        late = bool(self._seconds) and time.monotonic() - self._saved >= self._seconds
        late, stop = processes.from_first([late, processes.any_signal(signal)])
        save = late or step % self._every == 0
        if save:
            self._saved = time.monotonic()
        return Decision(save, stop)
