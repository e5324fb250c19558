"""Tool use is scored by what the sandbox really gave: a model that writes the right program is right, unless blinded."""

import json

import pytest

from k25_jax.agents.rollout import turn_seed
from k25_jax.cli import main
from k25_jax.data.tasks import PROGRAMMED, make_task
from k25_jax.evals.categories import SUITE, Rendered, default_suite
from k25_jax.evals.core import evaluate
from k25_jax.evals.episodes import Player
from k25_jax.evals.local import Checkpoint
from k25_jax.evals.protocol import Settings, sample_seed
from k25_jax.evals.tool_use import Asker
from k25_jax.sandbox.observation import InfrastructureError
from k25_jax.sandbox.sandbox import Sandbox
from scripted import END, TOKENIZER, Scripted, call

TASK = make_task("lengths:test")


def solve(prompt: str) -> str:
    """The program of the question; then what it gave."""
    if "## Return of" in prompt:
        return prompt.rpartition("ipython:0\n")[2].partition(END)[0] + END
    question = prompt.rpartition("user<|im_middle|>")[2].partition(END)[0]
    index = next(i for i in range(len(TASK)) if question.endswith(TASK.question(i)))
    return call(json.dumps({"code": TASK.program(index)[0]}))


@pytest.mark.usefixtures("bwrap")
def test_a_program_is_scored_by_what_it_gave():
    engine = Scripted(solve)
    with Asker(engine, TOKENIZER, width=2) as asker:
        shown, hidden, blank = (asker.ask("lengths:test", 4, condition) for condition in ("shown", "hidden", "blank"))
    assert [o.score for o in shown + hidden] == [1.0] * 8 and all(o.ran for o in shown + blank)
    assert [o.score for o in blank] == [0.0] * 4 and {o.answer for o in blank} == {"0"}
    assert {(o.turns, o.ending) for o in shown} == {(2, "answer")}
    assert [len(r.clips) for r in engine.requests] == [1] * 8 + [0] * 8 + [1] * 8


# ------------------------------------------------------------------------------------------- as a task of `k25 eval`
SETTINGS = Settings(k=2, temperature=0.5, max_tokens=256, score_cut=True)


class Solver(Checkpoint):
    """A checkpoint whose model says what `say` does."""

    def __init__(self, say=solve):
        super().__init__(lambda: None, {"solver": True})
        self.engine = Scripted(say)

    def open(self):
        return self.engine, TOKENIZER


@pytest.mark.usefixtures("bwrap")
def test_played_questions_are_scored_and_kept_like_others(tmp_path):
    """Two episodes at once; after a kill, those that were finished are not played again."""
    task, indices, solver = Rendered(TASK), [0, 7, 3, 4, 9], Solver()
    with Player(solver, width=2) as player:
        whole = evaluate(player, task, SETTINGS, indices)
        assert [(r.score, r.answer, r.finish) for r in whole] == [(1.0, r.gold, "stop") for r in whole]
        seeds = [
            turn_seed(sample_seed(0, i, sample), turn) for i in indices for sample in range(2) for turn in range(2)
        ]
        assert sorted(r.sampling.seed for r in solver.engine.requests) == sorted(seeds)
        assert all(len(r.clips) == 1 for r in solver.engine.requests)

        file, left = tmp_path / "lengths.jsonl", iter(range(3))
        with pytest.raises(StopIteration):
            evaluate(player, task, SETTINGS, indices, file, lambda _: next(left))
        again = Solver()
        with Player(again, width=2) as second:
            assert evaluate(second, task, SETTINGS, indices, file) == whole
        assert len(again.engine.requests) == 2 * (10 - 4)
    assert json.loads(file.read_text().splitlines()[0])["of"]["answerer"]["tool"] == "ipython"


@pytest.mark.usefixtures("bwrap")
def test_how_an_episode_ended_is_how_its_answer_did(monkeypatch):
    def finish(say, **settings):
        with Player(Solver(say), width=1) as player:
            (result,) = evaluate(player, Rendered(TASK), Settings(**{"max_tokens": 256} | settings), [0])
        return result.finish, result.score, result.error

    calling = lambda _: call('{"code": "1"}')  # noqa: E731
    assert finish(calling) == ("length", 0, "")
    assert finish(lambda _: "on and on " * 100) == ("length", 0, "")
    assert finish(solve, context=300) == ("overflow", 0, "")

    def broken(*_):
        raise InfrastructureError("the disk is gone")

    monkeypatch.setattr(Sandbox, "run", broken)
    assert finish(calling) == ("error", 0, "the disk is gone")


def test_without_bubblewrap_the_suite_leaves_tool_use_out_and_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    specs, note = default_suite(Solver())
    assert set(SUITE) - set(specs) == {f"{name}:test" for name in PROGRAMMED}
    assert "tool_use is left out" in note and "bubblewrap (bwrap) is not there" in note and "install it" in note
    assert main(["eval", "--task=dots:test", "--questions=1", f"--workdir={tmp_path / 'out'}"]) == 2
    assert "dots:test: no sandbox can be had: bubblewrap (bwrap) is not there" in capsys.readouterr().err
    url = ["--url=http://127.0.0.1:9/v1", "--model=m"]
    assert main(["eval", "--task=dots:test", *url, f"--workdir={tmp_path / 'out'}"]) == 2
    assert "dots:test: its questions are played with a tool in a sandbox" in capsys.readouterr().err
