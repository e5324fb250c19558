"""Lists to copy from, conversations of several questions, and conversations with calls."""

import json
import re

import numpy as np
import pytest

from k25_jax.config import DataConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.records import Record
from k25_jax.data.tasks import TaskError, make_task
from k25_jax.data.tasks.recall import BETWEEN
from k25_jax.data.tasks.turns import PICTURES, TEXTS
from k25_jax.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("most", [1, 6, 40])
def test_a_recalled_value_stands_in_the_list_behind_its_name(most):
    task = make_task(f"recall:test:most={most}")
    sizes, places = set(), []
    for index in range(150):
        *lines, asked = task.question(index).split("\n")
        pairs = [re.split("|".join(map(re.escape, BETWEEN)), line) for line in lines]
        assert all(len(pair) == 2 for pair in pairs) and asked.endswith("?")
        found = [value for name, value in pairs if name == asked[:-1]]
        assert found == [task.answer(index)]  # once, and nowhere else
        sizes.add(len(lines))
        places.append([name for name, _ in pairs].index(asked[:-1]) / len(lines))
    assert max(sizes) <= most and len(sizes) >= min(most, 6) - 1
    assert most == 1 or 0.2 < np.mean(places) < 0.6  # anywhere in the list


def test_recall_asks_for_at_least_one_line():
    with pytest.raises(TaskError, match="most=0 must be at least 1"):
        make_task("recall:train:most=0")


def test_turns_are_questions_of_other_tasks_with_their_answers():
    task, kinds, beside = make_task("turns:test:most=4"), set(), 0
    for index in range(60):
        messages, turns = task.record(index)["messages"], task.turns(index)
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(turns) and 2 <= len(turns) <= 4
        shown = []
        for asked, answer, turn in zip(messages[::2], messages[1::2], turns, strict=True):
            assert turn.task.split == "test" and turn.task.name in (*PICTURES, *TEXTS)
            assert asked["content"][-1]["text"] == turn.task.question(turn.index)
            assert answer["content"] == turn.task.answer(turn.index)
            assert turn.beside is None or turn.task.modality == "text"
            media = [part[part["type"]] for part in asked["content"][:-1]]
            expected = [*(turn.beside[0].media(turn.beside[1]) if turn.beside else ()), *turn.task.media(turn.index)]
            assert all((a == b).all() for a, b in zip(media, expected, strict=True))
            shown += media
            kinds.add(turn.task.name)
            beside += turn.beside is not None
        assert len(task.media(index)) == len(shown)
        last = turns[-1]
        assert task.score(task.answer(index), index) == 1.0 and task.answer(index) == last.task.answer(last.index)
        assert task.question(index) == last.task.question(last.index)
    assert kinds == {*PICTURES, *TEXTS} and beside > 15


def test_every_answer_of_a_conversation_is_learnt():
    task, data = make_task("turns:train"), DataConfig(packs=4, pack_patches=256, max_image_patches=64, seq_len=512)
    for index in range(8):
        example = prepare(Record("turns", task.record(index)), load_tokenizer(), data, preset("tiny"))
        answers = [turn.task.answer(turn.index) for turn in task.turns(index)]
        assert example.loss_weights.sum() == sum(len(answer.encode()) + 1 for answer in answers)
        assert len(example.clips) == len(task.media(index))


def test_a_lookup_is_answered_with_what_its_last_call_gave():
    task, calls = make_task("lookups:train"), set()
    for index in range(200):
        record = task.record(index)
        question, *turns, answer = record["messages"]
        (function,) = [tool["function"] for tool in record["tools"]]
        ((field, kind),) = function["parameters"]["properties"].items()
        assert kind == {"type": "string"} and len(turns) % 2 == 0
        key = next(
            name for name in re.findall("[a-z]+", question["content"][0]["text"]) if name in json.dumps(turns[0])
        )
        for number, (said, back) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            (call,) = said["tool_calls"]
            assert call["id"] == back["tool_call_id"] == f"functions.{function['name']}:{number}"
            arguments = json.loads(call["function"]["arguments"])
            assert list(arguments) == [field] and (number == 0 or arguments[field] == key)
            rows = dict(line.split(": ") for line in back["content"].split("\n") if ": " in line)
            key = rows.get(arguments[field], back["content"])
        assert answer == {"role": "assistant", "content": key} and key == task.answer(index)
        calls.add(len(turns) // 2)
    assert calls == {1, 2}


def test_lookups_are_trained_on_and_not_asked():
    task = make_task("lookups:test")
    with pytest.raises(TaskError, match="cannot be asked"):
        task.prompt(0)
    held = {task.key(task.scene(index)) for index in range(300)}
    train = make_task("lookups:train")
    assert not held & {train.key(train.scene(index)) for index in range(300)}
    data = DataConfig(seq_len=1024)
    example = prepare(Record("lookups", train.record(0)), load_tokenizer(), data, preset("tiny"))
    assert train.answer(0) in load_tokenizer().decode([int(t) for t in example.tokens]) and example.loss_weights.any()
