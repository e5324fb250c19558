"""OCRBench by its rule of containment; DocVQA and InfoVQA by ANLS (K2.5 §4)."""

from k25_jax.evals.benchmarks.base import VISION, Benchmark
from k25_jax.scoring.answers import anls, contains

FORMULAS = ("Handwritten Mathematical Expression Recognition", "HME100k")


class OcrBench(Benchmark):
    """Fields: question, answer (one or a list), question_type, dataset, image.

    The original JSON file names them answers, type, dataset_name and image_path. An answer counts when a gold answer
    occurs in it; the questions say all that is to be done, so nothing is added to them.
    """

    name, category, k, max_tokens = "ocrbench", "image", 3, VISION

    def question(self, index: int) -> str:
        return self.rows.field(index, ("question",)).strip()

    def golds(self, index: int) -> list[str]:
        answer = self.rows.field(index, ("answer", "answers"), (str, int, float, list))
        return [str(gold) for gold in (answer if isinstance(answer, list) else [answer])]

    def media(self, index: int) -> list[dict]:
        return [{"type": "image", "image": self.rows.medium(index, ("image", "image_path"))}]

    def hint(self, index: int) -> str:
        return ""

    def score_free(self, text: str, index: int) -> float:
        formula = self.group(index) in FORMULAS or self.rows.field(index, ("dataset", "dataset_name"), default="") in (
            FORMULAS
        )
        return contains(text, self.golds(index), without_spaces=formula)

    def group(self, index: int) -> str:
        return self.rows.field(index, ("question_type", "type"), default="").strip()


class DocVqa(OcrBench):
    """Fields: question, answers, image, question_types. The score is ANLS."""

    name = "docvqa"

    def hint(self, index: int) -> str:
        return "Answer in the words of the document. End with a line that reads: Answer: and the answer alone."

    def score_free(self, text: str, index: int) -> float:
        return anls(text, self.golds(index))

    def group(self, index: int) -> str:
        return ""


class InfoVqa(DocVqa):
    """As DocVQA."""

    name = "infovqa"
