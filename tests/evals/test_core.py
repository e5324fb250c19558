"""The protocol: what is asked, what a limit or an error makes of it, and that nothing is asked twice."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import runs
from answerers import Scripted, Sums, right
from k25_jax.config import ConfigError
from k25_jax.evals.core import accuracy, evaluate, spaced
from k25_jax.evals.protocol import Answer, Result, Settings, sample_seed
from k25_jax.evals.results import ResultFile

THREE = Settings(k=3)


def test_every_question_is_asked_k_times_with_seeds_of_its_own():
    answerer = Scripted(right)
    results = evaluate(answerer, Sums(), THREE, [4, 1])
    assert [(r.index, r.sample, r.answer, r.gold, r.score) for r in results] == [
        *((4, sample, "5", "5", 1.0) for sample in range(3)),
        *((1, sample, "2", "2", 1.0) for sample in range(3)),
    ]
    seeds = {request.seed for request in answerer.asked}
    assert seeds == {sample_seed(0, index, sample) for index in (4, 1) for sample in range(3)} and len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert all(f"({request.seed})" in request.messages[0]["content"] for request in answerer.asked)
    assert sample_seed(1, 4, 0) != sample_seed(0, 4, 0)


def test_limits_are_failures_and_errors_are_not_wrong_answers():
    finishes = ["stop", "length", "overflow", "error", "content_filter"]
    answerer = Scripted(lambda request, number: Answer(right(request, number), 7, finishes[number], 2))
    results = evaluate(answerer, Sums(), Settings(), range(5))
    assert [result.score for result in results] == [1, 0, 0, 0, 1]
    assert accuracy(results) == 2 / 4
    cut = evaluate(answerer, Sums(), Settings(score_cut=True), range(5))
    assert [result.score for result in cut] == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("killed_after", [1, 4, 8])
def test_a_killed_evaluation_asks_only_what_is_missing(tmp_path, killed_after):
    file, whole = tmp_path / "sums.jsonl", evaluate(Scripted(right), Sums(), THREE, range(3))
    with pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(right, most=killed_after), Sums(), THREE, range(3), file)
    with open(file, "ab") as half:
        half.write(b'{"index": 0, "answ')  # the line that was being written
    again, told = Scripted(right), []
    assert evaluate(again, Sums(), THREE, range(3), file, told.append) == whole
    assert len(again.asked) == 9 - killed_after and told == [killed_after] + [1] * (9 - killed_after)
    finished = Scripted(right)
    assert evaluate(finished, Sums(), THREE, range(3), file) == whole and not finished.asked
    assert len(file.read_text().splitlines()) == 1 + 9


SLOW = """
import pathlib, sys, time
sys.path.insert(0, "tests")
from answerers import Scripted, Sums, right
from k25_jax.evals.core import evaluate
from k25_jax.evals.protocol import Settings
slowly = Scripted(lambda request, number: time.sleep(0.02) or right(request, number))
evaluate(slowly, Sums(200), Settings(), range(200), pathlib.Path(sys.argv[1]))
"""


def test_a_process_that_is_killed_loses_nothing_that_it_finished(tmp_path):
    file = tmp_path / "sums.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(file)], env=runs.environment(), cwd=runs.ROOT)
    assert runs.wait_for(process, lambda: file.exists() and file.read_bytes().count(b"\n") > 10)
    process.kill()
    process.wait()
    done = file.read_bytes().count(b"\n") - 1
    again = Scripted(right)
    assert 10 <= done < 200 and accuracy(evaluate(again, Sums(200), Settings(), range(200), file)) == 1
    assert len(again.asked) == 200 - done


def test_more_questions_and_samples_add_to_what_is_there(tmp_path):
    file = tmp_path / "sums.jsonl"
    evaluate(Scripted(right), Sums(), THREE, [0, 1], file)
    more = Scripted(right)
    results = evaluate(more, Sums(), dataclasses.replace(THREE, k=4), [0, 1, 2], file)
    assert len(more.asked) == 2 + 4 and results == evaluate(Scripted(right), Sums(), Settings(k=4), [0, 1, 2])


def test_what_ended_in_an_error_is_asked_again(tmp_path):
    file = tmp_path / "sums.jsonl"
    lost = Scripted(lambda request, number: Answer("", None, "error", 5, "503"))
    assert accuracy(evaluate(lost, Sums(), Settings(), range(2), file)) == 0
    assert '"error": "503"' in file.read_text()
    assert accuracy(evaluate(Scripted(right), Sums(), Settings(), range(2), file)) == 1


@pytest.mark.parametrize("other", ["answerer", "task", "settings"])
def test_results_of_something_else_are_not_mixed_in(tmp_path, other):
    file, answerer, task, settings = tmp_path / "sums.jsonl", Scripted(right), Sums(), Settings()
    evaluate(answerer, task, settings, [0], file)
    before = file.read_bytes()
    if other == "answerer":
        answerer.identity = {"step": 7}
    elif other == "task":
        task.digest = lambda: "other"
    else:
        settings = Settings(temperature=0.5)
    named = {
        "answerer": "answerer.step was None and is now 7",
        "task": "task.digest",
        "settings": "temperature was 1.0",
    }
    with pytest.raises(ConfigError, match=f"(?s)sums.jsonl.*{named[other]}.*another --workdir"):
        evaluate(answerer, task, settings, [0], file)
    assert file.read_bytes() == before


def test_damaged_files_and_second_writers_are_named(tmp_path):
    file = tmp_path / "sums.jsonl"
    with ResultFile(file, {"a": 1}) as first:
        first.add(Result(0, "x", "y", 0.5))
        with pytest.raises(ConfigError, match="another evaluation writes to it"), ResultFile(file, {"a": 1}):
            pass
    head, line = file.read_bytes().splitlines()
    for damaged, reason in (
        (b"{", ":2: is not JSON"),
        (b'{"index": 1}', ":2: is no result"),
        (b"[]", ":2: is no JSON"),
    ):
        file.write_bytes(head + b"\n" + damaged + b"\n")
        with pytest.raises(ConfigError, match=reason), ResultFile(file, {"a": 1}):
            pass
    file.write_bytes(line + b"\n")
    with pytest.raises(ConfigError, match="does not say whose"), ResultFile(file, {"a": 1}):
        pass


def test_lines_are_complete_records(tmp_path):
    evaluate(Scripted(right), Sums(), Settings(seed=3), [2], tmp_path / "sums.jsonl")
    head, line = map(json.loads, (tmp_path / "sums.jsonl").read_text().splitlines())
    assert Result(**line) == Result(2, "3", "3", 1.0, 0, 1)
    assert head["of"]["answerer"] == {"scripted": True} and head["of"]["task"] == {"name": "sums", "digest": "sums"}
    assert head["of"]["settings"]["seed"] == 3 and head["of"]["settings"]["max_tokens"] == 98304


def test_questions_are_evenly_spaced():
    for number, wanted in ((100, 7), (5, 7), (7, 7), (9, 1), (3, 0)):
        found = spaced(Sums(number), wanted)
        assert found == sorted(set(found)) and len(found) == min(wanted or number, number)
        assert found[0] == 0 and (len(found) == 1 or found[-1] == number - 1)
        assert len(found) < 3 or np.ptp(np.diff(found)) <= 1


def test_settings_that_make_no_sense_are_refused():
    for bad in ({"k": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}, {"k": 2, "temperature": 0.0}):
        with pytest.raises(ConfigError):
            Settings(**bad)
