"""GPQA and MMLU-Pro: multiple choice without pictures (K2.5 §4)."""

from k25_jax.evals.benchmarks.base import Benchmark


class Gpqa(Benchmark):
    """Fields: Question, Correct Answer, Incorrect Answer 1 to 3, High-level domain; a CSV file or Parquet."""

    name, category, k = "gpqa", "reasoning", 8

    def question(self, index: int) -> str:
        return self.rows.field(index, ("Question",)).strip()

    def options(self, index: int) -> list[str]:
        names = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
        return [self.rows.field(index, (name,)).strip() for name in names]

    def right(self, index: int) -> int:
        return 0

    def group(self, index: int) -> str:
        return self.rows.field(index, ("High-level domain",), default="").strip()


class MmluPro(Benchmark):
    """Fields: question, options (up to ten), answer (a letter), category; options that read N/A are padding."""

    name, category = "mmlu_pro", "knowledge"

    def question(self, index: int) -> str:
        return self.rows.field(index, ("question",)).strip()

    def options(self, index: int) -> list[str]:
        return [str(option) for option in self._all(index) if option != "N/A"]

    def right(self, index: int) -> int:
        every = self._all(index)
        number = self.letter(index, self.rows.field(index, ("answer",)), every)
        return number - every[:number].count("N/A")

    def group(self, index: int) -> str:
        return self.rows.field(index, ("category",), default="").strip()

    def _all(self, index: int) -> list[str]:
        return self.rows.field(index, ("options",), list)
