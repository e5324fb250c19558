"""Answers about drawn pictures, measured again from the pixels."""

import numpy as np
import pytest
from scipy import ndimage

from k25_jax.data.tasks import documents, make_task, motion, scenes, screens
from k25_jax.data.tasks.drawing import COLOURS, font
from k25_jax.data.tasks.words import vocabulary
from k25_jax.scoring import scores


def _mask(picture, colour):
    """Where a picture has a colour, or nearly."""
    return np.abs(picture.astype(int) - np.array(COLOURS[colour])).sum(2) < 40


def _things(picture, colour):
    """Where the things of a colour are, by their middles from left to right; edges that mix to it are left out."""
    numbers, _ = ndimage.label(_mask(picture, colour))
    found = [part for i, part in enumerate(ndimage.find_objects(numbers), 1) if (numbers == i).sum() > 25]
    return sorted(found, key=lambda part: part[1].start + part[1].stop)


def _blobs(picture, paper):
    """Number of things drawn, and a picture of their numbers."""
    return ndimage.label(np.abs(picture.astype(int) - np.array(paper)).sum(2) > 60)[::-1]


# --------------------------------------------------------------------------------------------------------------- scenes
def test_coloured_shapes_are_counted_and_compared():
    count, more = make_task("scenes:test:ask=count,size=112"), make_task("scenes:test:ask=more,size=112")
    asked = 0
    for index in range(60):
        colour = count.question(index).split()[-1].rstrip("?")
        if colour in COLOURS:
            asked += 1
            assert str(len(_things(count.media(index)[0], colour))) == count.answer(index)
        else:
            drawn, _ = _blobs(count.media(index)[0], count.scene(index).paper)
            assert 1 <= int(count.answer(index)) <= drawn
        colours = more.question(index).rstrip("?").split()[1::2]
        numbers = {colour: len(_things(more.media(index)[0], colour)) for colour in colours}
        assert max(numbers, key=numbers.get) == more.answer(index) and len(set(numbers.values())) == 2
    assert 10 < asked < 50
    index = next(index for index in range(100) if count.answer(index) == "4")
    assert count.score("3", index) == 0.75


def test_the_biggest_shape_is_the_one_that_fills_its_outline_most():
    task = make_task("scenes:test:ask=biggest,size=112")
    for index in range(30):
        scene = task.scene(index)
        _, numbers = _blobs(task.media(index)[0], scene.paper)
        spans = [max(part.stop - part.start for part in found) for found in ndimage.find_objects(numbers)]
        found = ndimage.find_objects(numbers)[int(np.argmax(spans))]
        middle = tuple(int((part.start + part.stop) / 2 / 112 * scenes.SIDE) for part in found)[::-1]
        assert {item.cell: item.shape for item in scene.pictures[0]}[middle] == task.answer(index)
        assert sorted(spans)[-1] > 1.15 * sorted(spans)[-2]


def test_neighbours_are_where_the_question_says():
    task = make_task("scenes:test:ask=next,size=84")
    for index in range(60):
        way, shape = task.question(index).rstrip("?").rsplit(" ", 1)
        items = {item.shape: item for item in task.scene(index).pictures[0]}
        there, here = items[task.answer(index)], items[shape]
        picture, centres = task.media(index)[0], []
        for item in (there, here):
            centres.append(ndimage.center_of_mass(_mask(picture, item.colour))[::-1])
        (x, y), (a, b) = centres
        assert {"left of": x < a - 10, "right of": x > a + 10, "above": y < b - 10, "below": y > b + 10}[way]
        assert abs((x - a) if way in ("above", "below") else (y - b)) < 14
    assert {task.question(index).rsplit(" ", 1)[0] for index in range(60)} == set(scenes.BESIDE)


def test_what_changed_is_the_only_difference_of_two_pictures():
    task = make_task("scenes:test:ask=change")
    for index in range(20):
        before, after = (picture.astype(int) for picture in task.media(index))
        y, x = ndimage.center_of_mass(np.abs(before - after).sum(2) > 30)
        cell = (int(x / 84 * scenes.SIDE), int(y / 84 * scenes.SIDE))
        assert {item.cell: item.shape for item in task.scene(index).pictures[0]}[cell] == task.answer(index)


# --------------------------------------------------------------------------------------------------------------- charts
@pytest.mark.parametrize("ask", ["value", "largest", "smallest", "difference"])
def test_bars_are_as_high_as_the_answers_say(ask):
    task, checked = make_task(f"charts:test:size=112,ask={ask}"), 0
    for index in range(40):
        scene = task.scene(index)
        if scene.line:
            continue
        checked += 1
        heights = [part[0].stop - part[0].start for part in _things(task.image(index), scene.colour)]
        assert len(heights) == len(scene.letters)
        unit = (112 - 1.75 * 16) / 9
        read = dict(zip(scene.letters, (round(height / unit) for height in heights), strict=True))
        question = task.question(index).rstrip("?")
        match ask:
            case "value":
                expected = str(read[question])
            case "difference":
                expected = str(read[question[0]] - read[question[2]])
            case "largest":
                expected = max(read, key=read.get)
            case "smallest":
                expected = min(read, key=read.get)
        assert task.answer(index) == expected
    assert checked > 10


# ----------------------------------------------------------------------------------------------- documents and screens
def test_a_field_changes_only_its_row():
    task = make_task("documents:test")
    for index in range(12):
        page = task.scene(index)
        label, value = page.fields[page.asked]
        assert (task.question(index), task.answer(index)) == (f"{label}?", value)
        fields = [(name, "~~" if name == label else text) for name, text in page.fields]
        other = documents.draw(documents.Page(page.kind, tuple(fields), page.asked, page.paper))
        rows = np.flatnonzero((other != task.image(index)).any((1, 2)))
        top = documents.ROW * (page.asked + 1)
        assert len(rows) and top - 2 <= rows.min() and rows.max() < top + documents.ROW + 2
        if page.kind == "receipt":
            prices = [int(text) for _, text in page.fields]
            assert page.fields[-1][0] == "total" and sum(prices[:-1]) == prices[-1]


def test_texts_have_room():
    """No value meets its label, no label leaves its button, no title its bar."""
    pages = make_task("documents:train")
    for index in range(300):
        page = pages.scene(index)
        for label, value in page.fields:
            widths = [font(documents.SIZE).getlength(text) for text in (label, value)]
            room = 42 if page.kind == "form" else documents.WIDTH - 12 - widths[1]
            assert widths[0] <= room and (page.kind != "form" or widths[1] <= documents.WIDTH - 52)
    assert all(font(13).getlength(label) < screens.WIDTH / 2 - 8 for label in screens.BUTTONS)
    assert all(font(13).getlength(title) < screens.WIDTH - 24 for title in screens.TITLES)


def test_buttons_are_where_the_answers_say():
    task = make_task("screens:test")
    for index in range(60):
        screen, question, answer = task.scene(index), task.question(index), task.answer(index)
        places = [f"{row} {side}" for row in screens.ROWS for side in screens.SIDES]
        at = dict(zip(places, screen.labels, strict=True))
        if question[:-1] in at:
            assert at[question[:-1]] == answer
        elif question.startswith("where is "):
            assert at[answer] == question.removeprefix("where is ")[:-1]
        elif question.startswith("press where to "):
            assert screens.BUTTONS[at[answer]] == question.removeprefix("press where to ")[:-1]
        elif question == "which window?":
            assert answer == screen.title
        else:
            corners = []  # the colour of each button, beside its label
            for number in range(len(places)):
                row, side = divmod(number, 2)
                corners.append(tuple(task.image(index)[screens.BAR + screens.ROW * row + 4, side * 56 + 28].tolist()))
            odd = next(i for i, corner in enumerate(corners) if corners.count(corner) == 1)
            assert screen.labels[odd] == answer
    assert len(set(screens.BUTTONS.values())) == len(screens.BUTTONS)


def test_a_button_changes_only_its_place():
    task = make_task("screens:test")
    screen = task.scene(0)
    labels = ("~~", *screen.labels[1:])
    other = screens.draw(screens.Screen("", "", screen.title, labels, screen.off, screen.theme))
    rows, columns = np.nonzero((other != task.image(0)).any(2))
    assert screens.BAR <= rows.min() and rows.max() < screens.BAR + screens.ROW and columns.max() < screens.WIDTH / 2


# ------------------------------------------------------------------------------------------------------------ grounding
def test_boxes_and_points_are_those_of_the_pixels():
    boxes, points = make_task("boxes:test:size=112"), make_task("points:test:size=112")
    asked = 0
    for index in range(120):
        for task in (boxes, points):
            wanted = task.question(index).split(": ")[1]
            if wanted not in COLOURS:
                continue
            asked += 1
            found = _things(task.image(index), wanted)
            assert len(found) == len(task.gold(index))
            for part, gold in zip(found, sorted(task.gold(index), key=lambda gold: gold[0] + gold[-2]), strict=True):
                seen = np.array([part[1].start, part[0].start, part[1].stop, part[0].stop]) * 1000 / 112
                if task is boxes:
                    np.testing.assert_allclose(gold, seen, atol=22)
                else:
                    assert seen[0] < gold[0] < seen[2] and seen[1] < gold[1] < seen[3]
    assert asked > 60
    assert boxes.score(points.answer(0), 0) == 0.0


def test_all_shapes_of_a_kind_are_asked_for():
    task = make_task("points:train")
    for index in range(200):
        scene = task.scene(index)
        names = scene.colours if scene.wanted in COLOURS else scene.shapes
        assert {i for i, name in enumerate(names) if name == scene.wanted} == set(scene.targets)
        assert len(scores.read_points(task.answer(index))) == len(scene.targets)


def test_outlines_cover_the_region():
    task = make_task("polygons:test:size=112")
    for index in range(60):
        colour = task.question(index).removeprefix("outline: ")
        drawn = _mask(task.image(index), colour)
        corners = np.array(scores.read_polygon(task.answer(index)))
        inside = scores.raster(corners.tolist())
        inside = inside[np.ix_(np.linspace(0, 249, 112).astype(int), np.linspace(0, 249, 112).astype(int))]
        assert (drawn & inside).sum() / (drawn | inside).sum() > 0.8
        # Shoelace's area has the sign of the direction: clockwise where y grows downwards.
        x, y = corners.T
        assert (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() > 0
        assert corners.sum(1).argmin() == 0 and 0 <= corners.min() and corners.max() <= 1000


# --------------------------------------------------------------------------------------------------------------- motion
def test_the_film_shows_what_moved_and_where():
    for ask in ("what", "where"):
        task = make_task(f"motion:test:ask={ask}")
        for index in range(40):
            (film,) = task.media(index)
            ways = {}
            for colour in {actor.colour for actor in task.scene(index).actors}:
                first, last = (np.array(ndimage.center_of_mass(_mask(film[i], colour))) for i in (0, -1))
                ways[colour] = last - first
            moved = max(ways, key=lambda colour: np.abs(ways[colour]).max())
            assert all(np.abs(way).max() < 1 for colour, way in ways.items() if colour != moved)
            down, right = ways[moved]
            seen = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
            assert np.abs(ways[moved]).max() > 15 and task.answer(index) == (moved if ask == "what" else seen)


def test_the_film_shows_the_order():
    task = make_task("motion:test:ask=order,frames=10")
    for index in range(30):
        (film,) = task.media(index)
        assert film.shape == (10, 56, 56, 3)
        colours = {actor.colour for actor in task.scene(index).actors}
        first = {
            colour: next(i for i, frame in enumerate(film) if _mask(frame, colour).sum() > 9) for colour in colours
        }
        assert task.answer(index).split() == sorted(colours, key=first.get) and len(set(first.values())) == 3


def test_where_things_are_at_first_does_not_tell_what_will_move():
    """The mover starts anywhere, in any lane: on average where the others are."""
    task = make_task("motion:train:ask=what")
    starts = np.array([[actor.start for actor in task.scene(index).actors] for index in range(400)])
    np.testing.assert_allclose(starts[:, 0].mean(0), starts[:, 1:].mean((0, 1)), atol=0.05)
    assert set(motion.WAYS) == {make_task("motion:train:ask=where").answer(index) for index in range(40)}


# ---------------------------------------------------------------------------------------------------------------- lines
def test_lines_have_words_of_their_split_only():
    for split, other in (("train", "test"), ("test", "train")):
        task = make_task(f"lines:{split}")
        words = {word for index in range(300) for word in task.answer(index).split() if not word.isdigit()}
        assert words <= set(vocabulary(split)) and not words & set(vocabulary(other))


def test_a_line_is_inside_its_image_and_reads_as_one():
    task = make_task("lines:train")
    for index in range(40):
        image = task.image(index).astype(int)
        assert image.shape == (44, 112, 3)
        edge = np.concatenate([image[:, 0], image[:, -1], image[0], image[-1]])
        assert np.abs(edge - image[0, 0]).max() < 70
    assert task.score(task.answer(0).replace(" ", "\n"), 0) == 1.0
    assert 0.5 < task.score(task.answer(0)[:-1], 0) < 1.0
