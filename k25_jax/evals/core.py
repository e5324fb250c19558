"""Ask a model the questions of a task and score its answers (K2.5 §4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k25_jax.sampling.prompt import MediaReader, from_messages
from k25_jax.sampling.sample import SampleConfig, Sampler
from k25_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    """One scored answer; `index` is the record's place in its task."""

    index: int
    answer: str
    gold: str
    score: float


def evaluate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    task,
    indices: Sequence[int],
    max_tokens: int = 16,
    batch: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Greedy answers to `task` (data/tasks) at `indices`, scored by the task."""
    reader = MediaReader(sampler.config)
    stop = tokenizer.special["<|im_end|>"]
    how = SampleConfig(max_tokens=max_tokens, temperature=0.0, stop_ids=(stop,))
    results = []
    for start in range(0, len(indices), batch):
        part = list(indices[start : start + batch])
        prompts = [from_messages(task.prompt(i), tokenizer, reader) for i in part]
        rows = [[] for _ in part]
        for step in sampler.generate([p.tokens for p in prompts], [p.clips for p in prompts], how):
            for row, drawn in zip(rows, step, strict=True):
                if drawn and drawn[0] != stop:
                    row.append(drawn[0])
        for i, row in zip(part, rows, strict=True):
            answer = tokenizer.decode(row, skip_special=True)
            results.append(Result(i, answer, task.answer(i), task.score(answer, i)))
        if on_progress:
            on_progress(len(part))
    return results


def accuracy(results: Sequence[Result]) -> float:
    """Mean score."""
    return sum(r.score for r in results) / max(len(results), 1)
