"""The training loop, one screen: restore, step, log, checkpoint. A killed run started again goes on exactly.

The devices never wait for the host: while they work on a step, the batch of the next one is made and placed (feed.py) and the
metrics of the one before are read (steplog.py). Only a checkpoint and a validation wait for the step in hand.
"""

import contextlib

import jax

from k25_jax.checkpoint.folders import complete_steps
from k25_jax.checkpoint.layout import read_apart
from k25_jax.checkpoint.store import Store
from k25_jax.config import Experiment
from k25_jax.report.metrics import read_metrics
from k25_jax.runtime.paths import AnyPath, to_path
from k25_jax.runtime.waiting import first_call
from k25_jax.sharding import peers
from k25_jax.train.feed import Feed
from k25_jax.train.interrupts import between_steps
from k25_jax.train.layout import data_states, mesh_of
from k25_jax.train.profiling import ProfileWindow
from k25_jax.train.rollouts import open_source
from k25_jax.train.run import restore_or_init, save_run
from k25_jax.train.saving import Saving
from k25_jax.train.stages import loss_of
from k25_jax.train.state import in_layers
from k25_jax.train.step import make_step
from k25_jax.train.steplog import StepLog
from k25_jax.train.validation import Validation


def train(experiment: Experiment, directory: str | AnyPath, on_step=None) -> dict:
    """Run `experiment` in `directory` to its last step and return the last metrics; resumes what it finds there.

    `on_step(step, metrics)` is called after each logged step. SIGTERM and Ctrl-C end the run after the step in hand, which
    is saved, with Interrupted (train/interrupts.py). Several processes (sharding/processes.py) all call this with the same
    arguments; process 0 writes what is not theirs together. One that fails, or loses another, ends at once.
    """
    directory, config = to_path(directory), experiment.train
    watch = peers.watched(lambda: f"after step {max(complete_steps(directory / 'checkpoints'), default=0)}")
    calm = between_steps(alone=jax.process_count() == 1)  # around the watch: it raises when all have ended in peace
    with calm as stop, watch as watcher, contextlib.ExitStack() as stack, peers.leaving(watcher):
        together = watcher.together if watcher else lambda function: function
        mesh = mesh_of(experiment)
        feed = stack.enter_context(contextlib.closing(Feed(open_source(experiment, mesh, directory), experiment, mesh)))
        validate = stack.enter_context(contextlib.closing(Validation(experiment, mesh, together)))
        save_run(experiment, directory)
        store = stack.enter_context(
            contextlib.closing(Store(directory / "checkpoints", config.keep, read_apart(experiment.model)))
        )
        stack.enter_context(jax.set_mesh(mesh))
        state, start, bad = restore_or_init(experiment, store, feed.pipeline, mesh)
        step_fn = first_call(together(make_step(experiment, loss_of(experiment), mesh)), "compiling the training step")
        log = stack.enter_context(StepLog(experiment, mesh, directory, start, bad, on_step, store.steps))
        profile = stack.enter_context(ProfileWindow(experiment.profile, directory, start))
        saving, saved, step = Saving(config), start, start
        feed.publish(start, state.params)

        def save():
            data = {"pipelines": data_states(ready.data_state, mesh), "bad_in_a_row": log.bad_in_a_row}
            log.publish()
            store.save(step, in_layers(state, experiment, mesh), data)

        for step, ready in feed.batches(start, config.steps, lambda: stop.number):
            profile.before(step)
            state, on_device = step_fn(state, ready.batch)
            stop.arm()
            log.sent(step, on_device, ready)
            profile.after(step, on_device)
            if validate.due(step):
                log.read(lambda: validate(state.params), log_it=True)  # noqa: B023
            decision = saving.decide(step, stop.number)
            if decision.save or decision.stop:
                log.read()
                save()
                saved = step
            if decision.stop:
                stop.number = decision.stop  # it may have come to another process
                if step < config.steps:
                    break
            feed.publish(step, state.params)
        else:
            log.finish()
        if saved < step:
            save()
    return (read_metrics(directory) or [{}])[-1]
