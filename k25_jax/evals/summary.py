"""From samples to figures: mean scores with confidence intervals, pass@k, tokens, failures (K2.5 §4, §5)."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from k25_jax.evals.protocol import Result, TaskSet
from k25_jax.runtime.paths import AnyPath, write

Z = 1.959964  # the normal law holds 95 % within so many standard deviations
ALIKE = 2.0  # questions whose samples all agree, added before the scatter of the questions is looked at
RIGHT = 1 - 1e-9  # the least score of a right answer, for pass@k


@dataclass(frozen=True)
class Score:
    """Of one task. `score` is avg@k: the mean over questions of the mean over their samples, which are not independent.

    `error` is its standard error and `low`, `high` its 95 % interval (`interval`), both over questions. `passed` has
    pass@1, 2, 4, .. k. `guessing` is the score of one who has not read the questions. `tokens` is the mean of an answer
    (None: unknown). `cut` counts answers that ran into a limit; `failed` samples that no answer came for, which count in
    nothing else; `retries` requests that were made again.
    """

    spec: str
    category: str
    score: float
    error: float
    questions: int
    guessing: float
    k: int = 1
    low: float = 0.0
    high: float = 0.0
    passed: dict[str, float] = field(default_factory=dict)
    tokens: float | None = None
    cut: int = 0
    failed: int = 0
    retries: int = 0
    groups: dict[str, float] = field(default_factory=dict)


def summarise(task: TaskSet, results: Sequence[Result], spec: str = "") -> Score:
    """Figures of the results of one task, whose samples are those of `evaluate`."""
    by_question: dict[int, list[Result]] = {}
    for result in results:
        if result.finish != "error":
            by_question.setdefault(result.index, []).append(result)
    means_Q = np.array([np.mean([r.score for r in samples]) for samples in by_question.values()])
    answered = [result for samples in by_question.values() for result in samples]
    tokens = [result.tokens for result in answered if result.tokens is not None]
    low, high = interval(means_Q)
    groups: dict[str, list[float]] = {}
    for index, mean in zip(by_question, means_Q, strict=True):
        groups.setdefault(task.group(index), []).append(float(mean))
    k = max((result.sample + 1 for result in results), default=0)
    return Score(
        spec=spec or task.name,
        category=task.category,
        score=float(means_Q.mean()) if len(means_Q) else math.nan,
        error=float(means_Q.std(ddof=1) / math.sqrt(len(means_Q))) if len(means_Q) > 1 else 0.0,
        questions=len(means_Q),
        guessing=task.guessing(list(by_question)) if by_question else math.nan,
        k=k,
        low=low,
        high=high,
        passed=passes(list(by_question.values()), k),
        tokens=float(np.mean(tokens)) if tokens else None,
        cut=sum(result.finish in ("length", "overflow") for result in answered),
        failed=len(results) - len(answered),
        retries=sum(result.retries for result in results),
        groups={name: float(np.mean(values)) for name, values in sorted(groups.items()) if name},
    )


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of `k` samples is right, from `samples` of which `right` are: 1 - C(n - c, k) / C(n, k)."""
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples of which {right} are right")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def passes(questions: Sequence[Sequence[Result]], k: int) -> dict[str, float]:
    """pass@1, 2, 4, .. k, each over the questions that have so many samples."""
    sizes = sorted({*(2**i for i in range(k.bit_length()) if 2**i <= k), k} - {0})
    counts = [(len(samples), sum(r.score >= RIGHT for r in samples)) for samples in questions]
    found = {size: [pass_at_k(n, right, size) for n, right in counts if n >= size] for size in sizes}
    return {str(size): float(np.mean(values)) for size, values in found.items() if values}


def interval(means_Q: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean m of the questions' means, on the effective number of questions n; nan for none.

    (m + z²/2n ± z sqrt(m(1 - m)/n + z²/4n²)) / (1 + z²/n), with n = m(1 - m) / (s²/Q): what single samples would have had
    to be asked to scatter as little (Wilson 1927; Kish's design effect; Korn and Graubard 1998 for clusters). s² is the
    variance of the Q means, to which ALIKE questions with the variance m(1 - m) of a single sample are added, so that few
    questions that happen to agree are not taken for certain. With one sample of right or wrong n is Q, as it is at 0 and 1.
    """
    questions = len(means_Q)
    if not questions:
        return math.nan, math.nan
    mean = min(max(float(np.mean(means_Q)), 0.0), 1.0)
    single = mean * (1 - mean)
    scatter = (float(np.square(means_Q - np.mean(means_Q)).sum()) + ALIKE * single) / (questions + ALIKE)
    n = single * questions / scatter if min(single, scatter) > 1e-12 else questions
    middle, half = mean + Z**2 / (2 * n), Z * math.sqrt(single / n + Z**2 / (4 * n**2))
    return max(0.0, min(mean, (middle - half) / (1 + Z**2 / n))), min(1.0, max(mean, (middle + half) / (1 + Z**2 / n)))


def by_category(scores: Sequence[Score], field: str = "score") -> dict[str, float]:
    """The mean of `field` over the tasks of each category, in order of appearance."""
    groups: dict[str, list[float]] = {}
    for score in scores:
        groups.setdefault(score.category, []).append(getattr(score, field))
    return {category: float(np.mean(values)) for category, values in groups.items()}


# -------------------------------------------------------------------------------------------------------------- writing
HEAD = ("category", "task", "score", "95 %", "pass@k", "commonest answer", "tokens", "cut", "no answer", "questions")


def row(score: Score) -> tuple[str, ...]:
    """A score in the columns of HEAD."""
    size = max(map(int, score.passed), default=0)
    return (
        score.category,
        score.spec,
        f"{score.score:.3f}",
        f"{score.low:.3f}–{score.high:.3f}",
        f"{score.passed[str(size)]:.3f} @{size}" if size else "–",
        f"{score.guessing:.3f}",
        "–" if score.tokens is None else f"{score.tokens:,.0f}",
        str(score.cut),
        str(score.failed),
        str(score.questions) + (f" × {score.k}" if score.k > 1 else ""),
    )


def as_markdown(scores: Sequence[Score]) -> str:
    """The table, and below it the parts of tasks that have some."""
    lines = [_line(HEAD), "|" + "---|" * len(HEAD), *(_line(row(score)) for score in scores)]
    if parts := [(score.spec, name, f"{value:.3f}") for score in scores for name, value in score.groups.items()]:
        lines += ["", _line(("task", "part", "score")), "|---|---|---|", *map(_line, parts)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_scores(file: AnyPath, scores: Sequence[Score], of: dict) -> None:
    """Scores as JSON in `file`, and as Markdown beside it; each whole or not at all."""
    text = json.dumps({"of": of, "scores": [asdict(score) for score in scores]}, indent=1) + "\n"
    for path, content in ((file, text), (file.with_suffix(".md"), as_markdown(scores))):
        write(path, content)
