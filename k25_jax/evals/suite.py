"""Which rendered tasks may be asked."""

from collections.abc import Sequence

from k25_jax.config import ConfigError
from k25_jax.data.tasks import make_task


def check_suite(specs: Sequence[str]) -> None:
    """Raise ConfigError for a spec that is no held-out task."""
    for spec in specs:
        task = make_task(spec)
        if task.split != "test":
            raise ConfigError(f"{spec} is of the split {task.split!r}; evaluate held-out questions, {task.name}:test")
