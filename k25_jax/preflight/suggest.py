"""Where a step does not fit: the nearest settings that do, each compiled, those that cost least first (K2.5 §3.8)."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax

from k25_jax.config import ConfigError, Experiment
from k25_jax.preflight.aot import Report, preflight, with_rows
from k25_jax.preflight.topology import Topology
from k25_jax.train.layout import packs_wanted

TRIES = 6  # compilations at most


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting, as flags of `k25 preflight`, and the experiment that has it."""

    flags: tuple[str, ...]
    experiment: Experiment


def suggest(experiment: Experiment, topology: Topology, report: Report, say: Callable[[str], None]) -> list[dict]:
    """What was tried, in order, until something fitted: {flags, fits, peak_hbm_gb, seconds}.

    A try takes about as long as the step that did not fit, unless its state alone is too large, or numbers do not divide.
    """
    each, tried = report.lower_s + report.compile_s, []
    say(f"it does not fit: compiling up to {TRIES} other settings, about {each:.0f} s each")
    for change in changes(experiment, math.prod(report.mesh.values())):
        if sum(entry["compiled"] for entry in tried) == TRIES:
            break
        jax.clear_caches()
        start = time.perf_counter()
        say(f"try {len(tried) + 1}: {' '.join(change.flags)}")
        try:
            result = preflight(change.experiment, topology, say)
        except ConfigError as error:
            say(f"try {len(tried) + 1}: {error}")
            continue
        seconds, compiled = time.perf_counter() - start, result.compile_s > 0
        entry = {
            "flags": list(change.flags),
            "fits": result.fits,
            "peak_hbm_gb": result.peak_hbm_gb,
            "compiled": compiled,
        }
        tried.append(entry | {"seconds": seconds, "mfu_bound": result.mfu_bound})
        if result.fits:
            break
    return tried


def changes(experiment: Experiment, devices: int) -> Iterator[Change]:
    """Settings beside those of the experiment, what costs least first; each goes on from the one before it.

    Packs that stay empty cost nothing to leave out. More parts of the batch cost a little, layers that are computed again
    a quarter of the step, means in the hosts' memory the way there and back. Fewer rows make another run of it.
    """
    change = Change((), experiment)
    whole = math.lcm(devices, experiment.data.lanes or 1)
    packs = math.ceil(packs_wanted(experiment) / whole) * whole
    if experiment.data.packs > experiment.model.vision.pos_time * packs:
        yield (change := _set(change, "data", packs=packs))
    yield (change := _set(change, "train", accumulate=2 * experiment.train.accumulate))
    if experiment.train.remat != "full":
        yield (change := _set(change, "train", remat="full"))
    yield (change := _set(change, "train", accumulate=4 * experiment.train.accumulate))
    if not experiment.optim.offload:
        yield (change := _set(change, "optim", offload=True))
    for part in (2, 4):
        if experiment.data.batch_size % part == 0:
            rows = experiment.data.batch_size // part
            yield Change((*change.flags, f"--rows={rows}"), with_rows(change.experiment, rows))


def _set(change: Change, section: str, **values) -> Change:
    part = dataclasses.replace(getattr(change.experiment, section), **values)
    starts = tuple(f"--config.{section}.{name}=" for name in values)
    flags = tuple(f"{start}{value}" for start, value in zip(starts, values.values(), strict=True))
    kept = tuple(flag for flag in change.flags if not flag.startswith(starts))
    return Change((*kept, *flags), dataclasses.replace(change.experiment, **{section: part}))
