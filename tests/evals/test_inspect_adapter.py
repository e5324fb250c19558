"""Our task sets run by Inspect, against our own evaluator; left out where Inspect is not installed."""

import csv

import pytest

inspect_ai = pytest.importorskip("inspect_ai", reason="the extra `inspect` is not installed")

from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, get_model, modelapi  # noqa: E402

from answerers import Scripted  # noqa: E402
from k25_jax.evals.benchmarks import load_benchmark  # noqa: E402
from k25_jax.evals.core import evaluate  # noqa: E402
from k25_jax.evals.inspect_adapter import inspect_task, k25  # noqa: E402
from k25_jax.evals.protocol import Settings  # noqa: E402
from k25_jax.evals.summary import summarise  # noqa: E402


@modelapi(name="always")
class Always(ModelAPI):
    """A model that always says the same."""

    def __init__(self, model_name, base_url=None, api_key=None, config=None, says="", stop="stop"):
        super().__init__(model_name, base_url, api_key, config=config or GenerateConfig())
        self.says, self.stop = says, stop

    async def generate(self, input, tools, tool_choice, config):
        return ModelOutput.from_content(self.model_name, self.says, stop_reason=self.stop)


def run(task, says, tmp_path, stop="stop"):
    model = get_model("always/same", says=says, stop=stop, memoize=False)
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none")
    assert log.status == "success", log.error
    return log, {name: metric.value for name, metric in log.results.scores[0].metrics.items()}


@pytest.fixture
def gpqa(tmp_path):
    rows = [
        {"Question": f"{i}?", "Correct Answer": "yes", **{f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}}
        for i in range(6)
    ]
    with open(tmp_path / "g.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "g.csv"


def test_scores_are_those_of_our_evaluator(gpqa, tmp_path):
    task, settings = load_benchmark("gpqa", gpqa), Settings(k=8, max_tokens=100)
    ours = summarise(task, evaluate(Scripted(lambda *_: "Answer: A"), task, settings, range(6)))
    log, metrics = run(inspect_task(task, settings), "Answer: A", tmp_path)
    assert 0 < ours.score < 1 and metrics["mean"] == pytest.approx(ours.score)
    assert metrics["stderr"] == pytest.approx(ours.error, rel=0.1)  # Inspect's corrects for few clusters otherwise
    assert len(log.samples) == 48 and log.samples[0].input[0].content[0].text.startswith("0?")
    assert log.eval.config is not None and log.plan.config.temperature == 1.0


def test_answers_that_ran_into_a_limit_are_failures(gpqa, tmp_path):
    _, metrics = run(inspect_task(load_benchmark("gpqa", gpqa), Settings(k=2)), "Answer: A", tmp_path, "max_tokens")
    assert metrics["mean"] == 0


def test_rendered_tasks_with_pictures(tmp_path):
    log, metrics = run(k25("digits:test", questions=3), "7", tmp_path)
    assert len(log.samples) == 3 and 0 <= metrics["mean"] <= 1
    assert log.samples[0].target in "0123456789"
