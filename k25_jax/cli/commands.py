"""What each command does. Whatever is slow to import is imported here, after what the user wrote has been checked."""

import dataclasses
import json
import pathlib
import sys

from k25_jax.cli import checks
from k25_jax.runtime.paths import local_only, to_path


def run_train(args) -> None:
    """Train, alone or with other processes; the first prints where the run lives."""
    from k25_jax.config import load_experiment

    experiment = load_experiment(args.config, args.overrides)
    workdir = to_path(args.workdir or f"runs/{experiment.name}", "--workdir")
    checks.run(experiment, workdir)

    from k25_jax.checkpoint.folders import complete_steps
    from k25_jax.sharding.processes import joined
    from k25_jax.train.interrupts import Interrupted
    from k25_jax.train.loop import train

    with joined() as index:
        try:
            metrics, stopped = train(experiment, workdir), None
        except Interrupted as stop:  # of all processes, which leave each other as after a whole run
            stopped = stop
    if stopped:
        step = max(complete_steps(workdir / "checkpoints"), default=0)
        saved = f"stopped; step {step} is saved in {workdir}, where the same command goes on"
        raise Interrupted(stopped.number, saved) from stopped
    if index == 0:
        print(json.dumps(metrics) if args.json else f"finished: {workdir} (k25 report --workdir={workdir})")


def run_sweep(args) -> int:
    """Status 1 when a run failed."""
    from k25_jax.train.sweep import sweep

    return 1 if sweep(args.config, pathlib.Path(args.workdir), args.overrides, args.jobs, args.only) else 0


def run_experiments(args) -> None:
    """A line for each experiment file, or a copy of one."""
    from k25_jax.config.experiments import copy, titles

    if args.copy:
        print(f"wrote {copy(args.copy, args.output)}")
        return
    if args.output:
        args.parser.error("--output goes with --copy=NAME")
    for name, title in titles().items():
        print(f"{name:26s}{title}")


def run_eval(args) -> None:
    """Print a table, or JSON."""
    from k25_jax.report.evals import evaluate_command

    evaluate_command(args)


def run_params(args) -> None:
    """A table, or one JSON object."""
    from k25_jax.config import load_experiment, preset

    config = load_experiment(args.config, args.overrides).model if args.config else preset(args.preset)

    from k25_jax.models.count import count_params

    counts = count_params(config)
    if args.json:
        print(json.dumps(counts))
        return
    for name, number in counts.items():
        print(f"{name:16s}{number:22,d}{100 * number / counts['total']:9.2f} %")


def run_preflight(args) -> int:
    """A report, or where every array lies. Status 1 when the step does not fit."""
    from k25_jax.config import load_experiment

    experiment = load_experiment(args.config, args.overrides)

    from k25_jax.preflight import aot, table
    from k25_jax.preflight.topology import parse_topology

    topology = parse_topology(args.topology)
    if args.what == "sample":
        from k25_jax.preflight import sample

        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        report = sample.sample_preflight(experiment.model, topology, args.rows, args.length, args.tensor, say)
        print(json.dumps(dataclasses.asdict(report)) if args.json else sample.render(report))
        return 0 if report.fits else 1
    experiment = aot.with_rows(experiment, args.rows)
    if args.layout:
        tensors = aot.layout(experiment, topology)
        rows = [dataclasses.asdict(tensor) for tensor in tensors]
        print(json.dumps(rows) if args.json else table.render_layout(tensors))
        return 0
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    report = aot.preflight(experiment, topology, say)
    if args.suggest and not report.fits:
        from k25_jax.preflight.suggest import suggest

        report.tried = suggest(experiment, topology, report, say)
    print(json.dumps(dataclasses.asdict(report)) if args.json else table.render(report))
    return 0 if report.fits else 1


def run_generate(args) -> int:
    """Print the answer as it comes, or JSON at the end."""
    from k25_jax.sampling.console import generate

    return generate(args)


def run_chat(args) -> int:
    """Read a line, answer, repeat."""
    from k25_jax.sampling.console import chat

    return chat(args)


def run_serve(args) -> int:
    """Answer requests until a signal comes."""
    from k25_jax.serving.serve import serve

    return serve(args)


def run_convert(args) -> None:
    """Write a model in the public format, alone or with other processes, and say what was left."""
    from rich.console import Console
    from rich.progress import Progress

    from k25_jax.checkpoint.convert import convert
    from k25_jax.sharding import peers
    from k25_jax.sharding.processes import joined

    def resume() -> str:
        return "with the files that are missing"

    with joined() as index, peers.watched(resume, "k25 convert"):
        bar = Progress(console=Console(stderr=True), disable=bool(index))

        def show(_, done: int, total: int) -> None:
            if not bar.tasks:  # from the first file on: what is wrong before has a line of its own
                bar.start()
                bar.add_task("files", total=total)
            bar.update(bar.tasks[0].id, completed=done)

        try:
            lines = convert(args.checkpoint, args.output, args.dtype, args.quantise, show, args.file_gb * 1e9)
        finally:
            if bar.tasks:
                bar.stop()
    for line in lines:
        print(line)


def run_data_traces(args) -> int:
    """Records, and what was left out and why. Status 1 when nothing was good enough."""
    from k25_jax.agents.chats import harvest, read_traces, summary, trace_files, write_chats
    from k25_jax.agents.transcript import tokenizer_of

    files, output = trace_files([to_path(path, "FILE") for path in args.source]), to_path(args.output, "--output")
    tokenizer = tokenizer_of(files[0], args.tokenizer)
    found = harvest(read_traces(files), tokenizer, args.min_reward, args.reward, args.per_group)
    if found.records:
        write_chats(found, output)
    print(json.dumps(found.counts()) if args.json else summary(found, args.output))
    return 0 if found.records else 1


def run_report(args) -> None:
    """Curves and configuration of a run, or a trace."""
    if args.trace is not None:
        from k25_jax.report.trace import write_trace_page

        print(f"wrote {write_trace_page(args.trace, args.output or 'trace.html', args.tokenizer)}")
        return
    from k25_jax.report.run import write_run_report

    print(f"wrote {write_run_report(args.workdir)}")


def run_demo(args) -> int:
    """The whole demonstration."""
    from k25_jax.demo import demo

    return demo(local_only(args.workdir, "--workdir", "choose a folder of this machine"), args.steps)
