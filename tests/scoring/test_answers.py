"""What is found in what models write, and what is not."""

import functools
import time

import numpy as np
import pytest

from k25_jax.scoring.answers import (
    anls,
    boxed,
    choice,
    contains,
    final_part,
    number,
    number_list,
    plain,
    same_number,
    short_answer,
)

OPTIONS = ["a red bus", "the blue car", "no car at all", "bicycle"]


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "(c)",
        "**C**",
        "C.",
        "Answer: C",
        "So B is wrong.\n\nAnswer: C",
        "The answer is (C), because A is red.",
        "**Answer:** C",
        "Answer: **C**",
        "Answer: \\boxed{C}",
        "hence $\\boxed{\\text{C}}$",
        "Final answer：C",
        "The correct option is C.",
        "answer is option C",
        "First I thought that the answer is A.\nNo: the answer is C",
        "I weigh them up.\nC) no car at all",
        "It can only be (C)",
        "Answer: no car at all",
        "there is no car at all.\nNo car at all.",
    ],
)
def test_the_chosen_letter(text):
    assert choice(text, OPTIONS) == 2


@pytest.mark.parametrize(
    "text", ["", "I do not know", "A car would be blue.", "Answer: E", "Answer:", "x" * 50_000, "Answer: (" * 9_000]
)
def test_no_letter_is_made_up(text):
    assert choice(text, OPTIONS) is None


def test_an_option_in_words_goes_before_a_letter_that_begins_it():
    assert choice("Answer: A red bus", ["blue", "green", "a red bus"]) == 2
    assert choice("Answer: B", ["B", "C", "A"]) == 1  # options that are letters are still meant by their places


@pytest.mark.parametrize("letters", [2, 4, 10, 26])
def test_every_letter_of_as_many_options(letters):
    options = [f"option {i}" for i in range(letters)]
    for at in range(letters):
        assert choice(f"Hm.\nAnswer: {chr(65 + at)}", options) == at


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a \\boxed{1} b \\boxed{\\frac{1}{2}} c", "\\frac{1}{2}"),
        ("\\boxed{never closed", None),
        ("nothing", None),
        ("\\boxed{}", ""),
    ],
)
def test_boxes(text, wanted):
    assert boxed(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("long thought\nAnswer: 12 cm.", "12 cm"),
        ("Answer: 3\nWait.\n**Answer:** 4", "4"),
        ("Answer:\n7", "7"),
        ("just this", "just this"),
        ("one\ntwo", "two"),
        ("Answer: 3, so \\boxed{5}", "5"),
        ("", ""),
    ],
)
def test_the_final_part(text, wanted):
    assert final_part(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("12", 12), ("-3.5", -3.5), ("−3.5", -3.5), ("$1,234.50", 1234.5), ("12 %", 12), ("3/4", 0.75), ("x = 2e3", 2000),
        (".5", 0.5), ("5 or 6", None), ("none", None), ("", None), ("9" * 500, None), ("1/0", None),
    ],
)  # fmt: skip
def test_numbers(text, wanted):
    assert number(text) == wanted


def test_numbers_are_compared_with_as_many_digits_as_asked_for():
    assert same_number("Answer: 1.24", 1.2, 1) and not same_number("Answer: 1.26", 1.2, 1)
    assert same_number("Answer: 7.0", 7, 9) and not same_number("Answer: 7.9", 7, 9)
    assert number_list("it is [1, 2.5] cm") == [1.0, 2.5]
    for text in ("[a, b]", "1, 2", "", "[" * 9000, "[(" + "(" * 1900 + "]"):
        assert number_list(text) is None


def test_short_answers():
    assert plain("The  Answer, is: $\\text{Blue}$!") == "answer is blue"
    for text, golds in (
        ("Answer: blue Car", ["x", "The blue car."]),
        ("Answer: 0.50", ["1/2"]),
        ("Answer: 5 apples", ["5"]),
        ("2 by 2", ["2 by 2"]),
    ):
        assert short_answer(text, golds) == 1
    for text, golds in (
        ("Answer: blue", ["blue car"]),
        ("", ["x"]),
        ("Answer: 5", ["Model 5"]),
        ("3 by 2", ["2 by 3"]),
    ):
        assert short_answer(text, golds) == 0


def test_containment_is_ocrbenchs_rule():
    assert contains("It reads CENTRE\nstreet.", ["centre street"]) == 1 and contains("Centre", ["centre street"]) == 0
    assert contains("$ x = \\frac{1}{2} $", ["x=\\frac { 1 } { 2 }"], without_spaces=True) == 1
    assert contains("X=1", ["x=1"], without_spaces=True) == 0 and contains("X=1", ["x=1"]) == 1


def test_anls_against_brute_force():
    @functools.cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    generator = np.random.default_rng(0)
    for _ in range(50):
        said, gold = ("".join(generator.choice(list("abc"), generator.integers(1, 9))) for _ in range(2))
        similarity = 1 - distance(said, gold) / max(len(said), len(gold))
        assert anls(f"Answer: {said}", [gold]) == pytest.approx(similarity if similarity >= 0.5 else 0)
    assert anls("Answer: March 5", ["may", "march 5"]) == 1 and anls("Answer: no", ["march 5"]) == 0


PIECES = (
    "Answer|answer is|: |A|B|(C)|\\boxed{|}|{|\\text{|$|**|\n| or |<answer>|1|9,9|\\frac{1}{2}|^|10^|e9|e999|/|0|[|]|,|答案|"
    "是|：|yes| a |−|½|²|=|-|.|#### |\ud800|\x00|İ|ı|ſ|option |(|because|</think>|_|`|'|\\|٤|inf|nan|🙂|Ａ"
).split("|")
STRANGE = ["a red bus", "", "A", "\\frac{1}{2}", "(B)", "7"]


def scores_of(text):
    """All that is read of a text, as a reward may be: a choice, a number, scores."""
    assert choice(text, STRANGE) in (None, *range(len(STRANGE))) and choice(text, []) is None
    for values in ([number(text)], number_list(text) or []):
        assert all(value is None or np.isfinite(value) for value in values)
    for golds in (["blue"], ["1/2", "yes"], ["a, b"], [""], []):
        assert {type(score(text, golds)) for score in (short_answer, anls, contains)} == {float}
        assert all(0 <= score(text, golds) <= 1 for score in (short_answer, anls, contains))
    assert contains(text, [""]) == anls(text, [""]) == 0


def test_no_text_breaks_what_is_read_of_it():
    generator = np.random.default_rng(0)
    for _ in range(600):
        scores_of("".join(generator.choice(PIECES, generator.integers(0, 25)).tolist()))


@pytest.mark.parametrize(
    "piece", ["Answer: (", "答案: ", "9,9", "1 ", "\\boxed{", "A or ", "**A**", "(((", "-1/2", "= 10^"]
)
def test_no_text_takes_long(piece):
    start = time.monotonic()
    scores_of(piece * (25_000 // len(piece)))
    assert time.monotonic() - start < 30
