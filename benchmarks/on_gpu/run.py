"""What the parts of benchmarks/gpu.py share: lines of JSON, attempts that may fail, durations, differences."""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOPs a second in bfloat16, dense, of the vendor's tables


@dataclass
class Run:
    """One part under way: its name, whether in small sizes, and when (time.monotonic) it has to be done."""

    part: str
    small: bool
    ends: float

    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.ends - time.monotonic()

    def line(self, name: str, value=None, unit: str = "", **more) -> None:
        """Print a figure: `peer` names what stands beside it, `ratio` is to that, `ok` says if `bound` is met."""
        fields = dict.fromkeys(("peer", "peer_value", "ratio", "bound", "ok", "dtype")) | more
        known = {"name": name, "value": value, "unit": unit} | fields
        print(json.dumps(rounded(known | {"part": self.part, "card": card()})), flush=True)

    def attempt(self, name: str, function: Callable, *arguments, seconds: float = 0.0) -> None:
        """Call a function that prints lines; its failure is a line, and so is having less time left than it needs."""
        if self.left() < seconds:
            self.line(name, skipped=f"{self.left():.0f} s are left of the part's time, and it needs {seconds:.0f}")
            return
        try:
            function(*arguments)
        except Exception as error:  # whatever it is, the other figures are wanted
            self.line(name, ok=False, **described(error))


def described(error: BaseException) -> dict:
    """An exception as fields of a line; what is not installed is named."""
    lacks = {"lacks": error.name} if isinstance(error, ModuleNotFoundError) else {}
    return {"error": f"{type(error).__name__}: {error}"[:600], **lacks}


def card() -> str:
    return jax.devices()[0].device_kind


def peak_flops() -> float | None:
    """FLOPs a second in bfloat16 of this card; None where they are not known."""
    return next((peak for name, peak in PEAKS.items() if name in card()), None)


def rounded(value):
    """Numbers to five digits, and those that JSON has no word for as text."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def seconds(sides: dict[str, Callable], rounds: int = 5, least: float = 0.05) -> dict[str, float]:
    """Median duration of a call of each side. They take turns; a round is as many calls as fill `least` seconds."""
    counts, taken = {}, {name: [] for name in sides}
    for name, side in sides.items():
        jax.block_until_ready(side())
        counts[name] = max(1, math.ceil(least / timed(side, 1)))
    for _ in range(rounds):
        for name, side in sides.items():
            taken[name].append(timed(side, counts[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def timed(side: Callable, count: int) -> float:
    """Seconds of a call, of `count` that follow one another."""
    began = time.perf_counter()
    for _ in range(count):
        out = side()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / count


def difference(got, want) -> float:
    """The largest of |got - want| / |want| (Euclidean norms) over the leaves; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
