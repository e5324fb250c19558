"""The engine's steps, compiled ahead of time for devices that need not be there: what fits beside its weights (K2.5 §4).

Layers follow one another in a step, each in the place of the one before: two MoE layers beside the dense ones are
compiled. A little is held for every layer; decoding with two layers more says how much. Weights and pages of all layers
count by their shapes.
"""

import dataclasses
import functools
import math
import time
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from k25_jax.config import ConfigError, K25Config
from k25_jax.models.k25 import abstract_params
from k25_jax.preflight import hlo
from k25_jax.preflight.cost import temporaries
from k25_jax.preflight.topology import Topology, compiled, devices_of, slices
from k25_jax.sampling.latent_cache import cache_bytes
from k25_jax.sampling.layout import Layout, engine_mesh, tensors
from k25_jax.sampling.model_runner import State, empty_plan, fresh_state, lower_step, state_layout
from k25_jax.sampling.requests import EngineConfig
from k25_jax.sharding.rules import ENGINE_AXES

GB = 1e9
DTYPE = jnp.bfloat16
ROWS = 8  # answers at once on a device, where nothing is asked for
PIECE = 128  # tokens of a prompt that a device reads in a step
LENGTH = 32768
MOE_LAYERS, MORE_LAYERS = 2, 4  # that are compiled; once, to see what each layer adds
ROOM = 0.2  # of a device that weights should leave


@dataclass
class Program:
    """A step that was compiled, on one device: GB are 1e9 bytes."""

    name: str
    temp_gb: float  # of all layers, as is the next
    code_gb: float
    sent_gb: float  # to other devices, of the layers that were compiled
    compile_s: float


@dataclass
class SampleReport:
    """What an engine needs of each device, and how many answers of which length fit."""

    topology: str
    chips: int
    mesh: dict[str, int]
    requests: int  # answers at once, on all devices
    length: int  # tokens of each with its prompt
    hbm_gb: float = 0.0  # of a device; 0: not known
    weights_gb: float = 0.0
    cache_token_bytes: float = 0.0
    cache_gb: float = 0.0  # of a device's share of the requests
    features_gb: float = 0.0  # buffer of encoded images
    peak_gb: float = 0.0
    read_ms: float = 0.0  # weights and full cache from memory, once: no step that decodes is faster
    fits: bool = True
    reason: str = ""
    programs: list[Program] = field(default_factory=list)
    largest: list[dict] = field(default_factory=list)  # length: the most requests of it
    nearest: list[str] = field(default_factory=list)  # what fits instead


def sample_preflight(
    config: K25Config, topology: Topology, requests: int = 0, length: int = 0, tensor: int = 0, say=lambda text: None
) -> SampleReport:
    """Compile the engine's steps for `requests` answers at once of `length` tokens; zeros are defaults.

    Raises ConfigError where the model does not divide over the devices.
    """
    if min(requests, length, tensor) < 0 or length > config.text.max_length:
        raise ConfigError(
            f"--rows={requests}, --length={length} and --tensor={tensor} must be positive, and --length at most "
            f"{config.text.max_length} (text.max_length)"
        )
    devices = devices_of(topology)
    layout = Layout(engine_mesh(config, devices if topology.is_tpu or len(devices) > 1 else None, tensor))
    count = layout.devices
    requests, length = requests or ROWS * count, length or min(LENGTH, config.text.max_length)
    report = SampleReport(topology.name, max(1, count // topology.chip.devices), _axes(layout), requests, length)
    report.hbm_gb = topology.share(topology.chip.hbm_bytes) / GB
    settings = _settings(config, requests, length, count)
    report.weights_gb = weights_bytes(config, layout) / GB
    report.features_gb = settings.vision_tokens * config.text.d_model * DTYPE.dtype.itemsize / count / GB
    report.cache_token_bytes = cache_bytes(config.text, 1, 1, DTYPE)
    per_device = settings.share(count)
    report.cache_gb = per_device.pages * per_device.page_size * report.cache_token_bytes / GB
    if report.hbm_gb and report.weights_gb + report.features_gb > report.hbm_gb:
        report.fits, report.reason = False, f"weights alone take {report.weights_gb:.1f} GB of {report.hbm_gb:.0f} GB"
    else:
        _compile(report, config, settings, layout, topology, say)
        _judge(report, per_device, topology, config.text.max_length)
    if not report.fits and not report.nearest:
        report.nearest = _other_devices(config, topology, count)
    return report


def weights_bytes(config: K25Config, layout: Layout) -> float:
    """Of the engine's weights on one device."""
    weights = layout.abstract_weights(abstract_params(config), config, DTYPE)
    return float(sum(_bytes(a) for a in jax.tree.leaves(weights)))


def _bytes(a) -> int:
    return math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * a.dtype.itemsize


def _axes(layout: Layout) -> dict[str, int]:
    return dict(layout.mesh.shape) if layout.mesh else dict.fromkeys(ENGINE_AXES, 1)


def _settings(config: K25Config, requests: int, length: int, devices: int) -> EngineConfig:
    size = EngineConfig.page_size
    return EngineConfig(
        rows=(requests,), pieces=(devices,), piece=PIECE, pages=devices * -(-requests // devices) * -(-length // size),
        max_length=length, dtype=DTYPE.dtype.name, vision_tokens=max(length, 4096),
    )  # fmt: skip


def _compile(
    report: SampleReport, config: K25Config, settings: EngineConfig, layout: Layout, topology: Topology, say
) -> None:
    """Both kinds of steps: decoding alone, and beside a piece of a prompt on each device."""
    text, share = config.text, settings.share(layout.devices)
    if report.hbm_gb and report.cache_gb + report.weights_gb > report.hbm_gb:  # what the compiler would refuse
        share = dataclasses.replace(share, pages=share.rows[-1])
    few, more = (min(layers, text.moe_layers) for layers in (MOE_LAYERS, MORE_LAYERS))
    wanted = [("decode", few, 0), ("decode and read", few, share.pieces[-1])]
    if more > few:
        wanted.append(("decode", more, 0))
    for name, moe_layers, pieces in wanted:
        layers = text.dense_layers + moe_layers
        say(f"{report.topology}: compiling {name}, {layers} of {text.layers} layers, which takes minutes")
        start = time.perf_counter()
        step = _step(config, share, layout, settings, layers, pieces, -(-report.length // settings.page_size))
        program = compiled(step, topology)
        memory, parsed = program.memory_analysis(), hlo.parse(program.as_text())
        times, _, _ = hlo.runs(parsed)
        sent = sum(item.bytes * item.times for item in hlo.collectives(parsed, times, report.mesh))
        code = memory.generated_code_size_in_bytes * text.layers / layers
        seconds = time.perf_counter() - start
        report.programs.append(Program(name, temporaries(memory) / GB, code / GB, sent / GB, seconds))
    if more > few:
        each = max(0.0, report.programs.pop().temp_gb - report.programs[0].temp_gb) / (more - few)
        for program in report.programs:
            program.temp_gb += each * (text.moe_layers - few)


def _step(
    config: K25Config, share: EngineConfig, layout: Layout, settings: EngineConfig, layers: int, pieces: int, width
):
    """The engine's step with so many layers, lowered."""
    few, count = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=layers)), layout.devices
    params = layout.abstract_weights(abstract_params(few), few, DTYPE)
    state: State = state_layout(jax.eval_shape(functools.partial(fresh_state, few, share, count, True)), layout)
    plan = empty_plan(share, count, share.rows[-1], pieces, width)
    return lower_step(few, settings.alternatives, layout, params, state, plan)


def _judge(report: SampleReport, share: EngineConfig, topology: Topology, longest: int) -> None:
    """The peak, whether it fits, and the most requests of each length that do."""
    temp = max(program.temp_gb for program in report.programs)
    fixed = report.weights_gb + report.features_gb + sum(program.code_gb for program in report.programs)
    report.peak_gb = fixed + temp + report.cache_gb
    if not report.hbm_gb:
        return
    report.read_ms = 1e3 * (report.weights_gb + report.cache_gb) * GB / topology.share(topology.chip.hbm_bandwidth)
    free, token = report.hbm_gb - fixed, report.cache_token_bytes / GB
    rows, size, count = share.rows[-1], share.page_size, math.prod(report.mesh.values())

    def most(length: int) -> int:
        """Requests on all devices; more than were compiled for take temporaries in proportion."""
        each = -(-length // size) * size * token
        few = math.floor(max(free - temp, 0.0) / each)
        return count * (few if few < rows else max(rows, math.floor(free / (each + temp / rows))))

    lengths = {report.length, longest, *(2**n for n in range(12, 24) if 2**n < longest)}
    report.largest = [{"length": length, "requests": most(length)} for length in sorted(lengths)]
    if report.peak_gb > report.hbm_gb:
        report.fits, report.reason = False, f"{report.peak_gb:.1f} GB are needed, a device has {report.hbm_gb:.0f}"
        if fewer := most(report.length):
            report.nearest.append(f"--rows={fewer} --length={report.length}")
        if shorter := math.floor(max(free - temp, 0.0) / rows / token) // size * size:
            report.nearest.append(f"--rows={report.requests} --length={shorter}")


def _other_devices(config: K25Config, topology: Topology, count: int) -> list[str]:
    """Another --tensor on the same devices, or the smallest slice, that holds the weights with room beside them."""
    chip = topology.chip

    def first(devices: int) -> str:
        for tensor in tensors(config, devices):
            sizes = (devices // tensor, tensor)
            layout = Layout(AbstractMesh(sizes, ENGINE_AXES) if devices > 1 else None)
            taken = weights_bytes(config, layout)
            if taken <= (1 - ROOM) * topology.share(chip.hbm_bytes):
                return f"--tensor={tensor}: {taken / GB:.1f} GB of weights on a device"
        return ""

    if found := first(count):
        return [found]
    for shape in slices(chip):
        if (chips := math.prod(shape)) * chip.devices > count and (found := first(chips * chip.devices)):
            return [f"--topology={chip.name}-{chips * chip.unit} {found}"]
    return []


def render(report: SampleReport) -> str:
    """The report as text for a terminal; figures are those of one device."""
    mesh = " x ".join(f"{name} {n}" for name, n in report.mesh.items())
    of = f" of {report.hbm_gb:.0f} GB" if report.hbm_gb else ""
    verdict = f"fits: {report.peak_gb:.2f} GB at the peak{of}" if report.fits else f"DOES NOT FIT: {report.reason}"
    lines = [
        f"{report.topology}: {report.chips} chip{'s' * (report.chips != 1)}, the engine's mesh {mesh}; "
        f"{report.requests} requests of {report.length} tokens at once",
        f"memory     {verdict}",
        f"weights    {report.weights_gb:.2f} GB, in {DTYPE.dtype.name}; encoded images {report.features_gb:.3f} GB",
        f"cache      {report.cache_token_bytes:.0f} bytes a token, {report.cache_gb:.2f} GB for its requests",
    ]
    lines += [
        f"{program.name:16s}temporaries {program.temp_gb:.2f} GB, program {program.code_gb:.2f}; compiled in "
        f"{program.compile_s:.0f} s"
        for program in report.programs
    ]
    if report.read_ms:
        rate = 1e3 * report.requests / report.read_ms
        lines.append(
            f"bound      {report.read_ms:.1f} ms to read weights and cache once: {rate:.0f} tokens/s on all devices"
        )
    if report.largest:
        lines.append("largest    requests at once on all devices, by their length:")
        lines += [f"           {entry['length']:9d} tokens {entry['requests']:9d} requests" for entry in report.largest]
    return "\n".join([*lines, *(f"fits       {text}" for text in report.nearest)])
