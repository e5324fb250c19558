"""The report of a run of the stage rl, from the metrics and the ledger that such a run writes."""

import dataclasses
import json
import math

import numpy as np
import pytest

from episodes import END, asked, picture, trace
from k25_jax.agents.trace import TraceError
from k25_jax.config import Experiment, to_dict
from k25_jax.report.rl import CURVES, changes, committed, sample_sections
from k25_jax.report.run import write_run_report
from k25_jax.rl.ledger import Ledger, LedgerError
from pages import Page, needs_nothing_else


def groups(number: int, problems, right: bool):
    """Traces of a batch by the names of its groups; the first sample of each is lost to the machine."""
    for place, problem in enumerate(problems):
        turns = [asked(f"{problem}?", picture(place)), f"</think>{'right' if right else 'wrong'} {problem}{END}"]
        made = [
            trace(turns, f"{problem}/{i}", problem, {"outcome": float(right)}, tools=(), versions=(number,))
            for i in range(3)
        ]
        made[0] = dataclasses.replace(made[0], ending="infrastructure", rewards={}, problem="a tool hung")
        yield f"{number:06d}-{place:03d}", made


def commit(folder, number, problems, right):
    ledger, named = Ledger(folder / "rl"), dict(groups(number, problems, right))
    for name, traces in named.items():
        ledger.commit_group(name, traces)
    ledger.commit_batch(number, list(named), {"version": number})


@pytest.fixture
def run(tmp_path):
    """A run of ten updates whose reward rises."""
    experiment = Experiment(name="rl")
    values = json.loads(json.dumps(to_dict(experiment)))
    (tmp_path / "experiment.json").write_text(json.dumps(values))
    logged = {"entropy": 1.0, "clipped_low": 0.0, "clipped_high": 0.01, "mismatch": "nan", "skipped_updates": 1}
    logged |= {"sampling_seconds": 2.0, "learning_seconds": 1.0, "loss": 0.1}
    rising = lambda step: {"reward": step / 20, "reward/sums": step / 20, "pass_rate": step / 20, "length": 100 - step}  # noqa: E731
    lines = [json.dumps({"step": step} | rising(step) | logged) + "\n" for step in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    commit(tmp_path, 0, ["p0", "p1", "p2"], right=False)
    commit(tmp_path, 9, ["p1", "p3", "p2"], right=True)
    return tmp_path


def test_a_run_is_shown_from_beginning_to_end(k25, run):
    status, out, err = k25("report", f"--workdir={run}")
    assert (status, out) == (0, f"wrote {run / 'report.html'}\n"), err
    text = (run / "report.html").read_text()
    page = Page(text)
    assert needs_nothing_else(text)
    for title in (
        "Beginning and end",
        "Samples before",
        "Samples after",
        "Reward",
        "Entropy",
        "Length",
        "Where the time goes",
    ):
        assert title in page.text, title
    for part in (
        "✗ wrong p1",
        "✓ right p1",
        "✗ wrong p2",
        "✓ right p2",
        "[image]p1?",
        "after 0 updates. The same problems.",
        "after 9 updates",
    ):
        assert part in page.text, part
    assert "after 9 updates" in page.text
    for part in ("wrong p0", "right p3", "hung"):  # problems of one batch alone, and what nobody scores
        assert part not in page.text, part
    figures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len([alt for alt in figures if alt.startswith("image of")]) == 4


def test_batches_without_a_common_problem_are_shown_as_they_are(tmp_path):
    commit(tmp_path, 0, ["p0"], right=False)
    commit(tmp_path, 1, ["p1"], right=True)
    before, after = sample_sections(tmp_path, Experiment(name="rl"))
    assert "no earlier sample of the same problems" in before.caption
    assert [s.question for s in (*before.samples, *after.samples)] == ["[image]p0?", "[image]p1?"]
    assert after.samples[0].image.shape == (28, 56, 3) and after.samples[0].right is True


def test_the_start_models_answers_are_those_before(tmp_path):
    commit(tmp_path, 0, ["p0", "p1"], right=False)
    commit(tmp_path, 5, ["p2", "p1"], right=True)
    assert [s.question for s in sample_sections(tmp_path, Experiment(name="rl"))[0].samples] == ["[image]p1?"]
    ledger = Ledger(tmp_path / "rl")
    for place, traces in enumerate(dict(groups(0, ["p1", "p2", "p3"], right=False)).values()):
        ledger.commit_group(f"start-{place:06d}", traces)
    before, after = sample_sections(tmp_path, Experiment(name="rl"))
    assert [s.question for s in before.samples] == [s.question for s in after.samples] == ["[image]p2?", "[image]p1?"]
    assert [s.right for s in (*before.samples, *after.samples)] == [False, False, True, True]


def test_a_run_of_one_batch_has_nothing_before(tmp_path):
    commit(tmp_path, 0, ["p0"], right=False)
    (after,) = sample_sections(tmp_path, Experiment(name="rl"))
    assert after.title == "Samples after"
    nothing = dataclasses.replace(trace([asked("?"), "a" + END], tools=()), segments=(), clips={}, ending="seconds")
    Ledger(tmp_path / "rl").commit_group("000001-000", [nothing])  # nothing was sampled before its time was over
    Ledger(tmp_path / "rl").commit_batch(1, ["000001-000"], {"version": 1})
    assert sample_sections(tmp_path, Experiment(name="rl"))[1].samples[0].answer == "\n0 tokens, seconds"


def test_a_run_that_has_committed_nothing_has_no_samples(tmp_path):
    (tmp_path / "rl").mkdir()
    assert committed(Ledger(tmp_path / "rl")) == [] and sample_sections(tmp_path, Experiment(name="rl")) == []


def test_a_damaged_ledger_is_named(run):
    file = run / "rl/groups/000009-000.jsonl"
    file.write_text(file.read_text().replace("outcome", "outcame"))
    with pytest.raises((LedgerError, TraceError), match="000009-000.jsonl"):
        write_run_report(run)


def test_the_table_compares_tenths():
    metrics = [
        {"step": i, "reward": float(i), "length/a": 5.0, "entropy": math.nan if i == 3 else 2.0} for i in range(40)
    ]
    rows = {name: rest for name, *rest in changes(metrics).rows}
    assert rows["reward"] == [1.5, 37.5, 36.0, 40] and rows["length/a"] == [5.0, 5.0, 0.0, 40]
    assert rows["entropy"] == [2.0, 2.0, 0.0, 39] and "step" not in rows
    assert changes([{"step": 1, "loss": 3.0}]).rows == []


def test_curves_name_what_a_run_logs():
    """Names that the loss and the source of rollouts give to their metrics, by what they give."""
    from k25_jax.config import RLConfig
    from k25_jax.rl.advantages import Group
    from k25_jax.rl.batches import metrics_of

    traces = [trace([asked("?"), "</think>5" + END], str(i), rewards={"outcome": float(i)}, tools=()) for i in range(2)]
    logged = metrics_of([Group("p", "sums", "reasoning", np.inf, traces)], RLConfig())
    wanted = {name for names, _, _ in CURVES for name in names}
    assert {"reward", "length", "pass_rate", "cut", "infrastructure"} <= logged.keys() & wanted
