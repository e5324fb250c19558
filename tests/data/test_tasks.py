import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from k25_jax.config import ConfigError
from k25_jax.data.tasks import (
    SPLITS,
    TASKS,
    TaskError,
    library,
    make_task,
    photographs,
    shapes,
    words,
)

OLD = ("digits", "photographs", "words", "shapes")  # one image, which a question follows
BOTH = [f"{name}:{split}" for name in TASKS for split in SPLITS]


def _fingerprint(specs):
    """A hash of some records of each spec, and of their images."""
    digest = hashlib.sha256()
    for spec in specs:
        task = make_task(spec)
        for index in (0, 1, len(task) // 2, len(task) - 1):
            record = task.record(index)
            for part in record["messages"][0]["content"] if "messages" in record else ():
                digest.update(part.pop(part["type"]).tobytes() if part["type"] != "text" else b"")
            digest.update(repr(record).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("spec", BOTH)
def test_gold_answers_score_one(spec):
    make_task(spec).validate(samples=32)


def test_validate_finds_a_score_that_is_wrong():
    class Broken(shapes.Shapes):
        def score(self, prediction, index):
            return 0.5

    with pytest.raises(TaskError, match=r"broken:test\[0\]: the gold answer .* does not score 1"):
        Broken("test").validate()

    class Generous(shapes.Shapes):
        def score(self, prediction, index):
            return 1.0

    with pytest.raises(TaskError, match="an empty answer scores as much"):
        Generous("test").validate()


@pytest.mark.parametrize("name", OLD)
def test_a_record_is_a_chat_with_an_image(name):
    task = make_task(f"{name}:train")
    user, assistant = task.record(3)["messages"]
    image, text = user["content"]
    assert user["role"] == "user" and assistant == {"role": "assistant", "content": task.answer(3)}
    assert text == {"type": "text", "text": task.question(3)} and text["text"].endswith("?")
    assert image["type"] == "image" and image["image"].dtype == np.uint8 and image["image"].shape[2] == 3
    assert image["image"].std() > 5  # something is drawn


def test_records_are_the_same_in_another_process():
    code = f"import test_tasks; print(test_tasks._fingerprint({BOTH}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    other = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert other.stdout.strip() == _fingerprint(BOTH)


@pytest.mark.parametrize("name", OLD)
def test_the_seed_changes_the_pictures(name):
    last = len(make_task(f"{name}:train")) - 1
    first, second = (make_task(f"{name}:train:seed={seed}").image(last) for seed in (0, 1))
    assert first.shape != second.shape or (first != second).any()


@pytest.mark.parametrize("spec", BOTH)
def test_an_index_outside_is_named(spec):
    task = make_task(spec)
    for index in (-1, len(task)):
        with pytest.raises(IndexError, match=f"{task.name}:{task.split} has {len(task)} records; {index}"):
            task.record(index)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("digit:train", "no task 'digit' .* did you mean 'digits'"),
        ("digits", "names no split; write digits:train or digits:test"),
        ("digits:dev", "digits: no split 'dev'; there are train and test"),
        ("digits:train:sise=28", "task 'digits:train:sise=28': unknown key 'sise'; did you mean 'size'"),
        ("digits:train:size", "option 'size' must read name=value"),
        ("digits:train:size=big", "size must be int, not 'big'"),
        ("digits:train:size=4", "size=4 must be at least 8"),
        ("photographs:train:size=-1", "size=-1 must not be negative"),
        ("words:train:height=3", "height=3 must be at least 12"),
        ("shapes:train:ask=weight", "ask='weight' must be one of shape, colour, count, any"),
        ("shapes:train:size=2", "size=2 must be at least 14"),
        ("shapes:train:records=-1", "records=-1 and seed=0 must not be negative"),
        ("charts:train:bars=9", "bars=9 must be at least 3 and at most 7"),
        ("boxes:train:objects=1", "most=2 must be at most objects=1"),
        ("library:train:size=0", "size=0 must be positive"),
    ],
)
def test_a_bad_spec_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_task(spec)


# --------------------------------------------------------------------------------------------------------------- digits
def test_digits_are_split_once_and_evenly():
    train, test = make_task("digits:train:variants=1"), make_task("digits:test")
    assert (len(train), len(test)) == (1437, 360)
    scans = {(task.split, task._scan(index)) for task in (train, test) for index in range(len(task))}
    assert len({scan for _, scan in scans}) == 1797
    counts = np.bincount([int(test.answer(index)) for index in range(360)])
    assert counts.min() >= 34 and counts.max() <= 38


def test_digits_vary_around_the_scan():
    task = make_task("digits:train:variants=3,size=42")
    assert len(task) == 3 * 1437 and task.image(5).shape == (42, 42, 3)
    first, *others = (task.image(5 + 1437 * round_) for round_ in range(3))
    assert all(task.answer(5 + 1437 * round_) == task.answer(5) for round_ in range(3))
    assert all((first != other).any() for other in others)
    small = np.asarray(first, np.float64).reshape(14, 3, 14, 3, 3).mean((1, 3, 4))
    assert np.corrcoef(small.ravel(), ndimage.zoom(_scan_of(task, 5), 14 / 8, order=1).ravel())[0, 1] > 0.8


def _scan_of(task, index):
    from sklearn.datasets import load_digits

    return load_digits().images[task._scan(index)]


# ---------------------------------------------------------------------------------------------------------- photographs
def test_every_photograph_is_installed_and_asked_for():
    task = make_task("photographs:test")
    assert {task.answer(index) for index in range(len(photographs.PHOTOGRAPHS))} == set(photographs.PHOTOGRAPHS)
    assert all(np.asarray(photographs._photograph(name)).std() > 5 for name in photographs.PHOTOGRAPHS)


def test_pieces_of_the_two_splits_share_no_pixel():
    cut = {}
    for split in SPLITS:
        task = make_task(f"photographs:{split}:records=720")
        cut[split] = {name: np.zeros((3000, 3000), bool) for name in photographs.PHOTOGRAPHS}
        for index in range(40 * len(photographs.PHOTOGRAPHS)):
            left, top, right, bottom = task.piece(index)[0]
            cut[split][task.answer(index)][top:bottom, left:right] = True
    for name in photographs.PHOTOGRAPHS:
        image = photographs._photograph(name)
        train, test = cut["train"][name], cut["test"][name]
        assert not (train & test).any()
        assert not (train | test)[image.height :].any() and not (train | test)[:, image.width :].any()
        assert test.sum() > 0.2 * image.height * image.width and train.sum() > 0.4 * image.height * image.width


def test_photographs_come_in_several_sizes_or_in_one():
    sizes = {make_task("photographs:train").image(index).shape[:2] for index in range(80)}
    assert len(sizes) == 9 and {side for size in sizes for side in size} == set(photographs.SIDES)
    assert {make_task("photographs:train:size=70").image(index).shape for index in range(5)} == {(70, 70, 3)}


# ---------------------------------------------------------------------------------------------------------------- words
def test_words_of_the_two_splits_are_different():
    train, test = set(words.vocabulary("train")), set(words.vocabulary("test"))
    assert not train & test and len(train) > 200 and len(test) > 50
    assert all(2 <= len(word) <= 5 and word.isalpha() for word in train | test)


def test_a_word_is_inside_its_image():
    task = make_task("words:train")
    for index in range(0, len(task), 97):
        image = task.image(index).astype(int)
        assert image.shape[0] == 28
        paper = image[0, 0]
        edge = np.concatenate([image[:, 0], image[:, -1]])
        assert np.abs(edge - paper).max() < 60, task.answer(index)  # no letter is cut at a side
        assert np.abs(image - paper).max() > 70


def test_a_word_with_one_wrong_letter_scores_in_part():
    task = make_task("words:test")
    gold = task.answer(0)
    assert task.score(f" {gold.upper()}.\n", 0) == 1.0
    assert task.score(gold[:-1] + "~", 0) == pytest.approx(1 - 1 / len(gold))
    assert task.score("~" * 50, 0) == 0.0 and task.score("", 0) == 0.0


# --------------------------------------------------------------------------------------------------------------- shapes
def test_as_many_shapes_are_drawn_as_the_answer_says():
    task = make_task("shapes:test:ask=count,size=112")
    for index in range(40):
        image = task.image(index).astype(int)
        drawn = np.abs(image - np.array(task.scene(index).paper)).sum(2) > 60
        assert str(ndimage.label(drawn)[1]) == task.answer(index)
    assert {task.answer(index) for index in range(100)} == set("12345")


def test_the_colour_is_the_one_of_the_answer():
    task = make_task("shapes:train:ask=colour")
    for index in range(30):
        x, y = (int(part * 56) for part in task.scene(index).places[0][:2])
        np.testing.assert_allclose(task.image(index)[y, x], shapes.COLOURS[task.answer(index)], atol=2)


def test_the_share_of_ink_tells_shapes_apart():
    """Areas of the outlines, as shares of the square around the circle of the corners."""
    areas = {"circle": np.pi / 4, "square": 0.5, "triangle": 0.325, "diamond": 0.275, "cross": 0.45, "star": 0.308}
    for shape, area in areas.items():
        scene = shapes.Scene("shape", shape, "red", (0, 0, 0), ((0.5, 0.5, 0.4, 0.1),))
        ink = (shapes.draw(scene, 200)[:, :, 0] > 110).mean() / 0.8**2
        assert ink == pytest.approx(area, abs=0.03), shape


def test_counts_score_by_distance():
    task = make_task("shapes:test:ask=count")
    index = next(index for index in range(100) if task.answer(index) == "4")
    guesses = {"4": 1.0, "3": 0.75, "5": 0.75, "9": 0.0, "four": 0.0, "": 0.0, "-4": 0.0, "9" * 5000: 0.0, "٤": 0.0}
    assert {guess: task.score(guess, index) for guess in guesses} == guesses


def test_all_questions_are_asked():
    task = make_task("shapes:train")
    assert {task.question(index) for index in range(40)} == set(shapes.QUESTIONS.values())
    assert len(make_task("shapes:test:records=7")) == 7


# -------------------------------------------------------------------------------------------------------------- library
def test_library_files_are_in_one_split_only():
    train, test = set(library.files("train")), set(library.files("test"))
    assert not train & test and len(train) > 200 and len(test) > 20
    assert not {part for path in train | test for part in path.parts} & {"site-packages", "idlelib", "__pycache__"}


def test_library_pieces_are_whole_lines_of_the_size_asked_for():
    task = make_task("library:test:size=1000")
    lengths = [len(task.record(index)["text"].encode()) for index in range(len(task))]
    assert 900 < np.mean(lengths) < 1200 and max(lengths) < 3000
    assert task.score(task.answer(1), 1) == 1.0 and task.score(task.answer(1)[:-20], 1) == 0.0


def test_library_asks_nothing():
    with pytest.raises(TaskError, match="library is text to read on and asks nothing"):
        make_task("library:test").prompt(0)


def test_cut_loses_nothing_but_space():
    text = "a = 1\n" * 7 + "é" * 30 + "\n" + "last line without an end"
    pieces = library.cut(text, 20)
    assert "".join(pieces) == text and pieces[0] == "a = 1\n" * 4
    assert library.cut("\n\n", 20) == library.cut("", 20) == []
