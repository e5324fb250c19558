"""What lies where in a run: the mesh over its devices, and the lanes of the data that each process reads (K2.5 §3.8)."""

import dataclasses
import logging
import math

import jax
from jax.sharding import Mesh

from k25_jax.config import ConfigError, DataConfig, Experiment
from k25_jax.data.pipeline import make_pipeline
from k25_jax.parallel import dep
from k25_jax.sharding import processes
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train.state import HOST

log = logging.getLogger(__name__)


def mesh_of(experiment: Experiment, devices=None) -> Mesh:
    """The mesh of this run over `devices` (default: all); raises ConfigError where something does not divide."""
    config = experiment.mesh
    try:
        mesh = make_mesh(config.pipe, config.fsdp, config.expert, config.context, devices)
    except ValueError as error:
        raise ConfigError(f"{error}; set mesh.pipe, mesh.fsdp, mesh.context and mesh.expert") from error
    check_mesh(experiment, mesh)
    return mesh


def check_mesh(experiment: Experiment, mesh: Mesh) -> None:
    """Raise ConfigError where rows, tokens, packs, lanes, layers, experts or their width do not divide over the mesh.

    The mesh may be of devices that are described only (preflight/topology.py).
    """
    config, model, data, sizes = experiment.mesh, experiment.model.text, experiment.data, mesh.shape
    microbatches = (config.microbatches or config.pipe) if config.pipe > 1 else 1
    packs, blocks = dep.encoders(mesh, experiment.train.vision), config.pipe * config.repeats
    reason = f"the devices that encode under train.vision={experiment.train.vision!r}"
    if len(processes.hosts_of(mesh)) > 1:  # a device takes in as many as any other
        packs, reason = mesh.size, "the devices of all processes"
    tokens = data.batch_size * data.seq_len // (experiment.train.accumulate * microbatches * math.prod(sizes.values()))
    tokens *= sizes["pipe"]  # rows of a microbatch are shared out over the other axes alone
    checks = (
        ("data.batch_size", data.batch_size, sizes["fsdp"] * sizes["expert"] * microbatches * experiment.train.accumulate,
         "mesh.fsdp x mesh.expert x mesh.microbatches (0 is mesh.pipe) x train.accumulate"),
        ("data.seq_len", data.seq_len, sizes["context"], "mesh.context"),
        ("data.packs", data.packs, packs, reason),
        ("tokens of a device in a microbatch", tokens, min(model.moe.chunk or tokens, tokens) or 1, "moe.chunk"),
        ("moe.experts", model.moe.experts, sizes["expert"], "mesh.expert"),
        ("text.d_model", model.d_model if model.moe_layers else 0, sizes["fsdp"] * sizes["context"],
         "mesh.fsdp x mesh.context, which share out the experts' matrices"),
        ("text.layers less text.dense_layers", model.moe_layers, blocks if config.pipe > 1 else 1,
         "mesh.pipe x mesh.repeats"),
    )  # fmt: skip
    for field, size, parts, reason in checks:
        if size % parts:
            remedy = "take fewer devices, or raise it" if size < parts else "change one of them"
            raise ConfigError(f"{field}={size} must be a multiple of {parts} ({reason}); {remedy}")
    lanes_of(data, mesh)
    if experiment.optim.offload:
        kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
        if HOST not in kinds:
            raise ConfigError(
                f"optim.offload=True needs devices that reach memory of the kind {HOST}, these reach {', '.join(kinds)}; "
                "set optim.offload=False"
            )


def open_data(experiment: Experiment, mesh: Mesh, held_out: bool = False):
    """The batches that this process reads: the rows and packs of its lanes (sharding/processes.py)."""
    if (idle := idle_packs(experiment)) and jax.process_index() == 0 and not held_out:
        log.warning(idle)
    data = dataclasses.replace(experiment.data, lanes=lanes_of(experiment.data, mesh))
    return make_pipeline(data, experiment.model, experiment.train.steps, own_lanes(data, mesh), held_out)


def packs_wanted(experiment: Experiment) -> int:
    """Packs that hold as many images as a batch has tokens for, by data.vision_share at its highest, else all tokens."""
    data, share = experiment.data, experiment.data.vision_share
    most = 1.0 if share is None else max(value for _, value in share) if isinstance(share, tuple) else share
    return math.ceil(data.batch_size * data.seq_len * most * experiment.model.vision.group / data.pack_patches)


def idle_packs(experiment: Experiment) -> str:
    """A line on packs that stay empty whatever is read, since a batch has no tokens for what they hold; else "".

    Frames of a video that make a chunk share its tokens, so that a batch of videos fills as many times more.
    """
    data, wanted = experiment.data, packs_wanted(experiment)
    if data.packs <= experiment.model.vision.pos_time * wanted:
        return ""
    return (
        f"data.packs={data.packs} are {data.packs / max(wanted, 1):.0f} times those that the images of a batch can fill "
        f"({data.batch_size} rows of {data.seq_len} tokens, data.vision_share={data.vision_share}): about "
        f"data.packs={wanted} would do; empty packs are computed too"
    )


def lanes_of(data: DataConfig, mesh: Mesh) -> int:
    """The lanes of the data in all: data.lanes, or where that is 0 one for each process that reads."""
    count = len(processes.readers(processes.owners_of(mesh)))
    if data.lanes % count:
        raise ConfigError(
            f"data.lanes={data.lanes} must be a multiple of the {count} processes that read, or 0 for as many; with more "
            "lanes the data is another"
        )
    return data.lanes or count


def own_lanes(data: DataConfig, mesh: Mesh) -> range:
    """The lanes of the data that this process reads: as many as any other reader, one after the other."""
    everyone = processes.readers(processes.owners_of(mesh))
    number, own = lanes_of(data, mesh) // len(everyone), processes.own_reader(everyone)
    return range(own * number, (own + 1) * number)


def data_states(state: dict, mesh: Mesh) -> list[dict]:
    """The state of each lane of the data, of the states of all processes' pipelines; all call this."""
    states = processes.gathered(state)
    everyone = processes.readers(processes.owners_of(mesh))
    return [lane for reader in everyone for lane in states[reader.processes[0]]["lanes"]]
