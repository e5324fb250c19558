"""A sweep: the runs that an experiment file names in `get_hyper()`, one after the other or several at once.

`get_hyper()` returns a list of mappings with the fields of `Point`. `{workdir}` in an override is the sweep's folder, so that
one run can start from an earlier one's weights. Every run is `k25 train` in a process of its own, in workdir/name. Finished
runs are left alone, a killed one goes on, so the same command continues a sweep. If the file has them, `prepare(workdir)` is
called first, to make the data, and `report(workdir)` last.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from rich.console import Console

from k25_jax.checkpoint.folders import complete_steps
from k25_jax.config import ConfigError, Experiment, experiments, from_dict, import_file, load_experiment, to_dict
from k25_jax.report.metrics import read_metrics
from k25_jax.train.interrupts import raising

LOG, FINISHED = "log.txt", "finished"
GRACE = 120.0  # seconds for a run to end its step and to save it


@dataclasses.dataclass(frozen=True)
class Point:
    """One run: its name, the experiment file (default: the sweep's own) with its argument, and overrides."""

    name: str
    config: str = ""
    overrides: tuple[str, ...] = ()


def sweep(config: str, workdir: pathlib.Path, overrides=(), jobs: int = 1, only: str = "") -> list[str]:
    """Run what is not finished, `jobs` at once, each on its share of the cores; returns the names of failed runs."""
    module = import_file(experiments.split(config)[0])
    named = points(module, config)
    runs = [of_point(point, config, workdir, overrides) for point in named]
    runs = [run for run in runs if only in run.point.name]
    if not runs:
        raise ConfigError(f"{config}: no run has {only!r} in its name; there are {', '.join(p.name for p in named)}")
    workdir.mkdir(parents=True, exist_ok=True)
    if hasattr(module, "prepare"):
        module.prepare(workdir)
    say = Console(stderr=True).print
    failed = follow(runs, jobs, say)
    if not failed and not only and hasattr(module, "report"):
        module.report(workdir)
    return failed


def points(module, config: str) -> list[Point]:
    """What the file's get_hyper() names; raises ConfigError."""
    if not hasattr(module, "get_hyper"):
        raise ConfigError(f"{config} has no get_hyper(); `k25 train` runs an experiment of one run")
    found = [from_dict(Point, values, f"{config}: get_hyper()[{i}]") for i, values in enumerate(module.get_hyper())]
    names = [point.name for point in found]
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError(f"{config}: get_hyper() must give every run a name of its own, not {names}")
    return found


@dataclasses.dataclass
class Run:
    """A point with its folder, its experiment and, while it runs, its process."""

    point: Point
    folder: pathlib.Path
    command: list[str]
    experiment: Experiment
    process: subprocess.Popen | None = None
    began: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether this run, as it is configured now, has ended well."""
        marker = self.folder / FINISHED
        return marker.is_file() and marker.read_text() == self.signature

    @property
    def signature(self) -> str:
        """The configuration, as text."""
        return json.dumps(to_dict(self.experiment), indent=1)

    def start(self, cores: list[int]) -> None:
        """In a process of its own on these cores, its output in log.txt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began = time.perf_counter()
        with open(self.folder / LOG, "ab") as log:
            # In a session of its own: Ctrl-C reaches it through here, once.
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        os.sched_setaffinity(self.process.pid, cores)  # it has no other threads yet; those that come inherit this


def of_point(point: Point, config: str, workdir: pathlib.Path, overrides) -> Run:
    """The run of a point; its configuration is read now, so that an error shows before hours of work."""
    spec, folder = point.config or config, workdir / point.name
    own = [item.replace("{workdir}", str(workdir)) for item in (*point.overrides, *overrides)]
    command = [sys.executable, "-m", "k25_jax.cli", "train", f"--config={spec}", f"--workdir={folder}"]
    command += [f"--config.{item}" for item in own]
    return Run(point, folder, command, load_experiment(spec, own))


def follow(runs: list[Run], jobs: int, say) -> list[str]:
    """Start runs as others end; the names of those that failed. A signal ends them all, each saved, then Interrupted."""
    cores = sorted(os.sched_getaffinity(0))
    jobs = max(1, min(jobs, len(cores)))
    free = [cores[i::jobs] for i in range(jobs)]
    waiting, active, failed = list(runs), [], []
    with raising(), saving(active, say):
        while waiting or active:
            while waiting and free and not failed:
                run = waiting.pop(0)
                if run.finished:
                    say(f"{run.point.name}: finished before")
                    continue
                active.append((run, free.pop()))
                run.start(active[-1][1])
                say(f"{run.point.name}: started, {len(waiting)} to come; its output is in {run.folder / LOG}")
            if failed and not active:
                break
            time.sleep(0.2)
            for run, own in [pair for pair in active if pair[0].process.poll() is not None]:
                active.remove((run, own))
                free.append(own)
                failed += [] if ended(run, say) else [run.point.name]
    return failed


@contextlib.contextmanager
def saving(active: list[tuple[Run, list[int]]], say):
    """When this ends early, the runs that are under way end too, after the step in hand, which they save."""
    try:
        yield
    except BaseException:
        under_way = [run for run, _ in active if run.process]
        for run in under_way:
            run.process.terminate()
        for run in under_way:
            say(f"{run.point.name}: stopping")
            try:
                run.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                run.process.kill()
            step = max(complete_steps(run.folder / "checkpoints"), default=0)
            say(f"{run.point.name}: stopped, goes on after step {step} when the sweep is started again")
        raise


def ended(run: Run, say) -> bool:
    """Say how a run ended; whether it ended well."""
    minutes = (time.perf_counter() - run.began) / 60
    if run.process.returncode:
        last = (run.folder / LOG).read_text(errors="replace").strip().splitlines()[-1:]
        say(f"{run.point.name}: failed after {minutes:.1f} min, status {run.process.returncode}: {' '.join(last)}")
        return False
    (run.folder / FINISHED).write_text(run.signature)
    metrics = (read_metrics(run.folder) or [{}])[-1]
    say(f"{run.point.name}: done in {minutes:.1f} min, loss {float(metrics.get('loss', float('nan'))):.4f}")
    return True
