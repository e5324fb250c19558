"""Questions asked in batches, against the same questions asked one by one."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from k25_jax.checkpoint.load import load_model
from k25_jax.data.tasks import Task
from k25_jax.evals.core import Result, accuracy, evaluate
from k25_jax.sampling.prompt import MediaReader, from_messages
from k25_jax.sampling.sample import SampleConfig, Sampler


@dataclass(frozen=True)
class Pictures(Task):
    """The questions on which the finished run was trained."""

    folder: str = ""

    def __len__(self):
        return 5

    def question(self, index):
        return "which?"

    def image(self, index):
        return np.asarray(Image.open(f"{self.folder}/{index}.png"))

    def answer(self, index):
        return f"no. {index}"


@pytest.fixture(scope="module")
def asked(finished):
    """The model, the task, its results in batches of two, and how many were done at each report."""
    model = load_model(finished.run)
    sampler, task, done = Sampler(model.params, model.config), Pictures("train", str(finished.file.parent / "data")), []
    results = evaluate(sampler, model.tokenizer, task, range(5), max_tokens=16, batch=2, on_progress=done.append)
    return model, sampler, task, results, done


def test_answers_are_those_to_single_questions(asked):
    model, sampler, task, results, _ = asked
    end = model.tokenizer.special["<|im_end|>"]
    for index, result in enumerate(results):
        prompt = from_messages(task.record(index)["messages"][:-1], model.tokenizer, MediaReader(model.config))
        how = SampleConfig(max_tokens=16, temperature=0.0, stop_ids=(end,))
        tokens = [token for ((token, _),) in sampler.generate([prompt.tokens], [prompt.clips], how)]
        assert tokens.pop() == end
        assert result == Result(index, model.tokenizer.decode(tokens), f"no. {index}", task.score(result.answer, index))
        assert result.answer.startswith("no. ")


def test_progress_and_accuracy(asked):
    *_, results, done = asked
    assert done == [2, 2, 1]
    assert accuracy(results) == np.mean([result.answer == result.gold for result in results])
    assert accuracy([Result(0, "a", "a", 1.0), Result(1, "b", "c", 0.5)]) == 0.75
    assert accuracy([]) == 0


def test_an_answer_that_never_ends_is_cut(asked):
    model, sampler, task, _, _ = asked
    (result,) = evaluate(sampler, model.tokenizer, task, [3], max_tokens=2)
    assert result.answer == "no" and result.score == 0
