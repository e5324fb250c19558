"""Answers compared by math-verify: what is equal, what is not, and what never ends."""

import pytest

from k25_jax.scoring.mathcheck import MathChecker, same_answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("so it is \\boxed{204}", "204"),
        ("\\boxed{025}", "25"),
        ("It was 12 or 13. \\boxed{12}", "12"),
        ("Answer: $\\frac{2}{4}$", "0.5"),
        ("\\boxed{9\\sqrt{15}}", "\\sqrt{1215}"),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        ("1,234", "1234"),
        (
            "\\boxed{\\frac{-1+\\sqrt{17}}{2}, \\frac{-1-\\sqrt{17}}{2}}",
            "\\frac{-1-\\sqrt{17}}{2}, \\frac{-1+\\sqrt{17}}{2}",
        ),
    ],
)
def test_the_same_in_other_words(answer, gold):
    assert same_answer(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"), [("", "3"), ("no idea", "3"), ("\\boxed{204}", "205"), ("\\boxed{1}", "1, 2")]
)
def test_something_else(answer, gold):
    assert not same_answer(answer, gold)


def test_what_never_ends_is_ended_and_the_next_pair_is_compared(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    checker = MathChecker(deadline=3.0)
    try:
        assert not checker.same("\\boxed{9^{9^{9^9}}}", "3") and checker.lost == 1
        checker.deadline = 60.0
        assert checker.same("\\boxed{3}", "3") and not checker.same("\\boxed{4}", "3") and checker.lost == 1
        with open(f"/proc/{checker._process.pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
        checker._process.kill()
        assert checker.same("\\boxed{3}", "3") and checker.lost == 1  # another took its place
    finally:
        checker.close()
