"""What is to be learnt: weights of turns and of records, and one rule for records with nothing to learn."""

import json

import numpy as np
import pytest
from given import DATA, MODEL, PNG, TOKENIZER, coded, example, learnt, refusal, same, text, write_jsonl

from k25_jax.cli import main
from k25_jax.data.pipeline import Preparer
from k25_jax.data.records import Record


def turns(*answers, **fields) -> dict:
    """A question before each answer; an answer is a text, or a turn of the assistant."""
    messages = []
    for answer in answers:
        turn = answer if isinstance(answer, dict) else {"content": answer}
        messages += [{"role": "user", "content": "q"}, {"role": "assistant", **turn}]
    return {"messages": messages, **fields}


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"trainable": False}, {"loss": 0}]
)
def test_a_turn_of_weight_0_is_read_and_not_learnt(flag):
    found = example(turns({"content": "BAD", **flag}, "ok"))
    assert learnt(found) == "ok<|im_end|>" and "BAD" in text(found)
    plain = example(turns("BAD", "ok"))
    assert found.tokens.tolist() == plain.tokens.tolist()
    on = {name: type(value)(1) for name, value in flag.items()}
    assert same(example(turns({"content": "BAD", **on}, "ok")), plain)


def test_weights_of_turns_and_of_the_record_multiply():
    found = example(turns({"content": "half", "weight": 0.5}, "ok", weight=3))
    weights = [float(w) for w in found.loss_weights if w]
    assert weights == [1.5] * 5 + [3.0] * 3
    short = example({"image_base64": coded(PNG), "caption": "x", "weight": 0.25})
    assert set(short.loss_weights.tolist()) == {0.0, 0.25}
    assert same(example(turns({"content": "a", "weight": None}, weight=None)), example(turns("a")))


def test_calls_and_thinking_of_weight_0():
    call = {"function": {"name": "f", "arguments": "{}"}}
    bad = {"content": "", "reasoning_content": "hm", "tool_calls": [call], "weight": 0}
    found = example(turns(bad, {"content": "ok", "reasoning_content": "so"}, mode="thinking"))
    assert learnt(found) == "so</think>ok<|im_end|>" and "functions.f:0" in text(found)


def test_turns_of_sharegpt_have_weights_too():
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "BAD", "weight": 0}, {"from": "human", "value": "r"},
            {"from": "gpt", "value": "ok", "train": True}]  # fmt: skip
    assert learnt(example({"conversations": talk})) == "ok<|im_end|>"


@pytest.mark.parametrize("weight", [-1, True, "0", "1", [1], {}, float("nan"), float("inf"), 1e9, 10**400])
def test_weights_that_are_none(weight):
    for data in (turns({"content": "a", "weight": weight}), turns("a", weight=weight), {"text": "x", "weight": weight}):
        problem = refusal(data)
        assert problem.reason == "form" and "weight must be a number from 0" in str(problem)


@pytest.mark.parametrize(
    "turn",
    [
        {"train": "no"}, {"loss": 0.5}, {"train": False, "weight": 1}, {"training": True, "weight": 0},
        {"loss_mask": [0, 1]}, {"mask": True}, {"masked": False}, {"train_detail": [{"begin_offset": 0}]},
        {"loss_scale": 0.1}, {"function_call": {"name": "f", "arguments": "{}"}},
    ],
)  # fmt: skip
def test_what_says_otherwise_what_is_learnt_is_refused_by_name(turn):
    problem = refusal(turns({"content": "a", **turn}, "b"))
    assert problem.reason == "form" and next(iter(turn)) in str(problem) and "messages[1]" in str(problem)


def test_of_others_nothing_is_learnt():
    silent = turns("a")
    silent["messages"][0] |= {"weight": 0, "train": False}
    assert same(example(silent), example(turns("a")))
    for flag in ({"weight": 1}, {"weight": 0.5}, {"train": True}):
        asked = turns("a")
        asked["messages"][0] |= flag
        assert "messages[0].weight: only what the assistant says is learnt" in str(refusal(asked))


@pytest.mark.parametrize(
    "name", ["loss_mask", "train_on_inputs", "chat_template_kwargs", "enable_thinking", "functions"]
)
def test_fields_of_a_conversation_that_say_what_is_learnt(name):
    problem = refusal(turns("a", **{name: {"x": 1}}))
    assert problem.reason == "form" and f"{name!r} is not read" in str(problem)


# ----------------------------------------------------------------------------------------------------- nothing to learn
NOTHING = [
    {"messages": [{"role": "user", "content": "only a question"}]},
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "only a question"}]},
    turns(""),
    turns(" \n\t"),
    turns("", "  "),
    turns({"content": "BAD", "weight": 0}),
    turns({"content": "BAD", "train": False}, {"content": "WORSE", "weight": 0}, {"content": ""}),
    turns("a", weight=0),
    turns({"content": [{"type": "image", "image_base64": coded(PNG)}]}),
    turns({"content": [{"type": "text", "text": ""}]}),
    turns({"content": "", "reasoning_content": ""}, mode="thinking"),
    {"text": ""},
    {"text": " \n"},
    {"text": "a", "weight": 0},
    {"parts": []},
    {"parts": [{"image_base64": coded(PNG)}]},
    {"parts": [{"text": " "}, {"image_base64": coded(PNG)}]},
    {"image_base64": coded(PNG), "caption": ""},
    {"image_base64": coded(PNG), "ocr": "\n"},
]


def test_check_build_and_training_share_one_rule(tmp_path, capsys):
    good = turns("a", {"content": ""})  # a turn is empty, not the record
    path = write_jsonl(tmp_path, *NOTHING, good)
    wanted = {"empty": len(NOTHING)}
    for data in NOTHING:
        assert refusal(data).reason == "empty", data
        assert Preparer(TOKENIZER, DATA, MODEL)(Record("r", data)).problem.reason == "empty"
    assert Preparer(TOKENIZER, DATA, MODEL)(Record("r", good)).problem is None
    capsys.readouterr()
    assert main(["data", "check", str(path), "--workers=1", "--json"]) == 1
    checked = json.loads(capsys.readouterr().out)
    assert checked["bad"] == wanted and checked["good"] == 1 and checked["loss_tokens"] > 0
    assert main(["data", "build", str(path), f"--output={tmp_path / 'out'}", "--workers=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"] == wanted


def test_little_to_learn_is_enough():
    assert learnt(example(turns("0"))) == "0<|im_end|>"
    call = {"function": {"name": "f", "arguments": "{}"}}
    assert "functions.f:0" in learnt(example(turns({"content": None, "tool_calls": [call]})))
    thought = example(turns({"content": None, "reasoning_content": "so"}, mode="thinking"))
    assert learnt(thought) == "so</think><|im_end|>"
    late = example({"text": " " * 500 + "x"})
    assert np.count_nonzero(late.loss_weights) == len(late)
