"""`k25 data build|inspect|check|traces`: their flags, progress bars, tables and exit statuses."""

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from k25_jax.data.examples import EXAMPLES, NOTE

BAD_SHOWN = 3  # records named for each reason
OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")  # a task has a colon before


class _Paths(argparse.ArgumentParser):
    """Sources by their paths, wherever they stand; what reads `section.key=value` is an override."""

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        words = [*found.paths, *(word for word in rest if not word.startswith("-"))]
        found.source = [*found.source, *(word for word in words if not OVERRIDE.match(word))]
        return found, [word for word in rest if word.startswith("-")] + [word for word in words if OVERRIDE.match(word)]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The commands below `k25 data`."""
    records = "\n".join(f"  {form:13s} {json.dumps(record)}" for form, record in EXAMPLES.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"one record of each form, as a line of a .jsonl file:\n\n{records}\n\n{NOTE}"

    class Parser(_Paths, type(parser)):
        """A command below `k25 data`."""

    actions = parser.add_subparsers(dest="action", metavar="build|inspect|check|traces", parser_class=Parser)

    def action(name: str, run, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.set_defaults(run=run, parser=added)
        source = "folder, .jsonl, .parquet, .tar, .array_record, or a task such as digits:train"
        added.add_argument("paths", nargs="*", metavar="PATH", help=source)
        added.add_argument("--source", action="append", default=[], metavar="PATH", help="the same; may be repeated")
        config = "experiment whose tokenizer, packs and sources (where none is given) count"
        added.add_argument("--config", metavar="FILE[:ARG]", help=config)
        added.add_argument("--workers", type=int, default=0, help="processes; default one for each processor")
        added.add_argument("--deadline", type=float, default=120.0, help="seconds for one record; default 120")
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    build = action("build", run_build, "write a data set of ArrayRecord shards with all media inside; resumable")
    build.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    build.add_argument("--shards", type=int, default=0, help="number of files; default one for 2048 records")

    inspect = action("inspect", run_inspect, "statistics, and a picture of packed samples with their loss masks")
    inspect.add_argument("--output", metavar="DIR", default="inspect", help="folder to write; default inspect")
    inspect.add_argument("--samples", type=int, default=6, metavar="N", help="packed rows in the picture; default 6")
    records = "records read for the statistics, evenly spaced; default 1000, 0 is all"
    inspect.add_argument("--records", type=int, default=1000, metavar="N", help=records)

    check = action("check", run_check, "read every record; status 1 when one is bad")
    check.add_argument(
        "--allow", type=float, default=0.0, metavar="SHARE", help="share of bad records that is tolerated"
    )
    add_traces(actions)


def add_traces(actions) -> None:
    """The flags of `k25 data traces`; what it does is in `cli.commands`."""
    text = "good traces as chats to learn from, which render to exactly the tokens of the traces"
    added = actions.add_parser("traces", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    added.set_defaults(parser=added, source=[])
    where = "lines of JSON as rollouts are saved, a folder of such files, or a run of the stage rl"
    added.add_argument("paths", nargs="*", metavar="FILE", help=where)
    least = "the least that each reward of a trace must be, from 0 to 1"
    added.add_argument("--min_reward", type=float, required=True, metavar="R", help=least)
    named = "look at this reward alone; may be repeated; default all that a trace has"
    added.add_argument("--reward", action="append", default=[], metavar="NAME", help=named)
    most = "traces of one problem, the best and then the shortest; default all"
    added.add_argument("--per_group", type=int, default=0, metavar="N", help=most)
    added.add_argument("--output", required=True, metavar="FILE.jsonl", help="file to write; pictures lie beside it")
    vocabulary = "folder of the vocabulary; default that of the run that the first file lies in, else bytes"
    added.add_argument("--tokenizer", metavar="DIR", help=vocabulary)
    added.add_argument("--json", action="store_true", help="print JSON")


# ------------------------------------------------------------------------------------------------------------- commands
def run_build(args) -> int:
    """Status 1 when nothing was good."""
    from k25_jax.data.build import build

    reader = _reader(args)
    with _progress("build") as report:
        manifest = build(reader, Path(args.output), args.shards, args.workers, args.deadline, report)
    if args.json:
        print(json.dumps(manifest))
    else:
        _print_summary(f"{args.output} ({len(manifest['files'])} shards, {manifest['modality']})", manifest)
        if manifest["bad"]:
            print(f"bad records: {args.output}/bad.jsonl")
    return 0 if manifest["good"] else 1


def run_inspect(args) -> int:
    """Statistics as a table, statistics.json and samples.png."""
    from k25_jax.data.build import write_json
    from k25_jax.data.contact_sheet import write_sheet
    from k25_jax.data.statistics import collect

    reader, output = _reader(args), Path(args.output)
    with _progress("inspect") as report:
        counts = collect(reader, args.records, args.workers, args.deadline, report)
    output.mkdir(parents=True, exist_ok=True)
    summary = counts.summary()
    write_json(output / "statistics.json", summary | {"bad_records": [bad._asdict() for bad in counts.bad[:1000]]})
    picture = write_sheet(output / "samples.png", reader, args.samples) if counts.good else None
    if args.json:
        print(json.dumps(summary | {"picture": str(picture) if picture else None}))
        return 0
    _print_summary(", ".join(source.path for source in reader.sources), summary)
    _print_lengths(summary["lengths"])
    print(f"wrote {output / 'statistics.json'}" + (f" and {picture}" if picture else ""))
    return 0


def run_check(args) -> int:
    """Status 1 when more than the allowed share of records is bad."""
    from k25_jax.data.statistics import collect

    reader = _reader(args)
    with _progress("check") as report:
        counts = collect(reader, 0, args.workers, args.deadline, report)
    summary = counts.summary()
    share = len(counts.bad) / max(1, summary["records"])
    named = [bad for reason in counts.reasons for bad in _first(counts.bad, reason)]
    ok = share <= args.allow and counts.good > 0
    if args.json:
        print(json.dumps(summary | {"ok": ok, "share_bad": share, "first_bad": [bad._asdict() for bad in named]}))
        return 0 if ok else 1
    _print_summary(", ".join(source.path for source in reader.sources), summary)
    for bad in named:
        print(f"{bad.reason}: {bad.name}: {bad.detail}")
    print(f"{'ok' if ok else 'broken'}: {share:.2%} of the records are bad, {args.allow:.2%} are allowed")
    return 0 if ok else 1


def _first(bad, reason: str):
    return [entry for entry in bad if entry.reason == reason][:BAD_SHOWN]


def _reader(args):
    """How to read: as the experiment does, or with room for everything."""
    from k25_jax.config import DataConfig, SourceConfig, load_experiment, preset
    from k25_jax.data.statistics import Reader

    if args.config:
        experiment = load_experiment(args.config, args.overrides)
        data, model = experiment.data, experiment.model
    elif args.overrides:
        args.parser.error(f"{args.overrides[0]} overrides nothing without --config")
    else:
        data, model = DataConfig(seq_len=2048, batch_size=8, packs=8, pack_patches=16900), preset("tiny")
    sources = tuple(SourceConfig(path) for path in args.source) or data.sources
    if not sources:
        args.parser.error("give the path of a source, or --config with data.sources")
    return Reader(sources, data, model)


# --------------------------------------------------------------------------------------------------------------- output
@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, int], None]]:
    """A bar on stderr; the function takes records done, records in all, and bad ones."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[bad]} bad[/red]"),
        TextColumn("{task.fields[rate]} records/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, bad=0, rate="-")

        def report(done: int, total: int, bad: int):
            speed = progress.tasks[0].speed
            progress.update(task, completed=done, total=total, bad=bad, rate=f"{speed:.0f}" if speed else "-")

        yield report


def _print_summary(title: str, summary: dict):
    """Records, tokens and patches by form, then bad records by reason."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = ("records", "tokens", "loss_tokens", "media_tokens", "clips", "patches")
    table = Table(title=Text(title), title_justify="left")
    table.add_column("form", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for form, row in summary["forms"].items():
        table.add_row(form, *(f"{row[column]:,d}" for column in columns))
    table.add_section()
    table.add_row("good", f"{summary['good']:,d}", *(f"{summary[column]:,d}" for column in columns[1:]))
    for reason, number in summary["bad"].items():
        table.add_row(f"bad: {reason}", f"{number:,d}")
    for reason, number in summary["left_out"].items():
        table.add_row(f"left out: {reason}", f"{number:,d}")
    console = Console(emoji=False, markup=False)
    console.print(table, width=max(console.width, 110))


def _print_lengths(lengths: dict[str, int]):
    """A bar for each doubling of the length."""
    most = max(lengths.values(), default=1)
    print("tokens in a record")
    for length, number in lengths.items():
        print(f"  up to {int(length):>9,d} {number:>9,d} {'█' * max(1, round(40 * number / most))}")
