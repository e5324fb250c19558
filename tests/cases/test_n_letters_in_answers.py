"""Letters of options in the forms that models write and public scorers read, and words that are no letters."""

import pytest

from k25_jax.evals.benchmarks.base import Benchmark
from k25_jax.scoring.answers import choice, final_part, number, number_list, plain, same_number, short_answer

OPTIONS = ["a red bus", "the blue car", "no car at all", "bicycle"]

C = """Answer: Option C
Answer: \\(C\\)
Answer: "C"
**Answer:** C
**Answer**: C
**Answer: C**
__Answer__: C
Answer: **C**
Answer: 'C'
Answer: `C`
Answer: “C”
Answer: [C]
Answer: {C}
Answer: <C>
Answer: (C)
Answer: C)
Answer: C.
Answer: C. no car at all
Answer: C) no car at all
Answer: (C) no car at all
Answer: C: no car at all
Answer: C - no car at all
Answer: C, because B is wrong
Answer: C (not A or B)
Answer: C, A is wrong
Answer: C\\n\\nA is wrong, and so is B.
Answer: $C$
Answer: \\[C\\]
Answer: $\\boxed{C}$
Answer: \\text{C}
Answer: $\\mathrm{(C)}$
Answer: choice C
Answer: Option (C)
Answer: Option: C
Answer: option c
Answer: option_C
Answer: letter C
Answer: the option C
Answer: it is C
Answer is: C
Answer is C
Answer - C
Answer = C
Answer → C
Answer C
ANSWER: C
answer:c
answer: c
Answer:\\nC
Answer:\\n\\n**C**
## Answer\\nC
### Final Answer\\n\\n(C)
Final answer: C
Final Answer: Option C.
Final answer：C
Correct answer: C
My answer: C
Answer choice: C
Answer option: C
Ans: C
ans: C
Ans. C
The answer is (C).
The answer is **(C)**.
The answer is C because A is red.
The answer is option C.
The answer is therefore C.
The answer is indeed option C
The answer is the option C
The answer would be C.
The answer should be C.
The answer must be (C)
The answer to the question is C.
The answer for this is C.
The correct answer is: C
The correct answer is:\\n\\n(C) no car at all
The best answer is C.
The correct option is C.
The correct option is (C).
the correct choice is C
The right option is C
The best option among these is C.
The correct one is C
The correct letter is C.
The most likely option is C
correct option: C
Option: C
Choice: C
Conclusion: C
I choose C.
I would choose option C.
I'd go with C.
I pick (C)
My choice is C
\\boxed{C}
$\\boxed{C}$
\\boxed{\\text{C}}
\\boxed{\\textbf{C}}
\\boxed{\\mathbf{(C)}}
\\boxed{(C)}
\\boxed{C.}
\\boxed{C: no car at all}
\\boxed{\\text{C. no car at all}}
\\boxed{\\text{Option C}}
\\boxed {C}
\\fbox{C}
The answer is $\\boxed{\\text{(C)}}$.
<answer>C</answer>
<answer> C </answer>
<answer>(C) no car at all</answer>
<answer>\\nC\\n</answer>
<think>A? The answer is A.</think><answer>C</answer>
<think>Answer: A</think>\\nC
<final_answer>C</final_answer>
[ANSWER]C[/ANSWER]
{"answer": "C"}
{"reason": "B is red", "answer": "C"}
#### C
C
c
C.
C)
(C)
(c)
[C]
**C**
"C"
$C$
Ｃ
（Ｃ）
答案：Ｃ
C) no car at all
(C) cat
C. no car at all
C: no car at all
C - no car at all
c) no car at all
Option C
Option C: cat
option C.
(C) no car at all. The others show one.
C\\n\\nExplanation: B is blue.
C. no car at all\\n\\nThe street is empty.
I weigh them up.\\nC) no car at all
A) is red\\nB) is blue\\nC) is empty\\nD) is a bicycle\\n\\nC) no car at all
Option C is correct.
So C is the correct answer.
A is incorrect. B is incorrect. C is correct. D is incorrect.
Therefore, option C is the best choice.
(C) is right.
It can only be (C)
It must be C.
So the answer must be C
Therefore, C.
Given all this, option C
答案是C
答案：C
答案为C。
正确答案是 C
正确答案：（C）
答案选C
答案是选项C
故选C
所以选C。
应选C
选项C正确
C选项正确
C是正确的
答：C
정답은 C입니다
정답: C
答えはCです
正解：C
Antwort: C
Die richtige Antwort ist C.
Réponse : C
La respuesta correcta es C
Respuesta: C
Risposta: C
Resposta: C
Ответ: C
Ответ: С
الإجابة: ج
Answer: A\\nWait, B is red.\\nAnswer: C
First I thought that the answer is A.\\nNo: the answer is C
The answer is not A; the answer is C.
The answer cannot be B. The answer is C.
\\boxed{A}, or rather \\boxed{C}? No doubt.\\n\\nAnswer: C
Answer: A or C? Let me see.\\nAnswer: C
Answer: no car at all
Answer: "No car at all."
The answer is no car at all.
The answer is no car at all, because the street is empty.
There is no car at all.
no car at all"""

NONE = """A cat sat there.
A car would be blue.
Answer: A cat
The answer is a cat.
Answer: a van
I think so.
I do not know.
Answer: I do not know
A or B
(A) or (B)
A and B
A/B
A, B
Answer: A or B
Answer: A and C
Answer: A, B
Answer: A/C
Answer: (A) or (C)
Answer: **A** or **B**
Answer: both A and B are correct
\\boxed{A \\text{ or } B}
\\boxed{A, C}
\\boxed{A} or \\boxed{B}
The answer is either
The answer is not C.
Answer: none of them
Answer: N/A
Answer: E
\\boxed{E}
Answer: ABD
答案是A或B
不选C
Answer:
C = 5 m
25 °C
Vitamin C is good.
Answer: C-14
Answer: Charlie
Answer: e.g. this
A\\nB\\nC\\nD
A) red\\nB) blue\\nC) none\\nD) two wheels
To answer this question we look at the picture.
Answer: not a bicycle"""


def cases(block):
    return [line.replace("\\n", "\n") if "\\n" in line else line for line in block.split("\n")]


@pytest.mark.parametrize("text", cases(C))
def test_the_letter_is_read(text):
    assert choice(text, OPTIONS) == 2


@pytest.mark.parametrize("text", cases(C)[:100:3])
def test_the_letter_is_read_after_a_thought_with_other_letters(text):
    thought = "Let me see: (A) is red, B might be blue. If the answer is D, then A is wrong.\n\n"
    assert choice(thought + text, OPTIONS) == 2


@pytest.mark.parametrize("text", cases(NONE))
def test_no_letter_is_made_of_a_word_or_of_two(text):
    assert choice(text, OPTIONS) is None


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        ("Answer: A", OPTIONS, 0),
        ("answer: a", OPTIONS, 0),
        ("The answer is A because it is red.", OPTIONS, 0),
        ("The correct answer is A, not B.", OPTIONS, 0),
        ("A", OPTIONS, 0),
        ("\\boxed{A}", OPTIONS, 0),
        ("Answer: A red bus", ["blue", "green", "a red bus"], 2),
        ("Answer: A red bus", ["red bus", "green"], 0),
        ("Answer: E. coli", ["yeast", "E. coli", "virus", "alga", "moss"], 1),
        ("Answer: E", ["yeast", "E. coli", "virus", "alga", "moss"], 4),
        ("Answer: B cells", ["T cells", "B cells", "platelets"], 1),
        ("Answer: AB", ["A", "B", "AB", "O"], 2),
        ("Answer: O", ["A", "B", "AB", "O"], 3),
        ("Answer: A+", ["A", "B+", "A+"], 2),
        ("Answer: C++", ["Java", "C++", "C"], 1),
        ("Answer: 7.0", ["5", "7", "9"], 1),
        ("Answer: 145 degrees", ["145°", "35°"], 0),
        ("Answer: it is dark red", ["red", "dark red", "blue"], 1),
        ("Answer: $x=2$", ["$x = 2$", "x=3"], 0),
        ("Answer: I", [f"word {i}" for i in range(10)], 8),
        ("Answer: I believe it is hard", [f"word {i}" for i in range(10)], None),
        ("Answer: J", [f"word {i}" for i in range(10)], 9),
        ("The answer is (J).", [f"word {i}" for i in range(10)], 9),
        ("Yes, it is.\nAnswer: Yes", ["No", "Yes"], 1),
        ("", [], None),
    ],
)
def test_words_and_letters_beside_the_options(text, options, wanted):
    assert choice(text, options) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1,234,567.5", 1234567.5), ("12 345", 12345), ("1'234", 1234), ("1{,}234", 1234), ("$5.00", 5), ("US$5", 5),
        ("5 USD", 5),
        ("€5", 5), ("Rs.500", 500), ("50%", 50), ("50\\%", 50), ("12 \\%", 12), ("42.", 42), ("= 42", 42),
        ("x = 42", 42), ("x=-3", -3),
        ("6 × 7 = 42", 42), ("40+2=42", 42), ("42°", 42), ("42^\\circ", 42), ("42^{\\circ}", 42), ("42 degrees", 42),
        ("42 °C", 42),
        ("42 cm²", 42), ("42 cm^2", 42), ("42\\text{ cm}^2", 42), ("9.8 m/s^2", 9.8), ("5 km/h", 5), ("3/4", 0.75),
        ("x = 3/4", 0.75),
        ("\\frac{3}{4}", 0.75), ("\\dfrac{3}{4}", 0.75), ("\\frac34", 0.75), ("-\\frac{1}{2}", -0.5),
        ("\\frac{-1}{2}", -0.5),
        ("3/4 cm", 0.75), ("1 1/2", 1.5), ("1\\frac{1}{2}", 1.5), ("½", 0.5), ("1.5e-3", 0.0015),
        ("1.5 \\times 10^{-3}", 0.0015),
        ("2×10³", 2000), ("2 x 10^3", 2000), ("10^4", 10000), ("\\(42\\)", 42), ("$42$", 42), ("\\text{42}", 42),
        ("approximately 12.5 cm", 12.5),
        ("≈ 3.14", 3.14), ("\\approx 3.14", 3.14), ("42 (since 40+2=42)", 42), ("42, because 6 times 7 is that", 42),
        ("４２", 42), ("–5", -5), ("+5", 5), ("3D", 3), ("2nd", 2),
        ("\\sqrt{2}", None), ("2\\sqrt{3}", None), ("2π", None), ("42^2", None), ("5-6", None), ("10:30", None),
        ("5 or 6", None),
        ("between 5 and 6", None), ("CO2", None), ("H2O", None), ("2 x 3", None), ("5!", None),
    ],
)  # fmt: skip
def test_numbers_in_the_forms_that_models_write(text, wanted):
    assert number(text) == (pytest.approx(wanted) if wanted is not None else None)
    if wanted is not None:
        assert number(final_part(f"Let me see: 3 and 4.\n\nAnswer: {text}")) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("Answer: Yes, it does.", "Yes", 1), ("Answer: No, they do not cross.", "No", 1), ("Answer: yes", "Yes", 1),
        ("Answer: No", "Yes", 0), ("Answer: yes and no", "Yes", 0), ("Answer: True", "true", 1),
        ("Answer: nothing", "No", 0),
        ("Answer: 2x3", "2 by 3", 1), ("Answer: 2 × 3", "2 by 3", 1), ("Answer: 3 by 2", "2 by 3", 0),
        ("Answer: ours and theirs", "ours, theirs", 1), ("Answer: ours, theirs", "ours, theirs", 1),
        ("Answer: theirs, ours", "ours, theirs", 0), ("Answer: −5", "-5", 1), ("Answer: x − 1", "x - 1", 1),
        ("The answer is blue, because of the sky.", "blue", 1), ("Answer: blue (like the sky)", "Blue", 1),
        ("Answer: \\(\\text{blue}\\)", "blue", 1), ("<answer>blue</answer>", "blue", 1),
        ("Answer: ｂｌｕｅ", "blue", 1),
        ("Answer: cafe\u0301", "caf\u00e9", 1), ("Answer: seven", "7", 1), ("Answer: 3/4", "0.75", 1),
        ("Answer: blue", "light blue", 0),
        ("Answer: 42\n\nI hope this answer helps.", "42", 1), ("Answer: 42\n\nSo the answer is correct.", "42", 1),
        ("答案是42", "42", 1),
    ],
)  # fmt: skip
def test_short_texts_in_the_forms_that_models_write(text, gold, score):
    assert short_answer(text, [gold]) == score


def test_lists_of_numbers_with_and_without_brackets():
    assert number_list("Answer: 1, 2") == number_list("Answer: (1, 2)") == number_list("so [1, 2]") == [1, 2]
    assert number_list("[−1, 2]") == [-1, 2]
    assert number_list("1, 2") is None and number_list("[1e999, 2]") is None
    assert plain("A red BUS.") == "red bus"


def test_small_numbers_in_words():
    assert same_number("Answer: Seven.", 7, 9) and not same_number("Answer: eight", 7, 9)


@pytest.mark.parametrize("letter", ["C", "c", "(C)", "C.", "C)", " c ", "no car at all"])
def test_the_letter_of_a_file_in_its_forms(letter):
    assert Benchmark.letter(None, 0, letter, OPTIONS) == 2
