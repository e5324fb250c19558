"""What a run is on disk: its configuration and what it ran on, and the state that it goes on from (K2.5 §3.8)."""

import importlib.metadata
import json

import jax
from jax.sharding import Mesh

from k25_jax.checkpoint.folders import CheckpointError, check_same_model
from k25_jax.checkpoint.store import Store
from k25_jax.config import ConfigError, Experiment, to_dict
from k25_jax.parallel.pipeline import bubble
from k25_jax.runtime.paths import AnyPath, make_folder, write
from k25_jax.sharding import processes
from k25_jax.train.handover import load_initial
from k25_jax.train.layout import lanes_of, own_lanes
from k25_jax.train.revision import revision
from k25_jax.train.state import abstract_state, in_layers, in_stages, init_state, state_shardings


def restore_or_init(experiment: Experiment, store: Store, pipeline, mesh: Mesh):
    """(state, step, bad steps just before it) from the newest checkpoint, else as handover.py says."""
    if store.steps():
        state, data = store.restore(abstract_state(experiment, mesh))
        lanes = data["pipelines"]
        now = lanes_of(experiment.data, mesh)
        if len(lanes) != now:
            raise CheckpointError(
                f"{store.directory}: the data was read in data.lanes={len(lanes)}, now in {now}; set "
                "as many, or take only the weights into a new run by train.init_from"
            )
        pipeline.set_state({"lanes": [lanes[lane] for lane in own_lanes(experiment.data, mesh)]})
        step = int(state.step)
        return in_stages(state, experiment, mesh), step, data["bad_in_a_row"]
    state = in_layers(init_state(experiment, mesh), experiment, mesh)
    layout = state_shardings(experiment, mesh).params
    params = jax.tree.map(processes.spread, load_initial(experiment, state.params, mesh), layout)
    return in_stages(state.replace(params=params), experiment, mesh), 0, 0


def save_run(experiment: Experiment, directory: AnyPath) -> None:
    """Write `experiment.json` (the configuration) and `run.json` (revision, versions, devices), in process 0."""
    make_folder(directory)
    check_same_model(experiment, directory)
    if jax.process_index() == 0:
        _write_run(experiment, directory)
    processes.gathered(None)  # all wait for process 0
    blind = [p for p, sees in enumerate(processes.gathered((directory / "run.json").exists())) if not sees]
    if blind:
        raise ConfigError(f"--workdir={directory} is another folder in processes {blind}; choose one that all share")


def _write_run(experiment: Experiment, directory: AnyPath) -> None:
    mesh = experiment.mesh
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    info = {
        "revision": revision(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "devices": [str(d) for d in jax.devices()],
        "processes": jax.process_count(),
        "pipeline_bubble": bubble(mesh.pipe, mesh.repeats, mesh.microbatches or mesh.pipe),
    }
    for name, values in (("experiment.json", to_dict(experiment)), ("run.json", info)):
        write(directory / name, json.dumps(values, indent=1) + "\n")
