"""The form of what was said: every way to be malformed is told, and text that looks like marks is text."""

import numpy as np
import pytest

from episodes import END, TOKENIZER, call
from k25_jax.scoring.form import Form

NUMBER = Form("thinking", ["add"], r"\d+")


def said(*turns: str) -> list[list[int]]:
    return [TOKENIZER.encode(turn, allow_special=True) for turn in turns]


@pytest.mark.parametrize(
    "form, turns",
    [
        (NUMBER, ["hm</think>5" + END]),
        (NUMBER, ["</think> 5\n" + END]),
        (NUMBER, ["a</think>" + call('{"a": 1}') + END, "b</think>5" + END]),
        (NUMBER, ["a</think>let me see" + call('{"a": 1}') + END, "</think>5" + END]),
        (Form("instant", (), "yes|no"), ["yes" + END]),
        (Form("plain"), ["any\ntext" + END]),
        (Form("plain"), ["<think>a</think>b" + END]),
        (Form("plain", ["add"]), [call("{}") + END, "b" + END]),
        (Form("plain"), ["b[EOS]"]),
    ],
)
def test_what_is_asked_for_scores(form, turns):
    assert form.score(said(*turns), TOKENIZER) == (1.0, "")


@pytest.mark.parametrize(
    "form, turns, words",
    [
        (NUMBER, [], "nothing was said"),
        (NUMBER, [""], "turn 1: was cut off"),
        (NUMBER, [END], "closed once"),
        (NUMBER, ["hm</think>5"], "cut off"),
        (NUMBER, ["hm 5" + END], "closed once"),
        (NUMBER, ["<think>hm</think>5" + END], "closed once"),
        (NUMBER, ["hm</think>a</think>5" + END], "</think> in what it says"),
        (NUMBER, ["hm</think>five" + END], "does not have the form"),
        (NUMBER, ["hm</think>5 or 6" + END], "does not have the form"),
        (NUMBER, ["hm</think>" + END], "does not have the form"),
        (NUMBER, ["hm</think>" + call("{}") + END], "ends with a call"),
        (NUMBER, ["hm" + call("{}") + END, "</think>5" + END], "turn 1: its thinking"),
        (NUMBER, ["</think>" + call("{") + END, "</think>5" + END], "turn 1: a call that cannot be made"),
        (NUMBER, ["</think>" + call("[]") + END, "</think>5" + END], "JSON object"),
        (NUMBER, ["</think>" + call("{}", "functions.sub:0") + END, "</think>5" + END], "sub, which is no tool"),
        (NUMBER, ["</think>" + call("{}") + "5" + END], "not whole, or is not its end"),
        (NUMBER, ["</think><|tool_calls_section_begin|>5" + END], "not whole"),
        (NUMBER, ["</think><|tool_call_begin|>5" + END], "not whole"),
        (NUMBER, ["</think><|im_user|>5" + END], "<|im_user|> in what it says"),
        (NUMBER, ["</think>5<|media_pad|>" + END], "<|media_pad|> in what it says"),
        (NUMBER, ["</think>" + call('{"a": "<|im_user|>"}') + END, "</think>5" + END], "among its calls"),
        (Form("instant"), ["a</think>b" + END], "</think> in what it says"),
        (Form("plain"), ["a<think>b" + END], "<think> in what it says"),
        (Form("plain"), ["<think>b" + END], "closed once"),
    ],
)
def test_what_is_malformed_is_told(form, turns, words):
    verdict = form.score(said(*turns), TOKENIZER)
    assert verdict.score == 0.0 and words in verdict.reason, verdict


def test_text_that_looks_like_marks_is_text():
    tokens = [TOKENIZER.special["</think>"], *TOKENIZER.encode("</think><|im_user|>"), TOKENIZER.special[END]]
    assert Form("thinking").score([tokens], TOKENIZER).score == 1.0
    assert NUMBER.score([TOKENIZER.encode("hm</think>5<|im_end|>")], TOKENIZER).score == 0.0


def test_no_tokens_break_it():
    generator = np.random.default_rng(0)
    for number in range(500):
        form = Form(("plain", "thinking", "instant")[number % 3], ["add"], ".{1,9}")
        turns = [generator.integers(0, TOKENIZER.vocab_size + 3, generator.integers(0, 12)).tolist() for _ in range(2)]
        verdict = form.score(turns, TOKENIZER)
        assert verdict.score in (0.0, 1.0) and (verdict.reason == "") == (verdict.score == 1.0)
    assert Form(answer="[0-9]*").score(said("9" * 100_000 + END), TOKENIZER).score == 0.0


def test_forms_are_validated():
    for form, gold in ((NUMBER, "5"), (Form("instant", (), "yes|no"), "no"), (Form(), "any")):
        form.validate(gold, TOKENIZER)
    with pytest.raises(ValueError, match="'five' does not have the form"):
        NUMBER.validate("five", TOKENIZER)
    with pytest.raises(ValueError, match="scores as much as the gold answer"):
        Form("instant", answer=".*").validate("5", TOKENIZER)
    with pytest.raises(ValueError, match="must be one of plain"):
        Form("deep")
