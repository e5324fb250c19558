"""What holds for every rendered task: categories, form of records, disjoint splits, answers of any kind."""

import hashlib

import numpy as np
import pytest

from k25_jax.config import DataConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.records import Record
from k25_jax.data.tasks import CATEGORIES, TASKS, Endless, held_out, make_task
from k25_jax.text.chat import part_kind
from k25_jax.text.tokenizer import load_tokenizer

ASKING = [name for name in TASKS if name not in ("library", "lookups")]
SINGLE = [name for name in ASKING if name != "turns"]  # one question a record
ENDLESS = [name for name in ASKING if isinstance(make_task(f"{name}:test"), Endless)]
OPTIONS = [
    *(f"scenes:{{}}:ask={ask}" for ask in ("count", "more", "next", "biggest", "change")),
    *(f"charts:{{}}:bars={bars}" for bars in (3, 7)),
    *(f"charts:{{}}:ask={ask}" for ask in ("value", "largest", "smallest", "difference")),
    *(f"documents:{{}}:kind={kind},fields={fields}" for kind in ("form", "invoice", "receipt") for fields in (2, 5)),
    *(f"screens:{{}}:ask={ask},rows=2" for ask in ("at", "where", "want", "off", "open")),
    *(f"motion:{{}}:ask={ask},objects={n}" for ask in ("what", "where", "order") for n in (2, 4)),
    *(f"programs:{{}}:inputs={inputs}" for inputs in "xsa"),
    "programs:{}:limit=5,inputs=s",
    "programs:{}:limit=20,inputs=s",
    "boxes:{}:objects=1,most=1",
    "boxes:{}:objects=6,most=3",
    "points:{}:objects=6,size=56",
    "polygons:{}:corners=3",
    "polygons:{}:corners=7,size=28",
    "lines:{}:rows=4",
    "scenes:{}:objects=9,size=56",
    "emblems:{}:ask=name,creatures=72",
    "emblems:{}:ask=fact,creatures=8",
    "facts:{}:creatures=8,world=3",
    "recall:{}:most=1",
    "recall:{}:most=40",
    "turns:{}:most=8",
]


def test_every_category_has_its_tasks():
    found = {make_task(f"{name}:test").category for name in TASKS}
    assert found == set(CATEGORIES)
    texts = {name for name in TASKS if make_task(f"{name}:test").modality == "text"}
    assert texts == {"facts", "puzzles", "programs", "library", "passkey", "recall", "lookups"}


@pytest.mark.parametrize("name", SINGLE)
def test_a_record_is_its_prompt_and_its_answer(name):
    task = make_task(f"{name}:test")
    for index in range(6):
        *prompt, assistant = task.record(index)["messages"]
        assert assistant == {"role": "assistant", "content": task.answer(index)}
        assert [message["role"] for message in prompt] == ["user"] and len(task.prompt(index)) == 1
        *media, text = prompt[0]["content"]
        assert text == {"type": "text", "text": task.question(index)}
        assert len(media) == len(task.media(index)) and bool(media) == (task.modality == "vision")
        for part, shown in zip(media, task.media(index), strict=True):
            assert part_kind(part, "part") == {3: "image", 4: "video"}[shown.ndim]
            assert shown.dtype == np.uint8 and shown.shape[-1] == 3 and shown.std() > 5
            assert max(shown.shape[-3:-1]) <= 112 and (part[part["type"]] == shown).all()


@pytest.mark.parametrize("name", SINGLE)
def test_records_become_short_examples(name):
    """As the pipeline reads them, with the tiny model's pictures and bytes: the longest is far below a sequence."""
    data, model = DataConfig(packs=4, pack_patches=256, max_image_patches=64, seq_len=256), preset("tiny")
    task, tokenizer = make_task(f"{name}:train"), load_tokenizer()
    for index in range(5):
        example = prepare(Record(name, task.record(index)), tokenizer, data, model)
        assert len(example.tokens) <= 200
        assert example.loss_weights.sum() == len(task.answer(index).encode()) + 1  # and <|im_end|>


@pytest.mark.parametrize("spec", OPTIONS)
def test_options_keep_gold_answers_right(spec):
    for split in ("train", "test"):
        task = make_task(spec.format(split))
        task.validate(samples=20)
        assert len(task.answer(3).encode()) <= task.longest and task.media(3) is not None


@pytest.mark.parametrize("name", ENDLESS)
def test_the_splits_share_no_key_whatever_the_seed(name):
    keys = {"train": set(), "test": set()}
    for split, found in keys.items():
        for seed in (0, 1):
            task = make_task(f"{name}:{split}:seed={seed}")
            found |= {task.key(task.scene(index)) for index in range(300)}
        assert all(held_out(f"{name} {key}") == (split == "test") for key in found)
    assert not keys["train"] & keys["test"]
    assert min(map(len, keys.values())) > 25  # the key is no constant


@pytest.mark.parametrize("name", ASKING)
def test_no_question_of_the_test_split_is_trained_on(name):
    """Picture and question together, by their bytes."""
    asked = {}
    for split in ("train", "test"):
        task = make_task(f"{name}:{split}")
        asked[split] = set()
        for index in np.linspace(0, len(task) - 1, 400 if task.modality == "text" else 120).astype(int).tolist():
            shown = b"".join(picture.tobytes() for picture in task.media(index))
            asked[split].add(hashlib.sha256(shown + task.question(index).encode()).digest())
    assert not asked["train"] & asked["test"]


@pytest.mark.parametrize("name", ENDLESS)
def test_train_is_endless_and_test_is_hundreds(name):
    assert len(make_task(f"{name}:train")) >= 10**6 and len(make_task(f"{name}:test")) >= 300
    assert len(make_task(f"{name}:train:records=12")) == 12
    first, second = (make_task(f"{name}:train:seed={seed}") for seed in (0, 1))
    assert any(first.answer(i) != second.answer(i) or first.question(i) != second.question(i) for i in range(20))


@pytest.mark.parametrize("name", ASKING)
def test_always_the_same_answer_is_not_worth_much(name):
    """No answer scores well on average, so that a model has to look. (Polygons lie around the middle.)"""
    task = make_task(f"{name}:test")
    indices = np.linspace(0, len(task) - 1, 90).astype(int).tolist()
    golds = sorted({task.answer(index) for index in indices[:30]})
    scored = np.array([[task.score(gold, index) for gold in golds] for index in indices])
    assert scored.mean(0).max() < (0.4 if name == "polygons" else 0.34)


@pytest.mark.parametrize("name", ASKING)
def test_no_text_breaks_a_task(name):
    task = make_task(f"{name}:test")
    texts = ["", "nan", "9" * 100_000, "-1", "\x00", "\ud800", "<box>" * 20_000, "<point>1,1</point>" * 9000, "<polygon>1,1",
             "return " + "(" * 900, "while 1:\n pass", "return x**x**x", "return 'a'*10**9", "٤", "🙂" * 9999]  # fmt: skip
    for index in range(4):
        for text in texts:
            assert 0.0 <= task.score(text, index) < 1.0, text[:50]
        assert task.score(task.answer(index), index) == 1.0
