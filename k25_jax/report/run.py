"""The report of one run: curves from metrics.jsonl, configuration, versions."""

import json

from k25_jax.report import html, plots
from k25_jax.report.metrics import read_metrics
from k25_jax.runtime.paths import AnyPath, to_path

CURVES = (
    ("loss", "Loss", "loss (nats per token)"),
    ("accuracy", "Accuracy of the next token", "share of targets"),
    ("grad_norm", "Gradient norm before clipping", "norm"),
    ("router_max_over_mean", "Load of the busiest expert", "multiple of the mean load"),
    ("tokens_per_second", "Speed", "tokens per second"),
)


def curve_sections(metrics: list[dict]) -> list[html.Figure]:
    """One figure for each metric that the run has."""
    figures = []
    for name, title, unit in CURVES:
        rows = [(row["step"], float(row[name])) for row in metrics if name in row]
        if rows:
            steps, values = zip(*rows, strict=True)
            caption = f"{title} over {len(rows)} logged steps; last value {values[-1]:.4g}."
            figures.append(html.Figure(title, plots.loss_curves({name: (steps, values)}, title, unit), caption))
    return figures


def config_sections(directory: AnyPath) -> list[html.Config]:
    """The experiment and the environment that it ran in."""
    files = (("Configuration", "experiment.json"), ("Revision, versions, devices", "run.json"))
    found = [(title, directory / name) for title, name in files if (directory / name).is_file()]
    return [html.Config(title, json.loads(file.read_text())) for title, file in found]


def write_run_report(directory: str | AnyPath) -> AnyPath:
    """Write `report.html` into a run's folder. Raises MetricsError when it holds no metrics."""
    directory = to_path(directory)
    metrics = read_metrics(directory / "metrics.jsonl")
    sections = [*curve_sections(metrics), *config_sections(directory)]
    return html.write_report(directory / "report.html", f"Run {directory.name}", sections)
