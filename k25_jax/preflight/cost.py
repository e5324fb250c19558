"""What a step costs: FLOPs of its jaxpr, counted right through loops and kernels, and a roofline of the compiled program.

`jaxpr_flops` says what the step asks for, `hlo.products` what the compiler made of it. The two differ where the compiler
gives several devices the same work, and where it saves or repeats some.
"""

import dataclasses
import math
from dataclasses import dataclass

from jax._src.interpreters.partial_eval import dce_jaxpr  # has no public name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

from k25_jax.config import Experiment
from k25_jax.models.count import count_params
from k25_jax.models.k25 import abstract_params
from k25_jax.preflight.topology import Topology
from k25_jax.train.trainable import split


@dataclass
class Flops:
    """FLOPs of a device: `products` in plain XLA, `kernels` in Pallas. `unknown_loops` counted once, not by their trips."""

    products: float = 0.0
    kernels: float = 0.0
    unknown_loops: int = 0

    @property
    def total(self) -> float:
        return self.products + self.kernels

    def add(self, other: "Flops", times: float = 1.0) -> None:
        """Add `times` the other."""
        self.products += other.products * times
        self.kernels += other.kernels * times
        self.unknown_loops += other.unknown_loops


# ---------------------------------------------------------------------------------------------------------------- jaxpr
def live(jaxpr: ClosedJaxpr) -> Jaxpr:
    """What the results depend on. The rest, such as results of a layer that is computed again, compilers leave out."""
    return dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[0]


def jaxpr_flops(jaxpr: Jaxpr | ClosedJaxpr, devices: int = 1, filled: float = 1.0) -> Flops:
    """FLOPs of one device in matrix products, convolutions and kernels; elementwise work is not counted.

    Outside of a shard_map shapes are those of all devices, and each takes an equal share; inside they are its own.
    `filled` is the share of rows that hold something in products over groups of rows (`ragged_dot`, kernels whose grid
    depends on the data): with expert parallelism a device reserves rows for more token copies than the mean load. A
    conditional counts its most expensive branch.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = Flops()
    for eqn in jaxpr.eqns:
        total.add(_equation(eqn, jaxpr, devices, filled))
    return total


def _equation(eqn, around: Jaxpr, devices: int, filled: float) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name in PRODUCTS:
        return Flops(PRODUCTS[name](eqn) / devices * (filled if name == "ragged_dot_general" else 1.0))
    if name == "pallas_call":
        return Flops(kernels=_kernel(params, filled) / devices)
    if name == "scan":
        inner = jaxpr_flops(params["jaxpr"], devices, filled)
        return _times(inner, params["length"])
    if name == "while":
        inner, trips = jaxpr_flops(params["body_jaxpr"], devices, filled), _trips(eqn)
        if trips is None and inner.total:
            inner.unknown_loops += 1
        return _times(inner, 1 if trips is None else trips)
    if name == "cond":
        return max((jaxpr_flops(branch, devices, filled) for branch in params["branches"]), key=lambda f: f.total)
    if name == "shard_map":
        devices //= math.prod(params["mesh"].shape[axis] for axis in _manual(params))
    total = Flops()
    for value in params.values():
        for inner in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                total.add(jaxpr_flops(inner, devices, filled))
    return total


def arrays_made(jaxpr: Jaxpr | ClosedJaxpr, devices: int = 1):
    """(name, shape, dtype, bytes on one device) of every array that a jaxpr makes, as if none were fused into its use."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            continue
        inside = devices
        if eqn.primitive.name == "shard_map":
            inside //= math.prod(eqn.params["mesh"].shape[axis] for axis in _manual(eqn.params))
        inner = list(jaxprs_in_params(eqn.params))
        for part in inner:
            yield from arrays_made(part, inside)
        for var in [] if inner else eqn.outvars:
            name = f"made by {eqn.source_info.name_stack}/{eqn.primitive.name}"
            yield name, var.aval.shape, var.aval.dtype, var.aval.size * var.aval.dtype.itemsize / devices


def _manual(params: dict):
    """The mesh axes of a shard_map, as one JAX or another calls them."""
    return params.get("newly_manual_axes", params.get("manual_axes"))


def _times(flops: Flops, times: int) -> Flops:
    return Flops(flops.products * times, flops.kernels * times, flops.unknown_loops)


def _dot(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * eqn.outvars[0].aval.size * math.prod(left[d] for d in contracted)


def _convolution(eqn) -> float:
    numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[numbers.rhs_spec[0]]


def _ragged(eqn) -> float:
    """Each row meets one matrix: rows x contracted x columns, whichever dimension is in groups."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    left, right = (v.aval.shape for v in eqn.invars[:2])
    taken = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2.0 * math.prod(left) * math.prod(n for d, n in enumerate(right) if d not in taken)


PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution, "ragged_dot_general": _ragged}


def _kernel(params: dict, filled: float) -> float:
    """The kernel's own estimate, else its body over its grid; by the filled rows where the grid depends on the data."""
    grid = params["grid_mapping"].grid
    dynamic = any(not isinstance(n, int) for n in grid)
    estimate = params.get("cost_estimate")
    if estimate is not None and estimate.flops:
        return float(estimate.flops) * (filled if dynamic else 1.0)
    return jaxpr_flops(params["jaxpr"]).total * math.prod(n for n in grid if isinstance(n, int))


def _trips(eqn) -> int | None:
    """Of `while counter < constant`, with a counter that starts at a constant and rises by one; else None."""
    cond, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    test = cond.eqns[0] if len(cond.eqns) == 1 else None
    if test is None or test.primitive.name != "lt" or not isinstance(test.invars[1], Literal):
        return None
    skipped = eqn.params["cond_nconsts"]
    if test.invars[0] not in cond.invars[skipped:]:
        return None
    index = cond.invars[skipped:].index(test.invars[0])
    start = eqn.invars[skipped + eqn.params["body_nconsts"] + index]
    counter = body.invars[eqn.params["body_nconsts"] + index]
    rises = [e for e in body.eqns if body.outvars[index] in e.outvars and e.primitive.name == "add"]
    by_one = rises and rises[0].invars[0] is counter and isinstance(rises[0].invars[1], Literal)
    if not isinstance(start, Literal) or not by_one or rises[0].invars[1].val != 1:
        return None
    return max(int(test.invars[1].val) - int(start.val), 0)


# --------------------------------------------------------------------------------------------------------------- memory
def temporaries(memory) -> int:
    """Bytes that a compiled program (its memory_analysis()) needs beside arguments, and results not written over them.

    The TPU compiler's `temp_size_in_bytes` has the arguments in it for some programs and not for others. Its peak is
    right for all: it is the total of the compiler's own list of buffers.
    """
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    beside = memory.peak_memory_in_bytes - memory.argument_size_in_bytes - new
    return min(memory.temp_size_in_bytes, max(beside, 0)) if memory.peak_memory_in_bytes else memory.temp_size_in_bytes


# ------------------------------------------------------------------------------------------------------------- roofline
def model_flops(experiment: Experiment) -> float:
    """FLOPs that training on one batch needs on all devices together, nothing computed twice.

    Text: 6 for each active parameter and token (the embedding is looked up, not multiplied), and causal attention over
    whole rows: half of the scores. Vision: 6 for each parameter and patch or, in the projector, each token; and
    attention inside images of `max_image_patches`. Of these 6, 2 are the gradient of the weights, which a part has that is
    trained at all (train.trainable), and 2 the one of its input, which it has too if what comes before it is trained.
    """
    text, vision, data = experiment.model.text, experiment.model.vision, experiment.data
    counts = count_params(experiment.model)
    tokens, patches = data.batch_size * data.seq_len, data.packs * data.pack_patches
    trained = split(abstract_params(experiment.model), experiment.train.trainable)[0].keys()
    vision_passes, projector_passes = 6.0 if "vision" in trained else 2.0, 2.0
    if trained & {"vision", "projector"}:
        projector_passes = 6.0 if "projector" in trained else 4.0
    text_passes = 6.0 if trained - {"vision", "projector"} else 4.0
    products = text_passes * tokens * (counts["active"] - (0 if text.tie_embeddings else counts["embedding"]))
    attention = 6.0 * tokens * text.layers * text.heads * (text.qk_dim + text.v_dim) * data.seq_len / 2
    seen = min(data.max_image_patches, data.pack_patches)
    images = patches * vision_passes * (counts["vision"] + 2.0 * vision.layers * vision.width * seen)
    return products + attention + images + projector_passes * patches * counts["projector"] / vision.group


@dataclass(frozen=True)
class Roofline:
    """Bounds of a step's time in seconds: each alone, and the largest. Zero where the chip's figure is not known."""

    compute: float
    memory: float
    network: float  # the links of a slice, those along its busiest side
    dcn: float  # the data-centre network between slices
    mfu: float  # model FLOPs over what the chips could do in `step`; no run can be above it

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.network, self.dcn)


def roofline(
    topology: Topology,
    devices: int,
    flops: float,
    traffic: float,
    model: float,
    network: float = 0.0,
    dcn: float = 0.0,
) -> Roofline:
    """Of one device's FLOPs, bytes to and from memory, and seconds on both networks, each at its peak and all at once.

    Left out: that products seldom reach the peak, latencies, and what cannot overlap.
    """
    chip = topology.chip
    figures = ((flops, chip.peak_flops), (traffic, chip.hbm_bandwidth))
    seconds = [amount / topology.share(peak) if peak else 0.0 for amount, peak in figures]
    bounds = Roofline(*seconds, network, dcn, mfu=0.0)
    peak = topology.share(chip.peak_flops) * devices
    return dataclasses.replace(bounds, mfu=model / (bounds.step * peak) if bounds.step and peak else 0.0)
