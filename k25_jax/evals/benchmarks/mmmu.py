"""MMMU and MMMU-Pro: questions about several pictures, which stand where the text has <image 1> (K2.5 §4)."""

import ast
import re

from k25_jax.data.records import DataError
from k25_jax.evals.benchmarks.base import VISION, Benchmark
from k25_jax.scoring.answers import number, same_number, short_answer

_MARK = re.compile(r"<image (\d)>")
MOST_IMAGES = 7


class Mmmu(Benchmark):
    """Fields: question, options (a list, written as a string), answer, question_type, image_1 to image_7, subfield."""

    name, category, k, max_tokens = "mmmu", "image", 3, VISION

    def question(self, index: int) -> str:
        return self.rows.field(index, ("question",)).strip()

    def options(self, index: int) -> list[str]:
        return [str(option) for option in self._list(index, "options", "[]")]

    def right(self, index: int) -> int:
        return self.letter(index, self.rows.field(index, ("answer",)), self.options(index))

    def golds(self, index: int) -> list[str]:
        answer = self.rows.field(index, ("answer",))
        golds = self._list(index, "answer", "[]") if answer.startswith("[") else [answer]
        return [str(gold) for gold in golds]

    def score_free(self, text: str, index: int) -> float:
        """A number is compared with two decimals, as the authors do; anything else word by word."""
        golds = self.golds(index)
        numbers = [value for gold in golds if (value := number(gold)) is not None]
        return max(short_answer(text, golds), float(any(same_number(text, value, 2) for value in numbers)))

    def group(self, index: int) -> str:
        return self.rows.field(index, ("subfield", "subject"), default="").strip()

    def prompt(self, index: int, seed: int) -> list[dict]:
        """Each picture where its mark stands the first time, and those without a mark in front."""
        text, images = self.text(index, seed), self._images(index)
        marked = {int(found) for found in _MARK.findall(text)}
        if missing := marked - images.keys():
            raise DataError(f"{self.rows.label(index)}: has no image_{min(missing)}, which its text names")
        content = [{"type": "image", "image": images[n]} for n in sorted(images.keys() - marked)]
        for at, piece in enumerate(_MARK.split(text)):  # text, number, text, number, .., text
            if at % 2 == 0:
                content += [{"type": "text", "text": piece}] if piece else []
            elif (image := images.pop(int(piece), None)) is not None:
                content.append({"type": "image", "image": image})
            else:
                content.append({"type": "text", "text": f"(image {piece} above)"})
        return [{"role": "user", "content": content}]

    def media(self, index: int) -> list[dict]:
        return [{"type": "image", "image": image} for image in self._images(index).values()]

    def _images(self, index: int) -> dict:
        row, names = self.rows[index], {n: f"image_{n}" for n in range(1, MOST_IMAGES + 1)}
        if row.get("image_1") is None and row.get("image") is not None:
            names = {1: "image"}
        return {n: self.rows.medium(index, (name,)) for n, name in names.items() if row.get(name) is not None}

    def _list(self, index: int, name: str, default: str) -> list:
        """A field that is a list, or one written in Python's or JSON's way."""
        value = self.rows.field(index, (name,), (str, list), default)
        try:
            parsed = ast.literal_eval(value) if isinstance(value, str) else value
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            parsed = None
        if not isinstance(parsed, list):
            raise DataError(f"{self.rows.label(index)}: {name} must be a list, written as a string: {value[:80]!r}")
        return parsed


class MmmuPro(Mmmu):
    """MMMU-Pro, with ten options or four; fields as MMMU, with subject."""

    name = "mmmu_pro"


class MmmuProVision(Mmmu):
    """MMMU-Pro as one picture that shows question and options: fields image, options, answer, subject.

    The options stay in the picture's order.
    """

    name, permuted = "mmmu_pro_vision", False

    def question(self, index: int) -> str:
        return ""

    def text(self, index: int, seed: int) -> str:
        last = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(self.options(index)) - 1]
        return f"The picture shows a question with options from A to {last}. {self.hint(index)}"
