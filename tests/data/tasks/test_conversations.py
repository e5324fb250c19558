"""Lists to copy from, and conversations of several questions."""

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
