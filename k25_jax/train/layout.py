"""What lies where in a run: the mesh over its devices, and the lanes of the data that each process reads (K2.5 §3.8)."""

import jax
from jax.sharding import Mesh

from k25_jax.config import ConfigError, DataConfig, Experiment
from k25_jax.data.pipeline import make_pipeline
from k25_jax.parallel import dep
from k25_jax.sharding import processes
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train.state import HOST


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
    """Raise ConfigError where rows, tokens, packs, layers or experts do not divide over the mesh."""
    config, model, data, sizes = experiment.mesh, experiment.model.text, experiment.data, mesh.shape
    microbatches = (config.microbatches or config.pipe) if config.pipe > 1 else 1
    packs, blocks = dep.encoders(mesh, experiment.train.vision), config.pipe * config.repeats
    reason = f"the devices that encode under train.vision={experiment.train.vision!r}"
    if jax.process_count() > 1:  # a device takes in as many as any other
        packs, reason = mesh.size, "the devices of all processes"
    checks = (
        ("data.batch_size", data.batch_size, sizes["fsdp"] * sizes["expert"] * microbatches * experiment.train.accumulate,
         "mesh.fsdp x mesh.expert x mesh.microbatches (0 is mesh.pipe) x train.accumulate"),
        ("data.seq_len", data.seq_len, sizes["context"], "mesh.context"),
        ("data.packs", data.packs, packs, reason),
        ("moe.experts", model.moe.experts, sizes["expert"], "mesh.expert"),
        ("text.layers less text.dense_layers", model.moe_layers, blocks if config.pipe > 1 else 1,
         "mesh.pipe x mesh.repeats"),
    )  # fmt: skip
    for field, size, parts, reason in checks:
        if size % parts:
            raise ConfigError(f"{field}={size} must be a multiple of {parts} ({reason}); change one of them")
    if experiment.optim.offload:
        kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
        if HOST not in kinds:
            raise ConfigError(
                f"optim.offload=True needs devices that reach memory of the kind {HOST}, these reach {', '.join(kinds)}; "
                "set optim.offload=False"
            )


def open_data(experiment: Experiment, mesh: Mesh, held_out: bool = False):
    """The batches that this process reads: the rows and packs of its lanes (sharding/processes.py)."""
    lanes = own_lanes(experiment.data, mesh)
    return make_pipeline(experiment.data, experiment.model, experiment.train.steps, lanes, held_out)


def own_lanes(data: DataConfig, mesh: Mesh) -> range:
    """The lanes of the data that this process reads: as many as any other reader, one after the other."""
    everyone = processes.readers(processes.owners_of(mesh))
    if data.lanes % len(everyone):
        raise ConfigError(
            f"data.lanes={data.lanes} must be a multiple of the {len(everyone)} processes that read; with more lanes the "
            "data is another"
        )
    number, own = data.lanes // len(everyone), processes.own_reader(everyone)
    return range(own * number, (own + 1) * number)


def data_states(state: dict, mesh: Mesh) -> list[dict]:
    """The state of each lane of the data, of the states of all processes' pipelines; all call this."""
    states = processes.gathered(state)
    everyone = processes.readers(processes.owners_of(mesh))
    return [lane for reader in everyone for lane in states[reader.processes[0]]["lanes"]]
