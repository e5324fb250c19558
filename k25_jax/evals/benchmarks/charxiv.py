"""CharXiv: questions about charts in papers (K2.5 §4).

Its authors let a large model judge. Here a rule does: the same number, or the same words. It knows no synonyms, so scores
lie somewhat below those of a judge, and are comparable only with each other.
"""

import pathlib

from k25_jax.data.records import DataError
from k25_jax.evals.benchmarks.base import VISION, Benchmark
from k25_jax.scoring.answers import final_part, plain, short_answer

NOWHERE = "Not Applicable"
# What the numbers in descriptive_q1 to q4 ask, by the list in the paper; in our own words.
QUESTIONS = {
    1: "What is the title of the plot?",
    2: "What is the label of the x-axis?",
    3: "What is the label of the y-axis?",
    4: "Which labelled tick of the x-axis is furthest to the left?",
    5: "Which labelled tick of the x-axis is furthest to the right?",
    6: "Which labelled tick of the y-axis is the lowest in the picture?",
    7: "Which labelled tick of the y-axis is the highest in the picture?",
    8: "By how much do neighbouring numbers at the ticks of the x-axis differ?",
    9: "By how much do neighbouring numbers at the ticks of the y-axis differ?",
    10: "How many lines are drawn?",
    11: "Do any of the lines cross each other? Answer Yes or No.",
    12: "How many separate labels has the legend?",
    13: "What are the labels of the legend, from top to bottom and then from left to right, with commas between them?",
    14: "By how much do the largest and the smallest number at the ticks of the colour bar differ?",
    15: "What is the largest number at the ticks of the colour bar?",
    16: "How do the data change, on the whole, from left to right? Answer in a few words, such as: increases.",
    17: "How many ticks with a label are there on all axes together?",
    18: "How are the subplots laid out? Answer as rows by columns: n by m.",
    19: "How many subplots are there?",
}
WHOLE = (18, 19)  # of the whole figure, not of one subplot


class CharXivReasoning(Benchmark):
    """Fields: reasoning_q, reasoning_a, reasoning_a_type, image (or figure_path), category."""

    name, category, k, max_tokens = "charxiv_reasoning", "image", 3, VISION

    def question(self, index: int) -> str:
        return self.rows.field(index, ("reasoning_q", "query")).strip()

    def golds(self, index: int) -> list[str]:
        return [self.rows.field(index, ("reasoning_a", "answer")).strip()]

    def media(self, index: int) -> list[dict]:
        return [{"type": "image", "image": self.image(index)}]

    def image(self, row: int) -> bytes | pathlib.Path:
        """The figure of a row of the file."""
        return self.rows.medium(row, ("image", "figure_path"))

    def group(self, index: int) -> str:
        return str(self.rows.field(index, ("category", "inst_category"), (str, int), default=""))


class CharXivDescriptive(CharXivReasoning):
    """Fields: descriptive_q1 to q4 (numbers of QUESTIONS), descriptive_a1 to a4, subplot_loc or row and column, image.

    A row of the file has four questions; what the figure does not have is answered by "Not Applicable".
    """

    name = "charxiv_descriptive"

    def __len__(self) -> int:
        return 4 * len(self.rows)

    def label(self, index: int) -> str:
        return f"{self.rows.label(index // 4)}, question {index % 4 + 1}"

    def question(self, index: int) -> str:
        number, row = self.number(index), index // 4
        if number in WHOLE:
            return QUESTIONS[number]
        return f"This is about {self._place(row)}. {QUESTIONS[number]}"

    def number(self, index: int) -> int:
        """Which of QUESTIONS it is; raises DataError."""
        name = f"descriptive_q{index % 4 + 1}"
        number = self.rows.field(index // 4, (name,), int)
        if number not in QUESTIONS:
            raise DataError(f"{self.label(index)}: {name}={number} must be 1 to {len(QUESTIONS)}")
        return number

    def golds(self, index: int) -> list[str]:
        return [str(self.rows.field(index // 4, (f"descriptive_a{index % 4 + 1}",), (str, int, float))).strip()]

    def hint(self, index: int) -> str:
        return f"If the plot has no such thing, the answer is {NOWHERE}. {super().hint(index)}"

    def image(self, row: int) -> bytes | pathlib.Path:
        return super().image(row // 4)

    def score_free(self, text: str, index: int) -> float:
        gold, said = self.golds(index), plain(final_part(text))
        if plain(gold[0]) == plain(NOWHERE):
            return float(said in ("n/a", "na") or said.startswith(plain(NOWHERE)) or said.endswith(plain(NOWHERE)))
        return short_answer(text, gold)

    def group(self, index: int) -> str:
        return super().group(index // 4)

    def _place(self, row: int) -> str:
        where = self.rows.field(row, ("subplot_loc",), default="").strip()
        if where:
            return where if where.startswith(("the ", "subplot")) else f"the subplot at {where}"
        at = [self.rows.field(row, (f"subplot_{side}",), int, default=0) for side in ("row", "col")]
        return f"the subplot in row {at[0]} and column {at[1]}" if all(at) else "the plot"
