"""What the dataclasses check of themselves."""

import difflib
import math

Schedule = float | tuple[tuple[float, float], ...]  # a number, or steps ((progress, value), ..) from progress 0 on


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the remedy."""


def nearest(word: str, options) -> str:
    """ "; did you mean ..?" with the option that is spelt most like `word`."""
    match = difflib.get_close_matches(word, list(options), n=1, cutoff=0.0)
    return f"; did you mean {match[0]!r}?" if match else ""


def require_positive(config, names):
    """Raise ConfigError where a field is not above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{type(config).__name__}.{name}={getattr(config, name)} must be positive")


def check_schedule(what: str, schedule: Schedule, zero: bool = False, most: float = math.inf):
    """Steps begin at progress 0 and rise below 1; values lie in [0, most]. A constant is positive, unless `zero`."""
    if isinstance(schedule, tuple):
        begins = [begin for begin, _ in schedule]
        if begins[:1] != [0.0] or sorted(set(begins)) != begins or begins[-1] >= 1:
            raise ConfigError(f"{what}: the steps (progress, value) must begin at progress 0.0 and rise below 1")
    values = [value for _, value in schedule] if isinstance(schedule, tuple) else [schedule]
    if min(values) < 0 or max(values) > most:
        raise ConfigError(f"{what} must lie in [0, {most}]" if most < math.inf else f"{what} must be positive")
    if not zero and max(values) == 0:
        raise ConfigError(f"{what} must be positive")


def one_of(config, name, options):
    """Raise ConfigError unless the field is one of the options."""
    value = getattr(config, name)
    if value not in options:
        raise ConfigError(f"{type(config).__name__}.{name}={value!r}{nearest(str(value), options)} (one of {options})")
