"""The training loop, one screen: restore, step, log, checkpoint. A killed run started again goes on exactly."""

import contextlib
import importlib.metadata
import json
import logging
import pathlib
import subprocess
import time

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from k25_jax.checkpoint.load import read_experiment
from k25_jax.checkpoint.store import CheckpointError, Store, complete_steps
from k25_jax.config import ConfigError, DataConfig, Experiment, to_dict
from k25_jax.data.mixture import realised
from k25_jax.data.pipeline import make_pipeline
from k25_jax.parallel import dep, hosts
from k25_jax.parallel.pipeline import bubble
from k25_jax.report.metrics import MetricsWriter, read_metrics
from k25_jax.sharding import peers, processes
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train.handover import load_initial
from k25_jax.train.interrupts import between_steps
from k25_jax.train.stages import loss_of
from k25_jax.train.state import HOST, abstract_state, init_state, state_shardings
from k25_jax.train.step import make_step

log = logging.getLogger(__name__)


class BadSteps(RuntimeError):
    """Too many steps in a row without a finite loss and gradient."""


def train(experiment: Experiment, directory: str | pathlib.Path, on_step=None) -> dict:
    """Run `experiment` in `directory` to its last step and return the last metrics; resumes what it finds there.

    `on_step(step, metrics)` is called after each logged step. Ctrl-C ends the run after the step in hand. Several processes
    (sharding/processes.py) all call this with the same arguments; process 0 writes what is not theirs together. One that
    fails, or loses another, ends at once.
    """
    directory, config, first = pathlib.Path(directory), experiment.train, jax.process_index() == 0
    watch = peers.watched(lambda: f"after step {max(complete_steps(directory / 'checkpoints'), default=0)}")
    calm = between_steps(alone=jax.process_count() == 1)
    with watch as watcher, calm as stop_if_asked, contextlib.ExitStack() as stack, peers.leaving(watcher):
        mesh = mesh_of(experiment)
        pipeline = stack.enter_context(contextlib.closing(open_data(experiment, mesh)))
        save_run(experiment, directory)
        store = stack.enter_context(contextlib.closing(Store(directory / "checkpoints", config.keep)))
        stack.enter_context(jax.set_mesh(mesh))
        state, start, bad = restore_or_init(experiment, store, pipeline, mesh)
        step_fn = make_step(experiment, loss_of(experiment), mesh)
        step_fn = watcher.together(step_fn) if watcher else step_fn
        writer = stack.enter_context(MetricsWriter(directory)) if first else None
        if writer:
            writer.truncate_after(start)
        bar = stack.enter_context(progress_bar(hidden=not first))
        task = bar.add_task("train", total=config.steps, completed=start, note="compiling")
        logged = saved = step = start
        for step, batch, waited in batches(pipeline, experiment, start):
            began = time.perf_counter()
            placed = hosts.place(batch, mesh, experiment.model.vision, config.vision)
            state, on_device = step_fn(state, placed)
            metrics = {k: v.item() for k, v in jax.device_get(on_device).items()}
            metrics |= hosts.metrics(batch, placed, mesh, experiment.model.vision, config.vision)
            seconds = time.perf_counter() - began + waited
            bad = bad + 1 if metrics["bad"] else 0
            metrics |= {"bad_in_a_row": bad, "tokens_per_second": metrics["tokens"] / seconds}
            metrics |= {"step_seconds": seconds, "data_seconds": waited, "data_share": waited / seconds}
            if step % config.log_every == 0 or bad:
                logged = log_step(step, metrics, experiment, pipeline, mesh, writer, on_step)
            note = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=step, note=note)
            if bad and first:
                log.warning("step %d: loss %s or gradient not finite; skipped", step, metrics["loss"])
            if bad >= config.max_bad_steps:
                raise BadSteps(
                    f"{directory}: {bad} steps in a row up to step {step} had no finite loss or gradient. Weights are "
                    f"as before them, checkpoints: {store.steps()}. Lower optim.peak_lr, check the data, or raise "
                    "train.max_bad_steps"
                )
            if step % config.checkpoint_every == 0:
                saved = step
                store.save(step, state, {"pipelines": data_states(pipeline, mesh), "bad_in_a_row": bad})
            stop_if_asked()
        if logged < step:
            log_step(step, metrics, experiment, pipeline, mesh, writer, on_step)
        if saved < step:
            store.save(step, state, {"pipelines": data_states(pipeline, mesh), "bad_in_a_row": bad})
    return (read_metrics(directory) or [{}])[-1]


def batches(pipeline, experiment: Experiment, start: int):
    """(step, batch, seconds waited for it) after step `start`, to train.steps or until no process has a token left."""
    data = experiment.data
    ends = data.text_tokens or data.vision_tokens or any(source.max_epochs for source in data.sources)
    for step in range(start + 1, experiment.train.steps + 1):
        began = time.perf_counter()
        batch = next(pipeline)
        waited = time.perf_counter() - began
        if ends and not any(processes.gathered(bool(batch.segments_BL.any()))):
            log.info("all budgets and epochs of the data are spent after step %d", step - 1)
            return
        yield step, batch, waited


def log_step(step: int, metrics: dict, experiment: Experiment, pipeline, mesh: Mesh, writer, on_step) -> int:
    """Write the metrics of a step and what the data was made of so far; all processes call this. Returns the step."""
    states = data_states(pipeline, mesh)
    if writer:
        metrics = metrics | realised(states, experiment.data)
        writer.write(step, metrics)
        if on_step:
            on_step(step, metrics)
    return step


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


def open_data(experiment: Experiment, mesh: Mesh):
    """The batches that this process reads: the rows and packs of its lanes (sharding/processes.py)."""
    return make_pipeline(experiment.data, experiment.model, experiment.train.steps, own_lanes(experiment.data, mesh))


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


def data_states(pipeline, mesh: Mesh) -> list[dict]:
    """The state of each lane of the data; all processes call this."""
    states = processes.gathered(pipeline.get_state())
    everyone = processes.readers(processes.owners_of(mesh))
    return [lane for reader in everyone for lane in states[reader.processes[0]]["lanes"]]


def restore_or_init(experiment: Experiment, store: Store, pipeline, mesh: Mesh):
    """(state, step, bad steps just before it) from the newest checkpoint, else as handover.py says."""
    if store.steps():
        state, data = store.restore(abstract_state(experiment, mesh))
        lanes = data["pipelines"]
        if len(lanes) != experiment.data.lanes:
            raise CheckpointError(
                f"{store.directory}: the data was read in data.lanes={len(lanes)}, now in {experiment.data.lanes}; set "
                "as many, or take only the weights into a new run by train.init_from"
            )
        pipeline.set_state({"lanes": [lanes[lane] for lane in own_lanes(experiment.data, mesh)]})
        return state, int(state.step), data["bad_in_a_row"]
    state = init_state(experiment, mesh)
    layout = state_shardings(experiment, mesh).params
    params = jax.tree.map(processes.spread, load_initial(experiment, state.params, mesh), layout)
    return state.replace(params=params), 0, 0


def save_run(experiment: Experiment, directory: pathlib.Path) -> None:
    """Write `experiment.json` (the configuration) and `run.json` (revision, versions, devices), in process 0."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "experiment.json").exists() and read_experiment(directory).model != experiment.model:
        raise ConfigError(f"{directory} holds a run of another model; choose another --workdir or delete it")
    if jax.process_index() == 0:
        _write_run(experiment, directory)
    processes.gathered(None)  # all wait for process 0
    blind = [p for p, sees in enumerate(processes.gathered((directory / "run.json").exists())) if not sees]
    if blind:
        raise ConfigError(f"--workdir={directory} is another folder in processes {blind}; choose one that all share")


def _write_run(experiment: Experiment, directory: pathlib.Path) -> None:
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
        temporary = directory / f"{name}.tmp"  # a kill or a full disk must not leave half a file
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(directory / name)


def revision() -> str:
    """What git calls the code that runs."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    except OSError:  # git is not installed
        return "unknown"
    return git.stdout.strip() or "unknown"


def progress_bar(hidden: bool = False) -> Progress:
    """Step, loss, tokens/s, elapsed and remaining time, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=hidden,
    )  # fmt: skip
