"""`k25 eval`: a table of scores by category, with a plot."""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from k25_jax.checkpoint.load import load_model
from k25_jax.data.tasks import make_task
from k25_jax.evals.categories import FILE, SUITE, Score, by_category, check_suite, evaluate_suite, write_scores
from k25_jax.report.plots import bar_chart


def evaluate_checkpoint(checkpoint: str, specs: Sequence[str], questions: int, output: str, as_json: bool) -> None:
    """Evaluate, print, and write evals.json and evals.png below `output` if it is given."""
    specs = list(specs) or list(SUITE)
    check_suite(specs)
    model = load_model(checkpoint)
    with Progress(console=Console(stderr=True)) as progress:
        bars = {spec: progress.add_task(spec, total=min(questions, len(make_task(spec)))) for spec in specs}
        scores = evaluate_suite(model, specs, questions, lambda spec, number: progress.advance(bars[spec], number))
    if output:
        folder = pathlib.Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder / FILE, scores, {"checkpoint": str(checkpoint), "questions": questions})
        (folder / "evals.png").write_bytes(category_chart(scores, "Held-out questions, by category"))
    if as_json:
        print(json.dumps([asdict(score) for score in scores]))
    else:
        console = Console()
        console.print(table(scores), width=max(console.width, 100))  # whole also where no terminal is


def category_chart(scores: Sequence[Score], title: str) -> bytes:
    """The model's mean score in each category beside that of the commonest answer; a PNG."""
    series = {"model": by_category(scores), "commonest answer": by_category(scores, "guessing")}
    return bar_chart(series, title, "mean score", top=1.0)


def table(scores: Sequence[Score]) -> Table:
    """One row a task."""
    out = Table()
    for name, justify in (("category", "left"), ("task", "left"), ("score", "right"), ("±", "right")):
        out.add_column(name, justify=justify)
    out.add_column("commonest answer", justify="right")
    out.add_column("questions", justify="right")
    for score in scores:
        figures = (f"{score.score:.3f}", f"{score.error:.3f}", f"{score.guessing:.3f}", str(score.questions))
        out.add_row(score.category, score.spec, *figures)
    return out
