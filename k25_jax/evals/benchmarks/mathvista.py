"""MathVista: mathematics about pictures; answers are read by their type (K2.5 §4)."""

import math

from k25_jax.data.records import DataError
from k25_jax.evals.benchmarks.base import PICK, VISION, Benchmark
from k25_jax.scoring.answers import number, number_list, same_number, short_answer

TYPES = ("integer", "float", "list", "text")


class MathVista(Benchmark):
    """Fields: question, answer, question_type, answer_type, precision, choices, unit, decoded_image or image, metadata."""

    name, category, k, max_tokens = "mathvista", "image", 3, VISION

    def question(self, index: int) -> str:
        unit = self.rows.field(index, ("unit",), default="").strip()
        return self.rows.field(index, ("question",)).strip() + (f" (Unit: {unit})" if unit else "")

    def options(self, index: int) -> list[str]:
        return [str(option) for option in self.rows.field(index, ("choices",), list, default=[]) if option != ""]

    def right(self, index: int) -> int:
        options, answer = self.options(index), self.rows.field(index, ("answer",))
        return options.index(answer) if answer in options else self.letter(index, answer, options)

    def golds(self, index: int) -> list[str]:
        gold, kind = self.rows.field(index, ("answer",)), self._type(index)
        if (kind in ("integer", "float") and number(gold) is None) or (kind == "list" and number_list(gold) is None):
            raise DataError(f"{self.rows.label(index)}: answer {gold!r} is no {kind}, which answer_type says")
        return [gold]

    def media(self, index: int) -> list[dict]:
        return [{"type": "image", "image": self.rows.medium(index, ("decoded_image", "image"))}]

    def hint(self, index: int) -> str:
        if self.options(index):
            return PICK
        kind, digits = self._type(index), self._digits(index)
        form = {
            "integer": "a whole number",
            "float": f"a number with {digits} decimal{'s' * (digits != 1)}",
            "list": "a list of numbers such as [1, 2]",
            "text": "as short as it can be",
        }[kind]
        return f"Think as long as you need, then end with a line that reads: Answer: and the answer alone, {form}."

    def score_free(self, text: str, index: int) -> float:
        gold, kind = self.golds(index)[0], self._type(index)
        if kind == "list":
            found, wanted = number_list(text), number_list(gold)
            return float(
                found is not None
                and len(found) == len(wanted)
                and all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(found, wanted, strict=True))
            )
        if kind == "text":
            return short_answer(text, [gold])
        return float(same_number(text, number(gold), 9 if kind == "integer" else self._digits(index)))

    def group(self, index: int) -> str:
        metadata = self.rows.field(index, ("metadata",), dict, default={})
        return str(metadata.get("task") or "")

    def _type(self, index: int) -> str:
        kind = self.rows.field(index, ("answer_type",))
        if kind not in TYPES:
            raise DataError(f"{self.rows.label(index)}: answer_type is {kind!r}; it must be one of {', '.join(TYPES)}")
        return kind

    def _digits(self, index: int) -> int:
        digits = self.rows.field(index, ("precision",), (int, float), default=0)
        return int(digits) if math.isfinite(digits) else 0  # pandas writes nan for none
