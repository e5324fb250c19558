"""Scores by category, against the same questions asked and scored one task at a time; the command `k25 eval`."""

import json
import shutil

import numpy as np
import pytest

import runs
from answerers import Scripted
from k25_jax.cli import main
from k25_jax.config import ConfigError
from k25_jax.data.tasks import CATEGORIES, PROGRAMMED, make_task
from k25_jax.evals.categories import SUITE, Rendered, evaluate_run, evaluate_suite
from k25_jax.evals.core import evaluate
from k25_jax.evals.local import open_checkpoint
from k25_jax.evals.protocol import Settings
from k25_jax.evals.summary import Score

SPECS, QUESTIONS = ("words:test", "puzzles:test"), 3


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evals") / "run"
    shutil.copytree(finished.run, folder)
    return folder


def test_the_suite_has_held_out_questions_of_every_category():
    assert {make_task(spec).category for spec in SUITE} == set(CATEGORIES) - {"text"}
    assert {make_task(spec).split for spec in SUITE} == {"test"}


def test_scores_are_those_of_the_tasks(run):
    asked = []
    scores = evaluate_run(run, SPECS, QUESTIONS, lambda spec, number: asked.append((spec, number)))
    answerer = open_checkpoint(run)
    for spec, score in zip(SPECS, scores, strict=True):
        task = make_task(spec)
        indices = [0, (len(task) - 1) // 2, len(task) - 1]
        settings = Settings(temperature=0.0, max_tokens=task.longest + 4, score_cut=True)
        found = [result.score for result in evaluate(answerer, Rendered(task), settings, indices)]
        assert score.score == pytest.approx(np.mean(found)) and score.questions == QUESTIONS
        assert score.error == pytest.approx(np.std(found, ddof=1) / np.sqrt(QUESTIONS))
        golds = [task.answer(i) for i in indices]
        best = max(np.mean([task.score(gold, i) for i in indices]) for gold in golds)
        assert 0 < score.guessing <= best
    assert asked == [(spec, 1) for spec in SPECS for _ in range(QUESTIONS)]


def test_answers_are_kept_beside_the_run_and_asked_for_once(run):
    scores = evaluate_run(run, SPECS, QUESTIONS)
    file = run / "evals" / str(runs.STEPS) / "puzzles_test.jsonl"
    head, *lines = file.read_text().splitlines()
    changed = [json.dumps({**json.loads(line), "score": 0.75}) for line in lines]
    file.write_text("\n".join([head, *changed]) + "\n")
    again = evaluate_run(run, SPECS, QUESTIONS)
    assert again[0] == scores[0] and again[1].score == 0.75
    kept = json.loads((run / "evals.json").read_text())
    assert kept["of"] == {"step": runs.STEPS, "questions": QUESTIONS}
    assert [Score(**score) for score in kept["scores"]] == again
    file.unlink()


def test_the_answers_of_a_model_that_knows_them():
    """Gold answers, through the whole of it: all scores are 1, whatever the task. Played ones: see test_tool_use.py."""
    for spec in SUITE:
        task = make_task(spec)
        if task.name in PROGRAMMED:
            continue
        golds = {str(task.prompt(i)[0]["content"][-1]): task.answer(i) for i in (0, len(task) - 1)}
        if len(golds) == 2:  # told apart by their texts
            knows = Scripted(lambda request, _, golds=golds: golds[str(request.messages[0]["content"][-1])])
            (score,) = evaluate_suite(knows, [spec], 2)
            assert score.score == 1.0 and score.category == task.category and score.questions == 2


def test_the_command_prints_a_table_or_json_and_keeps_all(run, tmp_path, capsys):
    command = ["eval", f"--checkpoint={run}", "--task=puzzles:test", "--questions=2", f"--workdir={tmp_path / 'out'}"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "text_reasoning" in printed.out and str(tmp_path / "out") in printed.err
    assert (tmp_path / "out" / "evals.png").read_bytes().startswith(b"\x89PNG")
    assert "| text_reasoning | puzzles:test |" in (tmp_path / "out" / "evals.md").read_text()
    before = (tmp_path / "out" / "puzzles_test.jsonl").read_bytes()
    assert main([*command, "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)
    assert score == json.loads((tmp_path / "out" / "evals.json").read_text())["scores"][0]
    assert (tmp_path / "out" / "puzzles_test.jsonl").read_bytes() == before
    assert main([*command, "--temperature=0.5"]) == 2
    assert "another --workdir" in capsys.readouterr().err


def test_the_command_killed_and_started_again_redoes_nothing(run, tmp_path):
    """At temperature 1, by SIGKILL: what was answered stays as it is, and the whole is that of a run without a kill."""
    flags = [f"--checkpoint={run}", "--task=words:test", "--task=puzzles:test", "--questions=60", "--temperature=1"]
    command = ["eval", *flags, "--k=2", "--batch=4"]
    killed, file = tmp_path / "killed", tmp_path / "killed" / "words_test.jsonl"
    process = runs.start(*command, f"--workdir={killed}")
    assert runs.wait_for(process, lambda: file.exists() and file.read_bytes().count(b"\n") > 8)
    process.kill()
    process.communicate()
    before = file.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 8 < len(before.splitlines()) < 121
    assert main([*command, f"--workdir={killed}"]) == 0
    assert file.read_bytes().startswith(before) and len(file.read_bytes().splitlines()) == 121
    assert main([*command, f"--workdir={tmp_path / 'whole'}"]) == 0
    for name in ("words_test", "puzzles_test"):
        lines = [sorted((tmp_path / which / f"{name}.jsonl").read_text().splitlines()) for which in ("killed", "whole")]
        assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=puzzles:train"], "evaluate held-out questions, puzzles:test"),
        (["--task=aime"], "is a public benchmark: ask it alone, with --data=FILE"),
        (["--task=aime", "--task=words:test", "--data=x"], "ask it alone"),
        (["--task=words:test", "--data=x"], "--data goes with one --task of aime"),
        (["--suite=categories", "--task=words:test"], "exclude each other"),
        (["--task=words:test", "--max_tokens=5"], "--max_tokens is for benchmarks"),
        (["--task=words:test", "--k=2"], "set k=1 or a temperature"),
        (["--task=aime", "--data=nowhere.jsonl"], "there is nothing at nowhere.jsonl"),
        (["--model=m"], "goes with --url"),
        (["--url=http://127.0.0.1:9/v1"], "--url needs --model"),
        (["--checkpoint=nowhere"], "nowhere is neither a run"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys, tmp_path):
    assert main(["eval", *flags, f"--workdir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_training_questions_are_refused(run):
    with pytest.raises(ConfigError, match="puzzles:test"):
        evaluate_run(run, ["puzzles:train"], 1)
