"""The training step of an experiment, compiled ahead of time for devices that need not be there (K2.5 §3.8).

Everything is the real thing but the arrays, which are shapes: the state, the batch, their layouts, the step.
"""

import dataclasses
import math
import re
import resource
import time
from dataclasses import dataclass, field

import jax

from k25_jax.config import ConfigError, Experiment
from k25_jax.data.packing import Batch, pack_examples, with_samples
from k25_jax.models.experts import ROOM
from k25_jax.parallel import dep
from k25_jax.preflight import hlo
from k25_jax.preflight.cost import arrays_made, jaxpr_flops, live, model_flops, roofline, temporaries
from k25_jax.preflight.exchange import axes_of, exchanged
from k25_jax.preflight.topology import Topology, compiled, devices_of
from k25_jax.sharding.mesh import platform
from k25_jax.train.layout import idle_packs, mesh_of
from k25_jax.train.stages import loss_of
from k25_jax.train.state import HOST, abstract_state
from k25_jax.train.step import make_step

GB = 1e9
LARGEST = 8


@dataclass(frozen=True)
class Tensor:
    """An array of the state or the batch, or one that the program makes: its layout and its bytes on one device."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    bytes: float
    host: bool = False  # lies in the host's memory


@dataclass
class Report:
    """What a step needs of each device. GB are 1e9 bytes, FLOPs and bytes are those of one device and one step."""

    topology: str
    chips: int
    mesh: dict[str, int]
    rows: int
    packs: int
    fits: bool = True
    reason: str = ""  # why it does not fit
    tried: list[dict] = field(default_factory=list)  # other settings, the last of which fits if one does: suggest.py
    notes: list[str] = field(default_factory=list)  # what a user may want to mend
    axes: list[dict] = field(default_factory=list)  # of the mesh: see preflight/exchange.py
    hbm_gb: float = 0.0  # of a device; 0: not known
    peak_hbm_gb: float = 0.0  # arguments, results that are not written in place, temporaries, the program itself
    argument_gb: float = 0.0
    host_gb: float = 0.0  # arguments in the host's memory, a device's share; beside the figures of the device
    output_gb: float = 0.0
    alias_gb: float = 0.0  # results that are written over arguments
    temp_gb: float = 0.0
    code_gb: float = 0.0
    flops: float = 0.0  # the larger of what the step asks for and what was compiled
    flops_asked: float = 0.0  # of the jaxpr, an equal share for each device
    flops_compiled: float = 0.0  # of the program, with the kernels as the jaxpr has them
    hbm_bytes: float = 0.0  # read from and written to memory
    collectives: list[dict] = field(default_factory=list)  # kind, axes, bytes sent, how often, seconds at least
    exchange_seconds: float = 0.0  # of all collectives, were they to come one after the other
    intensity: float = 0.0  # FLOPs over hbm_bytes
    bounds: dict[str, float] = field(default_factory=dict)  # seconds by compute, memory, network, dcn
    step_seconds_bound: float = 0.0
    bound_by: str = ""
    mfu_bound: float = 0.0
    unknown_loops: int = 0  # counted once
    lower_s: float = 0.0
    compile_s: float = 0.0
    rss_gb: float = 0.0  # the most memory that this process has held
    largest: list[dict] = field(default_factory=list)


def with_rows(experiment: Experiment, rows: int = 0) -> Experiment:
    """The experiment with `rows` rows in a step (0: data.batch_size), and as many packs of patches for each as before."""
    data = experiment.data
    if rows < 0:
        raise ConfigError(f"--rows={rows} must be positive")
    if not rows:
        return experiment
    packs = math.ceil(data.packs * rows / data.batch_size)
    return dataclasses.replace(experiment, data=dataclasses.replace(data, batch_size=rows, packs=packs, lanes=0))


def abstract_batch(experiment: Experiment, mesh) -> Batch:
    """A batch as shapes with layouts; what it would take is never allocated."""
    data, model, vision = experiment.data, experiment.model, experiment.train.vision
    small = dataclasses.replace(data, batch_size=1, packs=1, lanes=1)
    batch = pack_examples([], small, model)
    if experiment.stage == "rl":
        batch = with_samples(batch)
    grown = lambda n: lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype)  # noqa: E731
    batch = jax.tree.map(grown(data.batch_size), batch).replace(vision=jax.tree.map(grown(data.packs), batch.vision))
    place = lambda a, layout: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout)  # noqa: E731
    exchange = dep.exchange_of(experiment, mesh)
    if exchange:
        batch = batch.replace(routes=dep.abstract_routes(exchange))
    return jax.tree.map(place, batch, dep.layout(batch, mesh, vision))


def layout(experiment: Experiment, topology: Topology) -> list[Tensor]:
    """Every array of the state and the batch, largest first; nothing is compiled."""
    mesh = mesh_of(experiment, devices_of(topology))
    return _tensors(abstract_state(experiment, mesh), abstract_batch(experiment, mesh))


def _tensors(state, batch) -> list[Tensor]:
    out = []
    for path, a in jax.tree_util.tree_leaves_with_path({"state": state, "batch": batch}):
        name = re.sub(r"[\[\]'.]+", ".", jax.tree_util.keystr(path)).strip(".")
        local = a.sharding.shard_shape(a.shape)
        spec = ", ".join("+".join(e) if isinstance(e, tuple) else e or "-" for e in a.sharding.spec) or "everywhere"
        size, host = float(math.prod(local) * a.dtype.itemsize), a.sharding.memory_kind == HOST
        out.append(Tensor(name, a.shape, a.dtype.name, spec, size, host))
    return sorted(out, key=lambda tensor: -tensor.bytes)


def preflight(experiment: Experiment, topology: Topology, say=lambda text: None) -> Report:
    """Lower and compile the step of `experiment` (see `with_rows`) for `topology`; `say` hears how far it is.

    Raises ConfigError where the mesh or the batch does not divide. A step that the compiler refuses for want of memory
    gives a report with fits=False and the compiler's reason.
    """
    devices = devices_of(topology)
    mesh = mesh_of(experiment, devices)
    data, shape = experiment.data, dict(mesh.shape)
    report = Report(topology.name, len(devices) // topology.chip.devices, shape, data.batch_size, data.packs)
    report.axes, report.notes = axes_of(mesh, devices, topology), [note for note in (idle_packs(experiment),) if note]
    report.hbm_gb = topology.share(topology.chip.hbm_bytes) / GB
    state, batch = abstract_state(experiment, mesh), abstract_batch(experiment, mesh)
    tensors = _tensors(state, batch)
    report.largest = [dataclasses.asdict(tensor) for tensor in tensors if not tensor.host][:LARGEST]
    report.argument_gb, report.host_gb = (
        sum(t.bytes for t in tensors if t.host == host) / GB for host in (False, True)
    )
    if report.hbm_gb and report.argument_gb > report.hbm_gb:
        report.fits, report.peak_hbm_gb = False, report.argument_gb
        report.reason = (
            f"the state and the batch alone are {report.argument_gb:.1f} GB, a device has {report.hbm_gb:.1f}; of the kind "
            f"at least {math.ceil(mesh.size * report.argument_gb / report.hbm_gb)} devices are needed"
        )
        return report
    with jax.set_mesh(mesh):
        say(f"{experiment.name} on {topology.name}: lowering")
        start = time.perf_counter()
        traced = make_step(experiment, loss_of(experiment), mesh).trace(state, batch)
        asked = _asked(experiment, mesh, traced, state, batch)
        lowered = traced.lower()
        report.lower_s = time.perf_counter() - start
        report.flops = report.flops_asked = asked.total
        report.unknown_loops = asked.unknown_loops
        say(f"{experiment.name} on {topology.name}: lowered in {report.lower_s:.0f} s; compiling, which takes minutes")
        start = time.perf_counter()
        try:
            program = compiled(lowered, topology)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _refused(report, str(error))
            report.largest = _with_asked(report.largest, traced.jaxpr, mesh.size)
            program = None
        report.compile_s = time.perf_counter() - start
    if program is not None:
        _memory(report, program.memory_analysis(), topology.is_tpu)
        _program(report, hlo.parse(program.as_text()), topology, asked.kernels, model_flops(experiment), mesh)
    report.rss_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    return report


def _asked(experiment: Experiment, mesh, traced, state, batch):
    """FLOPs of the jaxpr. The blocked form walks over its blocks in loops of unknown length: `ragged` has its products."""
    text = experiment.model.text
    blocked = ("blocked",) if platform() == "tpu" else ("auto", "blocked")
    if text.moe_layers and text.moe.grouped_matmul in blocked:
        moe = dataclasses.replace(text.moe, grouped_matmul="ragged")
        model = dataclasses.replace(experiment.model, text=dataclasses.replace(text, moe=moe))
        changed = dataclasses.replace(experiment, model=model)
        traced = make_step(changed, loss_of(changed), mesh).trace(state, batch)
    return jaxpr_flops(live(traced.jaxpr), mesh.size, 1 / ROOM if mesh.shape["expert"] > 1 else 1.0)


def _memory(report: Report, memory, tpu: bool) -> None:
    report.argument_gb = memory.argument_size_in_bytes / GB
    report.host_gb = memory.host_argument_size_in_bytes / GB
    report.output_gb = memory.output_size_in_bytes / GB
    report.alias_gb = memory.alias_size_in_bytes / GB
    # the peak that compilers for other devices report has no temporaries in it
    report.temp_gb = (temporaries(memory) if tpu else memory.temp_size_in_bytes) / GB
    report.code_gb = memory.generated_code_size_in_bytes / GB
    new = report.output_gb - report.alias_gb
    report.peak_hbm_gb = report.argument_gb + new + report.temp_gb + report.code_gb
    if report.hbm_gb and report.peak_hbm_gb > report.hbm_gb:
        report.fits = False
        report.reason = f"{report.peak_hbm_gb:.1f} GB are needed, a device has {report.hbm_gb:.1f}"


def _refused(report: Report, message: str) -> None:
    """What the compiler says when memory does not suffice: how much it needs, and its largest allocations if listed."""
    report.fits = False
    report.reason = message.split("RESOURCE_EXHAUSTED:")[-1].strip().splitlines()[0]
    needed = re.search(r"\(?([\d.]+)([MGT])\)? (?:exceeds|of)|Used ([\d.]+)([MGT])", report.reason)
    if needed and "hbm" in report.reason.lower():
        number, unit = (needed[1], needed[2]) if needed[1] else (needed[3], needed[4])
        amount = float(number) * {"M": 2**20, "G": 2**30, "T": 2**40}[unit] / GB
        report.peak_hbm_gb = amount  # with the arguments, though the compiler calls all of it temporaries
        report.temp_gb = max(amount - report.argument_gb, 0.0)
    allocations = re.findall(r"Size: ([\d.]+)([KMGT])\s.*?Shape: (\S+)", message, flags=re.S)
    for number, unit, shape in allocations[:LARGEST]:
        amount = float(number) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit]
        report.largest.append(dataclasses.asdict(Tensor("allocation", (), shape, "", amount)))
    report.largest.sort(key=lambda tensor: -tensor["bytes"])


def _with_asked(largest: list[dict], jaxpr, devices: int) -> list[dict]:
    """`largest` and the largest arrays of the jaxpr, one of a shape; what the compiler would have fused is among them."""
    found = {}
    for name, shape, dtype, share in arrays_made(jaxpr, devices):
        found.setdefault((shape, dtype), Tensor(name, shape, str(dtype), "equal share", share))
    made = sorted(found.values(), key=lambda tensor: -tensor.bytes)[:LARGEST]
    return sorted([*largest, *map(dataclasses.asdict, made)], key=lambda tensor: -tensor["bytes"])


def _program(report: Report, program: hlo.Program, topology: Topology, kernels: float, model: float, mesh):
    times, fused, unknown = hlo.runs(program)
    report.flops_compiled = hlo.products(program, times) + kernels
    report.flops = max(report.flops_asked, report.flops_compiled)
    report.hbm_bytes = hlo.traffic(program, times, fused)
    report.unknown_loops += len(unknown)
    report.collectives, network, dcn = exchanged(program, times, mesh, topology)
    report.exchange_seconds = sum(entry["seconds"] for entry in report.collectives)
    report.largest += [dataclasses.asdict(tensor) for tensor in _made(program, times, fused)]
    report.largest.sort(key=lambda tensor: -tensor["bytes"])
    report.intensity = report.flops / report.hbm_bytes if report.hbm_bytes else 0.0
    bounds = roofline(topology, mesh.size, report.flops, report.hbm_bytes, model, network, dcn)
    report.step_seconds_bound, report.mfu_bound = bounds.step, bounds.mfu
    if bounds.step:
        report.bounds = {name: getattr(bounds, name) for name in ("compute", "memory", "network", "dcn")}
        report.bound_by = max(report.bounds, key=report.bounds.get)


def _made(program: hlo.Program, times: dict[str, float], fused: set[str]) -> list[Tensor]:
    """The largest arrays that the program makes; several may share one place in memory, at different times."""
    skipped = {"parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional", "call", "opt-barrier"}
    found: dict[tuple, Tensor] = {}
    for name, body in program.computations.items():
        if name in fused or not times[name]:
            continue
        for i in body:
            parts = hlo.SHAPE.findall(i.type)
            if i.kind in skipped or not parts:
                continue
            kind, dims, _ = max(parts, key=lambda part: hlo.size(f"{part[0]}[{part[1]}]"))
            source = re.search(r'op_name="([^"]*)"', i.rest)
            where = "/".join(source[1].split("/")[-3:]) if source else i.name
            tensor = Tensor(f"made by {where}", tuple(hlo.dims_of(dims)), kind, "local", hlo.size(f"{kind}[{dims}]"))
            found.setdefault((tensor.shape, tensor.dtype), tensor)
    return sorted(found.values(), key=lambda tensor: -tensor.bytes)[:LARGEST]
