"""Our task sets as tasks of Inspect, for those who run their evaluations with it; needs the extra `inspect` (K2.5 §4).

inspect eval k25_jax/evals/inspect_adapter.py -T name=gpqa -T data=gpqa_diamond.csv --model openai/gpt-5
"""

import dataclasses

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, ContentVideo, GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from k25_jax.data.tasks import make_task
from k25_jax.evals.benchmarks import BENCHMARKS, load_benchmark
from k25_jax.evals.categories import GREEDY, Rendered
from k25_jax.evals.core import spaced
from k25_jax.evals.protocol import Settings, TaskSet, sample_seed
from k25_jax.evals.remote import data_url

CUT = ("max_tokens", "model_length")  # Inspect's words for answers that ran into a limit


@task
def k25(name: str = "puzzles:test", data: str = "", k: int = 0, questions: int = 0) -> Task:
    """A benchmark with its file, or a rendered task; `questions=0` are all of them, `k=0` is its own number of samples."""
    if name in BENCHMARKS:
        task_set = load_benchmark(name, data)
        settings = Settings(k=k or task_set.k, max_tokens=task_set.max_tokens)
    else:
        task_set = Rendered(make_task(name), name)
        settings = dataclasses.replace(GREEDY, k=k or 1, max_tokens=task_set.max_tokens)
    return inspect_task(task_set, settings, questions)


def inspect_task(task_set: TaskSet, settings: Settings, questions: int = 0) -> Task:
    """An Inspect task that asks and scores as `evals.core.evaluate` does.

    The samples of a question are samples of Inspect's, for each shows its options in an order of its own; the standard
    error takes those of a question for one cluster.
    """
    places = [(index, sample) for index in spaced(task_set, questions) for sample in range(settings.k)]
    return Task(
        name=task_set.name.replace(":", "_"),
        dataset=MemoryDataset([_sample(task_set, settings, *place) for place in places], name=task_set.name),
        solver=generate(),
        scorer=_scorer(task_set, settings),
        config=GenerateConfig(
            temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_tokens, seed=settings.seed
        ),
        metadata={"digest": task_set.digest()},
    )


def _sample(task_set: TaskSet, settings: Settings, index: int, sample: int) -> Sample:
    seed = sample_seed(settings.seed, index, sample)
    (message,) = task_set.prompt(index, seed)
    metadata = {"question": index, "seed": seed, "group": task_set.group(index)}
    target = task_set.gold(index, seed)
    return Sample(input=[_message(message)], target=target, id=f"{index}/{sample}", metadata=metadata)


def _message(message: dict) -> ChatMessageUser:
    if isinstance(message["content"], str):
        return ChatMessageUser(content=message["content"])
    content = []
    for number, part in enumerate(message["content"]):
        if "image" in part:
            content.append(ContentImage(image=data_url(part["image"], "image", f"content[{number}]")))
        elif "video" in part:
            content.append(ContentVideo(video=data_url(part["video"], "video", f"content[{number}]"), format="mp4"))
        else:
            content.append(ContentText(text=part["text"]))
    return ChatMessageUser(content=content)


def _scorer(task_set: TaskSet, settings: Settings) -> Scorer:
    @scorer(metrics=[mean(), stderr(cluster="question")], name="k25_score")
    def k25_score() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            text, cut = state.output.completion, state.output.stop_reason in CUT
            index, seed = state.metadata["question"], state.metadata["seed"]
            value = 0.0 if cut and not settings.score_cut else task_set.score(text, index, seed)
            return Score(value=value, answer=text, explanation="ran into a limit" if cut else "")

        return score

    return k25_score()
