"""`k25 eval`: who is asked what, under which settings; a table of scores, with a plot."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from k25_jax.config import ConfigError
from k25_jax.data.tasks import make_task
from k25_jax.evals.benchmarks import BENCHMARKS, benchmark_class, load_benchmark
from k25_jax.evals.categories import FILE, GREEDY, check_suite, default_suite, evaluate_suite, result_name
from k25_jax.evals.core import evaluate, spaced
from k25_jax.evals.local import open_checkpoint
from k25_jax.evals.protocol import Answerer, Settings, digest_of
from k25_jax.evals.summary import HEAD, Score, by_category, row, summarise, write_scores
from k25_jax.report.plots import bar_chart
from k25_jax.runtime.paths import AnyPath, to_path, write

WIDTH = 140  # columns that the table takes
QUESTIONS = 128  # of each rendered task, when nothing else is asked for


def evaluate_command(args) -> None:
    """Ask, print, and keep all answers, evals.json, evals.md and evals.png in the work directory."""
    named = [name for name in args.task if name in BENCHMARKS]
    answerer = make_answerer(args)
    settings = make_settings(args, rendered=not named)
    folder = to_path(args.workdir or default_folder(args, answerer, settings))
    scores = (ask_benchmark if named else ask_suite)(args, answerer, settings, folder)
    write_scores(folder / FILE, scores, {"answerer": dict(answerer.identity), "settings": asdict(settings)})
    write(folder / "evals.png", category_chart(scores, "Mean score, by category"))
    if args.json:
        print(json.dumps([asdict(score) for score in scores]))
    else:
        Console(width=max(Console().width, WIDTH)).print(table(scores))  # whole also where no terminal is
    print(f"answers, evals.json, evals.md and evals.png: {folder}", file=sys.stderr)


def make_answerer(args) -> Answerer:
    """The server at --url, or a checkpoint."""
    if not args.url:
        return open_checkpoint(args.checkpoint, args.batch)
    from k25_jax.evals.remote import Server  # its client is slow to import

    return Server(args.url, args.model, args.concurrency, args.timeout, args.retries, key_variable=args.api_key_env)


def make_settings(args, rendered: bool) -> Settings:
    """Those of the flags; for the rest K2.5's (§4), or greedy answers to rendered tasks."""
    if rendered and args.max_tokens:
        raise ConfigError("--max_tokens is for benchmarks: rendered tasks say how long their answers are")
    given = {
        name: getattr(args, name)
        for name in ("k", "temperature", "top_p", "context", "max_tokens", "seed")
        if getattr(args, name) is not None
    }
    if rendered:
        return dataclasses.replace(GREEDY, **given)
    kind = benchmark_class(args.task[0])
    return Settings(**({"k": kind.k, "max_tokens": kind.max_tokens} | given))


def default_folder(args, answerer: Answerer, settings: Settings) -> pathlib.Path:
    """A folder for this answerer under these settings; more questions, tasks or samples go into the same."""
    name = args.model or pathlib.PurePath(args.checkpoint).name or "model"
    asked = {key: value for key, value in asdict(settings).items() if key not in ("k", "max_tokens")}
    return pathlib.Path("runs", "evals", f"{result_name(name)}-{digest_of(dict(answerer.identity), asked)[:8]}")


def ask_suite(args, answerer: Answerer, settings: Settings, folder: AnyPath) -> list[Score]:
    """Rendered tasks."""
    specs, questions = list(args.task), args.questions or QUESTIONS
    if not specs:
        specs, note = default_suite(answerer)
        if note:
            print(note, file=sys.stderr)
    check_suite(specs)
    with Progress(console=Console(stderr=True)) as progress:
        totals = {spec: min(questions, len(make_task(spec))) * settings.k for spec in specs}
        bars = {spec: progress.add_task(spec, total=total) for spec, total in totals.items()}

        def report(spec: str, number: int):
            progress.advance(bars[spec], number)

        return evaluate_suite(answerer, specs, questions, settings, folder, report)


def ask_benchmark(args, answerer: Answerer, settings: Settings, folder: AnyPath) -> list[Score]:
    """A public benchmark, once its gold answers have been found to score 1."""
    task = load_benchmark(args.task[0], args.data)
    task.validate()
    indices = spaced(task, args.questions or 0)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(task.name, total=len(indices) * settings.k)
        file = folder / f"{task.name}.jsonl"
        results = evaluate(answerer, task, settings, indices, file, lambda number: progress.advance(bar, number))
    return [summarise(task, results)]


def category_chart(scores: Sequence[Score], title: str) -> bytes:
    """The model's mean score in each category beside that of the commonest answer; a PNG."""
    series = {"model": by_category(scores), "commonest answer": by_category(scores, "guessing")}
    return bar_chart(series, title, "mean score", top=1.0)


def table(scores: Sequence[Score]) -> Table:
    """One row a task."""
    out = Table()
    for name in HEAD:
        out.add_column(name, justify="left" if name in ("category", "task") else "right", no_wrap=True)
    for score in scores:
        out.add_row(*row(score))
    return out
