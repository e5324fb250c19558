"""Trajectories: every program gives its answer in the sandbox, and what is written can be learnt from."""

import contextlib
import json

import pytest

from k25_jax.agents.demonstrations import SHOWN, TEXT, demonstrate, trajectory
from k25_jax.agents.pictures import Pictures
from k25_jax.config import ConfigError, DataConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.records import Record
from k25_jax.data.tasks import PROGRAMMED, make_task
from k25_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module")
def tool(sandbox):
    return Pictures(lambda: contextlib.nullcontext(sandbox), seconds=20)


@pytest.mark.parametrize("name", PROGRAMMED)
def test_a_program_gives_the_answer(name, tool):
    task = make_task(f"{name}:test")
    for index in range(6):
        messages = trajectory(task, index, tool)["messages"]
        assert [m["role"] for m in messages] == ["user", *["assistant", "tool"] * len(task.program(index)), "assistant"]
        seen, answer = messages[-2]["content"], messages[-1]["content"]
        if name == "glyphs":  # it shows the digit's pixels
            assert len(seen.splitlines()) == 5 and answer in "0123456789"
        else:
            assert seen == answer == task.answer(index)


def test_zero_vision_trajectories_show_no_picture_and_others_do(bwrap, tmp_path):
    demonstrate(tmp_path, 9, specs=("dots:train", "changes:train"), width=2)
    assert {path.name for path in tmp_path.iterdir()} == {TEXT, SHOWN, "pictures"}
    examples, data = {}, DataConfig(seq_len=2048, packs=4, pack_patches=64)
    for kind, name in (("text", TEXT), ("shown", SHOWN)):
        records = [Record("r", json.loads(line), tmp_path) for line in (tmp_path / name).read_text().splitlines()]
        examples[kind] = [prepare(record, TOKENIZER, data, preset("tiny")) for record in records]
    assert [len(e.clips) for e in examples["text"]] == [0] * 9
    assert [len(e.clips) for e in examples["shown"]] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    for hidden, shown in zip(examples["text"], examples["shown"], strict=True):
        learnt = [
            TOKENIZER.decode([t for t, w in zip(e.tokens, e.loss_weights, strict=True) if w]) for e in (hidden, shown)
        ]
        assert learnt[0] == learnt[1]  # the same is said
        assert "images[0]" in learnt[0] and "Return of" not in learnt[0] and "tool_declare" not in learnt[0]


def test_only_tasks_with_programs_have_trajectories(tmp_path):
    for spec in ("digits:train", "dots:test"):
        with pytest.raises(ConfigError, match=f"{spec} has no programs to learn from"):
            demonstrate(tmp_path, 1, specs=(spec,))
