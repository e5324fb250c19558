"""Accelerators by name: `v5p-1024` as gcloud spells it, `v5p:8x8x8` by shape, `cpu` or `gpu` of this machine (K2.5 §3.8).

`2xv5p-1024` are two such slices joined by the data-centre network, what gcloud calls --node-count=2.

Figures of a chip are those of Google's published tables, bytes in decimal units (95 GB are 95e9): what lies between these
and the real capacity is left to the runtime. Of its links docs.cloud.google.com/tpu/docs has, for both directions of all
together, 400 GB/s for v5e (4 links), 1200 for v5p (6), 800 for v6e (4) and 1200 for tpu7x (6).
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from k25_jax.config import ConfigError

REMEDY = 'no TPU compiler here: pip install -e ".[preflight]", or --topology=cpu'

# No metadata server to ask, no hosts to find; and several processes may compile at once, as none of them takes a chip.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclass(frozen=True)
class Chip:
    """What one chip has. Zero: not known, so nothing is bounded by it."""

    name: str
    hbm_bytes: float = 0.0
    peak_flops: float = 0.0  # bfloat16, a second
    hbm_bandwidth: float = 0.0  # bytes a second
    ici_bandwidth: float = 0.0  # bytes a second over all links of a chip, two for each dimension, one way
    dcn_bandwidth: float = 0.0  # bytes a second: a chip's share of its host's network cards, to other slices
    dims: int = 3  # of the torus
    unit: int = 1  # what the number in a gcloud name counts: 2 for TensorCores of a chip with two
    devices: int = 1  # that JAX sees in a chip; each has its share of the chip
    largest: int = 0  # chips of the largest slice

    @property
    def link(self) -> float:
        """Bytes a second over one link, one way."""
        return self.ici_bandwidth / (2 * self.dims)


CHIPS = {
    "v5p": Chip("v5p", 95e9, 459e12, 2765e9, 600e9, 6.25e9, unit=2, largest=6144),
    "v5e": Chip("v5e", 16e9, 197e12, 819e9, 200e9, 3.125e9, dims=2, largest=256),
    "v6e": Chip("v6e", 32e9, 918e12, 1640e9, 400e9, 12.5e9, dims=2, largest=256),
    "tpu7x": Chip("tpu7x", 192e9, 2307e12, 7380e9, 600e9, 12.5e9, unit=2, devices=2, largest=9216),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}


@dataclass(frozen=True)
class Topology:
    """A slice of chips, several alike, or the devices of this machine (no shape)."""

    chip: Chip
    shape: tuple[int, ...] = ()
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return bool(self.shape)

    @property
    def name(self) -> str:
        return f"{self.slices}x{self.slice_name}" if self.slices > 1 else self.slice_name

    @property
    def slice_name(self) -> str:
        """One slice, as the TPU compiler calls it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}" if self.shape else self.chip.name

    def share(self, of_chip: float) -> float:
        """A device's share of what a chip has."""
        return of_chip / self.chip.devices


def parse_topology(text: str) -> Topology:
    """`v5p-1024`, `v5litepod-8`, `v5p:4x4x8`, `2xv5p-1024`, `cpu`, `gpu`; ConfigError names the nearest that exist."""
    if several := re.fullmatch(r"(\d+)x([a-z].*)", text):
        one = parse_topology(several[2])
        if not one.is_tpu or int(several[1]) < 1:
            raise ConfigError(f"--topology={text}: several slices are of TPUs, at least one, as 2xv5p-1024")
        return dataclasses.replace(one, slices=int(several[1]))
    if text in ("cpu", "gpu"):
        return Topology(Chip(text))
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+)+))", text)
    if not match or ALIASES.get(match[1], match[1]) not in CHIPS:
        kind, number = re.split(r"[-:]|$", text, maxsplit=1)[0], re.search(r"[-:](.*)", text)
        near = difflib.get_close_matches(kind, [*CHIPS, *ALIASES, "cpu", "gpu"], n=2, cutoff=0.0)
        names = " or ".join(name if name in ("cpu", "gpu") else f"{name}-{number[1] if number else 8}" for name in near)
        raise ConfigError(f"--topology={text}: did you mean {names}? Or write a shape, as v5p:8x8x8")
    chip = CHIPS[ALIASES.get(match[1], match[1])]
    if match[3]:
        return Topology(chip, _checked(text, chip, tuple(int(n) for n in match[3].split("x"))))
    shapes = {math.prod(shape) * chip.unit: shape for shape in slices(chip)}
    number = int(match[2])
    if number not in shapes:
        nearest = sorted(sorted(shapes, key=lambda n: abs(math.log(n / max(number, 0.5))))[:2])
        names = " or ".join(f"{match[1]}-{n} ({n // chip.unit} chips)" for n in nearest)
        raise ConfigError(f"--topology={text}: there is no such slice; nearest is {names}")
    return Topology(chip, shapes[number])


def slices(chip: Chip) -> list[tuple[int, ...]]:
    """The usual shape of each size of slice, as near to a cube or a square as may be."""
    small = [(1, 1), (2, 2), (2, 4)] if chip.dims == 2 else [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    if chip.dims == 2:
        return small + [(a, b) for a, b in ((4, 4), (4, 8), (8, 8), (8, 16), (16, 16)) if a * b <= chip.largest]
    sizes = [64 * n for n in range(1, chip.largest // 64 + 1)]
    return small + [shape for shape in map(_cubes, sizes) if shape]


def _cubes(chips: int) -> tuple[int, ...] | None:
    """Sides, multiples of 4 in rising order, that multiply to `chips`: the longest as short as may be, at most 32."""
    count = chips // 64
    best = None
    for a in range(1, round(count ** (1 / 3)) + 1):
        for b in range(a, math.isqrt(count // a) + 1):
            c, rest = divmod(count, a * b)
            if not rest and b <= c <= 8 and (best is None or (c, -a) < (best[2], -best[0])):
                best = (a, b, c)
    return best and tuple(4 * n for n in best)


def _checked(text: str, chip: Chip, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != chip.dims or not all(shape) or math.prod(shape) > chip.largest:
        example = "x".join(map(str, slices(chip)[5]))
        raise ConfigError(
            f"--topology={text}: {chip.name} takes {chip.dims} sides, at most {chip.largest} chips, as {chip.name}:{example}"
        )
    return shape


def devices_of(topology: Topology) -> list:
    """The devices, real or described by the TPU compiler; ConfigError where there is no such compiler or device."""
    if not topology.is_tpu:
        try:
            return jax.devices(topology.name)
        except RuntimeError as error:
            raise ConfigError(f"--topology={topology.name}: no such device here ({error})") from error
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology={topology.name}: {REMEDY}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # even on a TPU machine: its chips are not needed, and may be in use
    from jax.experimental import topologies

    settings = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(topology.shape) == 1 else {}
    if topology.slices > 1:
        settings["num_slices"] = topology.slices
    try:
        return list(topologies.get_topology_desc(topology.slice_name, platform="tpu", **settings).devices)
    except Exception as error:  # of several classes, as the compiler has it
        raise ConfigError(f"--topology={topology.name}: {str(error).splitlines()[0]}") from error


def compiled(lowered, topology: Topology):
    """`lowered.compile()`. What is for chips that are not here is not kept for the next time: JAX cannot read it again."""
    if not topology.is_tpu:
        return lowered.compile()
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # it remembers whether it is in use
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
