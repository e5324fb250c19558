"""A checkpoint as an answerer: against plain sampling of one prompt at a time, and against itself in other company."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import runs
from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.config import ConfigError, preset
from k25_jax.data.tasks import Task
from k25_jax.evals.categories import GREEDY, Rendered
from k25_jax.evals.core import evaluate
from k25_jax.evals.local import Checkpoint, identity_of
from k25_jax.evals.protocol import Request, Settings
from k25_jax.sampling.prompt import MediaReader, from_messages
from k25_jax.sampling.requests import fitting
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


def test_requests_are_read_as_others_end(answerer, task):
    """Two at once: never more than two are read and unanswered. What is left when nobody listens any more is given up."""
    read, answered = [], []
    stream = answerer.answer(read.append(i) or Request(task.prompt(i % 5, 0), 0, SIXTEEN) for i in itertools.count())
    for _ in range(7):
        answered.append(next(stream)[0])
        assert len(read) <= len(answered) + 2
    assert len(set(answered)) == 7 and set(answered) < set(read)
    stream.close()
    assert not answerer.open()[0].busy and [number for number, _ in answerer.answer([])] == []


HOT = Settings(k=3, temperature=3.0, top_p=1.0, max_tokens=24, score_cut=True)


def test_an_answer_depends_on_its_request_alone(answerer, task):
    """At a high temperature, in any order, alone and in company; the seeds of a question's samples differ."""
    requests = [Request(task.prompt(i, 0), seed, HOT) for i in range(5) for seed in (7, 8, 2**31 - 1)]
    together = dict(answerer.answer(requests))
    backwards = {14 - number: answer for number, answer in answerer.answer(requests[::-1])}
    assert together == backwards and len({answer.text for answer in together.values()}) > 5
    for number in (0, 7, 14):
        assert dict(answerer.answer([requests[number]])) == {0: together[number]}


def test_a_killed_evaluation_goes_on_to_the_same_results(answerer, task, tmp_path):
    whole = evaluate(answerer, task, HOT, range(5))
    for killed_after in (1, 6, 13):
        file, left = tmp_path / f"{killed_after}.jsonl", iter(range(killed_after))
        with pytest.raises(StopIteration):
            evaluate(answerer, task, HOT, range(5), file, lambda _, left=left: next(left))
        done = file.read_text().splitlines()
        assert evaluate(answerer, task, HOT, range(5), file) == whole
        lines = file.read_text().splitlines()
        assert lines[: len(done)] == done and len(lines) == 1 + 15


def test_samples_of_a_question_read_it_once(answerer, task):
    """Of the prompt's 17 tokens a page is full; its picture is encoded once, and not again while it is kept."""
    engine, _ = answerer.open()
    before = engine.stats()
    evaluate(answerer, task, dataclasses.replace(HOT, k=6, seed=3), [2])
    after = engine.stats()
    assert after["reused"] - before["reused"] >= 5 * engine.settings.page_size
    assert after["encoded"] - before["encoded"] <= 1
    assert after["compilations"] == before["compilations"] <= 3


def test_results_of_another_way_of_sampling_are_not_mixed_in(answerer, task, tmp_path):
    evaluate(answerer, task, HOT, [0], tmp_path / "results.jsonl")
    head, *lines = (tmp_path / "results.jsonl").read_text().splitlines()
    old = json.loads(head)
    del old["of"]["answerer"]["sampling"]
    (tmp_path / "results.jsonl").write_text("\n".join([json.dumps(old), *lines]) + "\n")
    with pytest.raises(ConfigError, match="answerer.sampling was None and is now 'engine'"):
        evaluate(answerer, task, HOT, [0], tmp_path / "results.jsonl")


def test_sizes_of_the_engine_follow_the_model():
    tiny, large = (fitting(preset(name), 32) for name in ("tiny", "k25_1t"))
    assert tiny.pages * tiny.page_size == 32 * preset("tiny").text.max_length and tiny.rows == (32,)
    assert large.pages * large.page_size == preset("k25_1t").text.max_length == large.vision_tokens
    with pytest.raises(ConfigError, match="batch=0"):
        Checkpoint(lambda: None, {}, batch=0)


def test_only_what_follows_the_reasoning_is_the_answer(model):
    answerer = Checkpoint(lambda: model, {})
    answerer.open()
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
    assert identity_of(tmp_path / "moved") == identity and identity["step"] == runs.STEPS
    newest = tmp_path / "moved" / "checkpoints" / str(runs.STEPS)
    weights = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    assert identity_of(tmp_path / "moved") != identity
    assert identity_of("base")["weights"] == identity_of("base")["weights"] != identity["weights"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        identity_of(tmp_path)
