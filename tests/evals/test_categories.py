"""Scores by category, against the same questions asked and scored one task at a time."""

import json
import shutil

import numpy as np
import pytest

from k25_jax.checkpoint.load import load_model
from k25_jax.cli import main
from k25_jax.config import ConfigError
from k25_jax.data.tasks import CATEGORIES, make_task
from k25_jax.evals.categories import SUITE, Score, by_category, evaluate_run
from k25_jax.evals.core import evaluate
from k25_jax.sampling.sample import Sampler

SPECS, QUESTIONS = ("words:test", "puzzles:test"), 3


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evals") / "run"
    shutil.copytree(finished.run, folder)
    return folder


def test_the_suite_has_held_out_questions_of_every_category():
    assert {make_task(spec).category for spec in SUITE} == set(CATEGORIES) - {"text", "long_context"}
    assert {make_task(spec).split for spec in SUITE} == {"test"}


def test_scores_are_those_of_the_tasks(run):
    asked = []
    scores = evaluate_run(run, SPECS, QUESTIONS, lambda spec, number: asked.append((spec, number)))
    model = load_model(run)
    for spec, score in zip(SPECS, scores, strict=True):
        task = make_task(spec)
        indices = [0, (len(task) - 1) // 2, len(task) - 1]
        results = evaluate(Sampler(model.params, model.config), model.tokenizer, task, indices, task.longest + 4)
        found = [result.score for result in results]
        assert score.score == pytest.approx(np.mean(found)) and score.questions == QUESTIONS
        assert score.error == pytest.approx(np.std(found, ddof=1) / np.sqrt(QUESTIONS))
        golds = [task.answer(i) for i in indices]
        best = max(np.mean([task.score(gold, i) for i in indices]) for gold in golds)
        assert 0 < score.guessing <= best
    assert asked == [(spec, QUESTIONS) for spec in SPECS]


def test_scores_are_kept_beside_the_run_until_something_else_is_asked(run):
    scores = evaluate_run(run, SPECS, QUESTIONS)
    file = run / "evals.json"
    kept = json.loads(file.read_text())
    kept["scores"][0]["score"] = 0.75
    file.write_text(json.dumps(kept))
    assert evaluate_run(run, SPECS, QUESTIONS)[0].score == 0.75
    assert evaluate_run(run, SPECS[:1], QUESTIONS)[0] == scores[0]


def test_a_category_is_the_mean_of_its_tasks():
    scores = [Score("a", "ocr", 0.5, 0, 1, 0.1), Score("b", "code", 1.0, 0, 1, 0.2), Score("c", "ocr", 0.0, 0, 1, 0.3)]
    assert by_category(scores) == {"ocr": 0.25, "code": 1.0}
    assert by_category(scores, "guessing") == {"ocr": pytest.approx(0.2), "code": 0.2}


def test_the_command_prints_a_table_or_json_and_writes_a_plot(run, tmp_path, capsys):
    command = ["eval", f"--checkpoint={run}", "--task=puzzles:test", "--questions=2"]
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 0
    assert "text_reasoning" in capsys.readouterr().out
    assert (tmp_path / "out" / "evals.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)
    assert score == json.loads((tmp_path / "out" / "evals.json").read_text())["scores"][0]
    assert main(["eval", f"--checkpoint={run}", "--task=puzzles:train"]) == 2
    assert "evaluate held-out questions, puzzles:test" in capsys.readouterr().err


def test_training_questions_are_refused(run):
    with pytest.raises(ConfigError, match="puzzles:test"):
        evaluate_run(run, ["puzzles:train"], 1)
