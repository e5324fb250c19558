"""Which problems are asked, and when."""

import collections
import math

import pytest

from groups import trace
from k25_jax.config import ConfigError, ProblemsConfig, RLConfig
from k25_jax.rl.ledger import Ledger, LedgerError
from k25_jax.rl.problems import Estimate, asked_in, problems_of, worth_asking
from k25_jax.rl.start import find_out

SUMS = ProblemsConfig("puzzles:train:ask=sum", records=5)
LESS = ProblemsConfig("puzzles:train:ask=less", records=3, ability="knowledge")
RL = RLConfig(problems=(SUMS, LESS), groups=3, estimate=4, pass_low=0.25, pass_high=0.75)


def test_problems_are_those_of_the_tasks_each_once():
    problems = problems_of(RL)
    assert [p.index for p in problems] == [0, 1, 2, 3, 4, 0, 1, 2] and len({p.key for p in problems}) == 8
    assert problems[0].key == "puzzles:train:ask=sum/0" and problems[-1].ability == "knowledge"
    assert problems[2].task.question(2)
    with pytest.raises(ConfigError, match="there twice"):
        problems_of(RLConfig(problems=(SUMS, SUMS)))
    with pytest.raises(ConfigError, match="has 500 records, not the 510"):
        problems_of(RLConfig(problems=(ProblemsConfig("puzzles:test", records=10, first=500),)))


def test_problems_that_are_too_hard_or_too_easy_fall_out():
    problems = problems_of(RL)[:4]
    passed = [0, 1, 3, 4]
    estimates = {
        p.key: Estimate([5] * 4, [True] * n + [False] * (4 - n)) for p, n in zip(problems, passed, strict=True)
    }
    assert worth_asking(problems, estimates, RL) == problems[1:3]
    with pytest.raises(ConfigError, match=r"passes none of 2 problems.*50% of them are too hard, 50% too easy"):
        worth_asking([problems[0], problems[3]], estimates, RL)


def test_each_problem_comes_once_an_epoch_in_an_order_of_its_own():
    problems = problems_of(RL)
    asked = [p.key for batch in range(16) for p in asked_in(batch, problems, 3, seed=5)]
    epochs = [asked[start : start + 8] for start in range(0, 48, 8)]
    assert all(set(epoch) == {p.key for p in problems} for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    again = [p.key for p in asked_in(7, problems, 3, seed=5)]
    assert again == asked[21:24] != [p.key for p in asked_in(7, problems, 3, seed=6)]


def answers(asked, samples):
    """The first problem is never solved, the next one once, and so on; later samples are longer."""
    return {
        name: [trace(float(k < n % (samples + 1)), length=2 + k + n, seed=k) for k in range(samples)]
        for n, name in enumerate(asked)
    }


def test_the_start_model_is_asked_once_and_its_budgets_stay(tmp_path):
    ledger, calls = Ledger(tmp_path), collections.Counter()

    def ask(asked, samples):
        calls[samples] += len(asked)
        return answers(asked, samples)

    start = find_out(ledger, RL, 3, "abc", ask)
    again = find_out(ledger, RL, 3, None, ask)
    assert calls == {4: 8}
    assert [p.key for p in start.problems] == [p.key for p in again.problems]
    assert [p.index for p in start.problems] == [1, 2, 3, 1, 2], "passed 1 to 3 times of 4"
    record = ledger.start()
    assert (record["model"], record["seed"], record["samples"]) == ("abc", 3, 4)
    groups = [again.group(problem, []) for problem in problems_of(RL)]
    assert [group.budget for group in groups] == [math.inf, 3, 4, 5, 6, math.inf, 8, 9]


def test_another_start_model_or_none_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    with pytest.raises(LedgerError, match="start.json is missing"):
        find_out(ledger, RL, 3, None, answers)
    find_out(ledger, RL, 3, "abc", answers)
    with pytest.raises(LedgerError, match="of the model abc, this run starts from xyz"):
        find_out(ledger, RL, 3, "xyz", answers)


def test_without_an_estimate_all_problems_are_asked_and_none_has_a_budget(tmp_path):
    start = find_out(Ledger(tmp_path), RLConfig(problems=(SUMS,), estimate=0), 0, "abc", answers)
    assert len(start.problems) == 5 and start.group(start.problems[0], []).budget == math.inf
