"""A checkpoint as an answerer, against the sampler asked one prompt at a time."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from PIL import Image

from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.data.tasks import Task
from k25_jax.evals.categories import GREEDY, Rendered
from k25_jax.evals.core import evaluate
from k25_jax.evals.local import Checkpoint, identity_of
from k25_jax.evals.protocol import Request, Settings
from k25_jax.sampling.prompt import MediaReader, from_messages
from k25_jax.sampling.sample import SampleConfig, Sampler

SIXTEEN = dataclasses.replace(GREEDY, max_tokens=16)


@dataclasses.dataclass(frozen=True)
class Pictures(Task):
    """The questions on which the finished run was trained."""

    category = "ocr"
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
def model(finished):
    return load_model(finished.run)


@pytest.fixture(scope="module")
def answerer(model):
    return Checkpoint(lambda: model, {}, batch=2)


@pytest.fixture(scope="module")
def task(finished):
    return Rendered(Pictures("train", str(finished.file.parent / "data")))


def test_answers_are_those_to_single_questions(model, answerer, task):
    done = []
    results = evaluate(answerer, task, SIXTEEN, range(5), on_progress=done.append)
    sampler, end = Sampler(model.params, model.config), model.tokenizer.special["<|im_end|>"]
    for index, result in enumerate(results):
        prompt = from_messages(task.prompt(index, 0), model.tokenizer, MediaReader(model.config))
        how = SampleConfig(max_tokens=16, temperature=0.0, stop_ids=(end,))
        tokens = [token for ((token, _),) in sampler.generate([prompt.tokens], [prompt.clips], how)]
        assert tokens[-1] == end and result.tokens == len(tokens) and result.finish == "stop"
        assert result.answer == model.tokenizer.decode(tokens[:-1]) and result.gold == f"no. {index}"
        assert result.score == task.score(result.answer, index, 0)
        assert result.answer.startswith("no. ")
    assert done == [1] * 5


def test_an_answer_that_never_ends_is_cut(answerer, task):
    for score_cut in (False, True):
        settings = dataclasses.replace(GREEDY, max_tokens=2, score_cut=score_cut)
        (result,) = evaluate(answerer, task, settings, [3])
        assert result.answer == "no" and result.tokens == 2 and result.finish == "length"
        assert result.score == 0


def test_prompts_that_leave_no_room_overflow(answerer, task):
    """The prompt takes 17 tokens; what the context leaves is less than the answer needs, or nothing."""
    prompt = Request(task.prompt(0, 0), 0, SIXTEEN)
    length = next(
        n for n in range(8, 80) if _finish(answerer, prompt, n)[0] != "overflow" or _finish(answerer, prompt, n)[1]
    )
    assert _finish(answerer, prompt, length) == ("overflow", 1)
    assert _finish(answerer, prompt, length - 1) == ("overflow", 0)
    assert _finish(answerer, prompt, length + 30) == ("stop", 6)


def _finish(answerer, request, context):
    settings = dataclasses.replace(request.settings, context=context)
    ((_, answer),) = answerer.answer([dataclasses.replace(request, settings=settings)])
    return answer.finish, answer.tokens


def test_requests_are_read_a_batch_at_a_time(answerer, task):
    read = []
    requests = (read.append(i) or Request(task.prompt(i, 0), 0, SIXTEEN) for i in itertools.count())
    stream = answerer.answer(requests)
    assert [next(stream)[0] for _ in range(3)] == [0, 1, 2] and read == [0, 1, 2, 3]
    stream.close()


def test_samples_differ_by_seed_and_are_the_same_again(answerer, task):
    hot = Settings(temperature=8.0, top_p=1.0, max_tokens=12, score_cut=True)
    first, again, other = (
        [answer.text for _, answer in answerer.answer([Request(task.prompt(0, 0), seed, hot)])] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_only_what_follows_the_reasoning_is_the_answer(model):
    answerer = Checkpoint(lambda: model, {})
    answerer._start()
    think, thought = (model.tokenizer.special[name] for name in ("<think>", "</think>"))
    a, b = model.tokenizer.encode("a"), model.tokenizer.encode("b")
    assert answerer._text([think, *a, thought, *b]) == "b"
    assert answerer._text([think, *a, thought, *a, thought, *b]) == "b"
    assert (
        answerer._text([think, *a]) == "" and answerer._text([*a, thought]) == "" and answerer._text([*a, *b]) == "ab"
    )


def test_a_checkpoint_is_known_by_its_weights_wherever_it_lies(finished, tmp_path):
    shutil.copytree(finished.run, tmp_path / "moved")
    identity = identity_of(finished.run)
    assert identity_of(tmp_path / "moved") == identity and identity["step"] == 400
    (weights,) = [max((tmp_path / "moved/checkpoints/400").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)]
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    assert identity_of(tmp_path / "moved") != identity
    assert identity_of("base")["weights"] == identity_of("base")["weights"] != identity["weights"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        identity_of(tmp_path)
