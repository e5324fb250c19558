"""Tool use is scored by what the sandbox really gave: a model that writes the right program is right, unless blinded."""

import json

import pytest

from k25_jax.data.tasks import make_task
from k25_jax.evals.tool_use import Asker
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
