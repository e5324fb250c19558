"""The report of one run: curves from metrics.jsonl, configuration, versions; with the stage rl also samples."""

import json
from collections.abc import Sequence

from k25_jax.checkpoint.folders import read_experiment
from k25_jax.report import html, plots
from k25_jax.report.metrics import read_metrics
from k25_jax.runtime.paths import AnyPath, to_path

CURVES = (  # names of metrics in one figure, a name with / at its end for all that begin so; title, unit
    (("loss", "validation/loss"), "Loss", "loss (nats per token)"),
    (("accuracy",), "Accuracy of the next token", "share of targets"),
    (("learning_rate",), "Learning rate", "rate"),
    (("grad_norm",), "Gradient norm before clipping", "norm"),
    (("grad_norm/",), "Gradient norm by part of the model, before clipping", "norm"),
    (("update_norm/",), "Norm of the update by part of the model", "norm"),
    (("router_max_over_mean",), "Load of the busiest expert", "multiple of the mean load"),
    (("tokens_per_second",), "Speed", "tokens per second"),
)


def curve_sections(metrics: list[dict], groups: Sequence = CURVES) -> list[html.Figure]:
    """One figure for each group of metrics of which the run has one."""
    logged = dict.fromkeys(name for row in metrics for name in row)
    figures = []
    for wanted, title, unit in groups:
        names = [name for name in logged if name in wanted or name.startswith(tuple(w for w in wanted if w[-1] == "/"))]
        curves = {_label(name, wanted): _curve(metrics, name) for name in names}
        if curves:
            steps, values = next(iter(curves.values()))
            rows = max(len(steps) for steps, _ in curves.values())
            last = f"; last value {values[-1]:.4g}" if len(curves) == 1 else ""
            figures.append(
                html.Figure(title, plots.loss_curves(curves, title, unit), f"{title} over {rows} logged steps{last}.")
            )
    return figures


def _label(name: str, wanted: Sequence[str]) -> str:
    """A name without the beginning that it was wanted for."""
    return next((name.removeprefix(one) for one in wanted if one[-1] == "/" and name.startswith(one)), name)


def _curve(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric."""
    rows = [(row["step"], float(row[name])) for row in metrics if name in row]
    return [step for step, _ in rows], [value for _, value in rows]


def config_sections(directory: AnyPath) -> list[html.Config]:
    """The experiment and the environment that it ran in."""
    files = (("Configuration", "experiment.json"), ("Revision, versions, devices", "run.json"))
    found = [(title, directory / name) for title, name in files if (directory / name).is_file()]
    return [html.Config(title, json.loads(file.read_text())) for title, file in found]


def write_run_report(directory: str | AnyPath) -> AnyPath:
    """Write `report.html` into a run's folder. Raises MetricsError when it holds no metrics."""
    directory = to_path(directory)
    metrics, groups, sections = read_metrics(directory / "metrics.jsonl"), CURVES, []
    if (directory / "rl").is_dir():
        from k25_jax.report import rl  # brings JAX, which other reports do without

        groups = (*rl.CURVES, *CURVES)
        sections = rl.rl_sections(directory, read_experiment(directory), metrics)
    sections = [*sections, *curve_sections(metrics, groups), *config_sections(directory)]
    return html.write_report(directory / "report.html", f"Run {directory.name}", sections)
