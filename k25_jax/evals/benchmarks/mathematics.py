"""AIME and HMMT: problems with one exact answer, compared by math-verify (K2.5 §4)."""

from k25_jax.evals.benchmarks.base import Benchmark
from k25_jax.scoring.mathcheck import same_answer
from k25_jax.scoring.statements import boxes, final_part, spoken


class Hmmt(Benchmark):
    """Fields: problem (or question), answer; as MathArena and others publish them. The score is exact equality."""

    name, category, k = "hmmt", "reasoning", 32
    form = "Reason step by step, and put the final answer alone into \\boxed{}."

    def question(self, index: int) -> str:
        return self.rows.field(index, ("problem", "Problem", "question", "Question"))

    def golds(self, index: int) -> list[str]:
        return [str(self.rows.field(index, ("answer", "Answer"), (str, int, float)))]

    def hint(self, index: int) -> str:
        return self.form

    def score_free(self, text: str, index: int) -> float:
        said = spoken(text)
        said = said if boxes(said) else final_part(said)
        return float(bool(said.strip()) and same_answer(said, self.golds(index)[0]))


class Aime(Hmmt):
    """As HMMT; the answers are whole numbers from 0 to 999."""

    name = "aime"
    form = "Reason step by step. The answer is a whole number from 0 to 999; put it alone into \\boxed{}."
