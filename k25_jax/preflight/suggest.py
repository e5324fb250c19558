"""Where a step does not fit: the nearest settings that do, each compiled, those that cost least first (K2.5 §3.8)."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from k25_jax.config import ConfigError, Experiment
from k25_jax.preflight.aot import Report, preflight
from k25_jax.preflight.topology import Topology, devices_of
from k25_jax.train.layout import mesh_of, packs_wanted

TRIES = 6  # compilations at most


@dataclasses.dataclass(frozen=True)
class Change:
    """One setting, as flags of `k25 preflight`, and the experiment that has it."""

    flags: tuple[str, ...]
    experiment: Experiment


def suggest(experiment: Experiment, topology: Topology, report: Report, say: Callable[[str], None]) -> list[dict]:
    """What was tried, in order, until something fitted: {flags, fits, peak_hbm_gb, seconds, compiled, mfu_bound}.

    A try takes about as long as the step that did not fit. Where the state alone is too large nothing was compiled, and
    only means in the hosts' memory can help.
    """
    each, tried = report.lower_s + report.compile_s, []
    say(f"it does not fit: compiling up to {TRIES} other settings, about {each:.0f} s each" if each else report.reason)
    for change in changes(experiment, devices_of(topology)):
        if not each and not change.experiment.optim.offload:
            continue
        jax.clear_caches()
        start = time.perf_counter()
        say(f"try {len(tried) + 1}: {' '.join(change.flags)}")
        result = preflight(change.experiment, topology, say)
        seconds, compiled = time.perf_counter() - start, result.compile_s > 0
        entry = {
            "flags": list(change.flags),
            "fits": result.fits,
            "peak_hbm_gb": result.peak_hbm_gb,
            "compiled": compiled,
        }
        tried.append(entry | {"seconds": seconds, "mfu_bound": result.mfu_bound})
        if result.fits or not compiled or len(tried) == TRIES:
            break
    return tried


def changes(experiment: Experiment, devices: Sequence) -> Iterator[Change]:
    """Settings beside those of the experiment, what costs least first; each goes on from the one before it.

    Packs that stay empty cost nothing to leave out. More parts of the batch cost a little, layers that are computed again
    a quarter of the step, means in the hosts' memory the way there and back. Fewer rows make another run of it. What these
    devices refuse is left out.
    """
    data, train = experiment.data, experiment.train
    whole = math.lcm(len(devices), data.lanes or 1)
    packs = math.ceil(packs_wanted(experiment) / whole) * whole
    idle = data.packs > experiment.model.vision.pos_time * packs
    steps = [("data", {"packs": packs})] if idle else []
    steps += [("train", {"accumulate": 2 * train.accumulate}), ("train", {"remat": "full"})]
    steps += [("train", {"accumulate": 4 * train.accumulate}), ("optim", {"offload": True})]
    for part in (2, 4):
        fewer = math.ceil((packs if idle else data.packs) / part / whole) * whole
        steps.append(("data", {"batch_size": data.batch_size // part, "packs": fewer}))
    change = Change((), experiment)
    for section, values in steps:
        other = _set(change, section, values)
        if other and other.experiment != change.experiment and _taken(other.experiment, devices):
            change = other
            yield change


def _taken(experiment: Experiment, devices: Sequence) -> bool:
    try:
        return bool(mesh_of(experiment, devices))
    except ConfigError:
        return False


def _set(change: Change, section: str, values: dict) -> Change | None:
    try:
        part = dataclasses.replace(getattr(change.experiment, section), **values)
    except ConfigError:
        return None
    starts = tuple(f"--config.{section}.{name}=" for name in values)
    flags = tuple(f"{start}{value}" for start, value in zip(starts, values.values(), strict=True))
    kept = tuple(flag for flag in change.flags if not flag.startswith(starts))
    return Change((*kept, *flags), dataclasses.replace(change.experiment, **{section: part}))
