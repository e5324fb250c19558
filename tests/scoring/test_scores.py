"""Scores against brute force and other libraries, and on text that nobody should have written."""

import itertools
import math

import numpy as np
import pytest
import skimage.draw
from sklearn.metrics import jaccard_score

from k25_jax.scoring import scores

HOSTILE = [
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e9",
    "0x10",
    "٤",
    "²",
    "½",
    "9" * 100_000,
    "." * 100_000,
    " " * 100_000,
    "\x00",
    "\ud800",
    "İ" * 1000,
    "é́" * 50,
    "<box>",
    "<box></box>",
    "<box>" * 50_000,
    "<box>1,2,3,4</box>" * 50_000,
    "<box>1,2,3,4</box>" * 200,
    "<point>5,5</point>" * 199,
    "<box>nan,nan,nan,nan</box>",
    "<box>-1,-1,5,5</box>",
    "<box>9999,9999,9999,9999</box>",
    "<box>500,500,100,100</box>",
    "<box>1.5,2.5,3,4</box>",
    "<box>٤,٤,٥,٥</box>",
    "<point>1e3,5</point>",
    "<point>" + "9" * 100_000 + ",5</point>",
    "<polygon></polygon>",
    "<polygon>1,1</polygon>",
    "<polygon>1,1 1,1 1,1</polygon>",
    "<polygon>0,0 1000,1000 0,1000 1000,0</polygon>",
    "<polygon>" + "1,1 " * 40_000 + "</polygon>",
    "<polygon>" + " " * 40_000,
    "<polygon>" + ", " * 2000 + "</polygon>",
    "<box>" + " " * 90_000 + "1",
    "<|im_end|>",
    "\\u0000",
    "%s%n{0}",
    "'; drop table",
    "🙂" * 5000,
]


def _distance(a, b):
    """Edit distance by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def test_edit_is_the_distance_over_the_longer_length():
    generator = np.random.default_rng(0)
    for _ in range(300):
        a, b = ("".join(generator.choice(list("abc é"), generator.integers(1, 12)).tolist()) for _ in range(2))
        a, b = f"x{a}x", f"x{b}x"  # no space at the ends
        assert scores.edit(a, b) == pytest.approx(1 - _distance(a, b) / max(len(a), len(b)))
    assert scores.edit(" KITTEN.\n", "kitten") == 1.0 and scores.edit("", "kitten") == 0.0
    assert scores.edit("sitting", "kitten") == pytest.approx(1 - 3 / 7)


@pytest.mark.parametrize(
    "prediction, gold, score",
    [("4", 4, 1), ("3", 4, 0.75), ("6", 4, 0.5), ("9", 4, 0), ("0", 0, 1), ("1", 0, 0), (" 4. ", 4, 1), ("-4", 4, 0),
     ("four", 4, 0), ("", 4, 0), ("4 4", 4, 0), ("٤", 4, 0), ("1" * 5000, 4, 0)],
)  # fmt: skip
def test_count(prediction, gold, score):
    assert scores.count(prediction, gold) == score


def test_exact_looks_past_case_and_full_stops_only():
    assert scores.exact(" Red.\n", "red") == 1.0
    assert scores.exact("red apple", "red") == scores.exact("", "red") == 0.0


# ------------------------------------------------------------------------------------------------------ boxes and points
def _best_sum(match_PG):
    """The largest sum of matches, by trying all."""
    if match_PG.shape[0] > match_PG.shape[1]:
        match_PG = match_PG.T
    rows, columns = match_PG.shape
    return max(
        sum(match_PG[row, column] for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(columns), rows)
    )


def test_soft_f1_matches_as_well_as_can_be():
    generator = np.random.default_rng(1)
    for rows, columns in itertools.product(range(1, 5), repeat=2):
        match_PG = generator.random((rows, columns))
        precision, recall = _best_sum(match_PG) / rows, _best_sum(match_PG) / columns
        assert scores.soft_f1(match_PG) == pytest.approx(2 * precision * recall / (precision + recall))
    greedy = np.array([[0.9, 0.8], [0.8, 0.0]])  # the best single pair is not in the best matching
    assert scores.soft_f1(greedy) == pytest.approx(0.8)
    assert scores.soft_f1(np.zeros((0, 0))) == 1.0 and scores.soft_f1(np.zeros((0, 3))) == 0.0


def test_box_iou_is_that_of_masks():
    generator = np.random.default_rng(2)
    for _ in range(60):
        masks, pair = [], []
        for _ in range(2):
            left, right = sorted(generator.choice(60, 2, replace=False).tolist())
            top, bottom = sorted(generator.choice(60, 2, replace=False).tolist())
            mask = np.zeros((60, 60), bool)
            mask[top:bottom, left:right] = True
            masks.append(mask.ravel())
            pair.append((left, top, right, bottom))
        assert scores.box_iou(*pair) == pytest.approx(jaccard_score(*masks))
    assert scores.box_iou((5, 5, 2, 2), (0, 0, 9, 9)) == 0.0


def test_boxes_score_by_overlap_and_number():
    gold = [(100, 100, 300, 300), (500, 500, 900, 700)]
    assert scores.boxes(scores.write_boxes(gold), gold) == 1.0
    assert scores.boxes("they are: " + scores.write_boxes(gold[::-1]), gold) == 1.0  # in any order
    assert scores.boxes(scores.write_boxes(gold[:1]), gold) == pytest.approx(2 / 3)
    assert scores.boxes(scores.write_boxes(gold * 2), gold) == pytest.approx(2 / 3)  # saying it twice does not help
    half = [(100, 100, 300, 200), gold[1]]
    assert scores.boxes(scores.write_boxes(half), gold) == pytest.approx(0.75)
    assert scores.boxes("<box>100, 100, 300, 300</box>", gold[:1]) == 1.0


def test_points_score_by_distance():
    gold = [(200, 300), (800, 700)]
    assert scores.points(scores.write_points(gold[::-1]), gold) == 1.0
    away = scores.write_points([(230, 340), (800, 700)])  # 50 away, which is sigma
    assert scores.points(away, gold) == pytest.approx((1 + math.exp(-0.5)) / 2)
    assert scores.points("<point>999,0</point>", gold) < 1e-6


# -------------------------------------------------------------------------------------------------------------- polygons
def test_rasters_are_those_of_another_library():
    generator = np.random.default_rng(3)
    for _ in range(30):
        corners = generator.integers(0, 1001, (4, 2)).tolist()
        ours = scores.raster(corners)
        other = skimage.draw.polygon2mask((scores.RASTER,) * 2, np.array(corners)[:, ::-1] * (249 / 1000))
        edge = 2 * 4 * scores.RASTER  # both count cells at the edge in their own way
        assert (ours != other).sum() < edge and (ours & other).sum() >= 0.95 * other.sum()


def test_polygons_score_by_overlap():
    square = [(200, 200), (800, 200), (800, 800), (200, 800)]
    turned = square[2:] + square[:2]
    assert scores.polygon(scores.write_polygon(square), square) == 1.0
    assert scores.polygon(scores.write_polygon(turned[::-1]), square) == 1.0
    half = [(200, 200), (800, 200), (800, 500), (200, 500)]
    assert scores.polygon(scores.write_polygon(half), square) == pytest.approx(0.5, abs=0.02)
    assert scores.polygon(scores.write_polygon(square[:2]), square) == 0.0
    assert scores.polygon("<polygon>200,200 800,200 800,1800</polygon>", square) == 0.0
    everything = [(0, 0), (1000, 0), (1000, 1000), (0, 1000)]
    assert scores.polygon(scores.write_polygon(everything), square) == pytest.approx(0.36, abs=0.02)


# --------------------------------------------------------------------------------------------------------------- hostile
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_no_text_breaks_a_score(number):
    text = HOSTILE[number]
    found = [
        scores.exact(text, "red"),
        scores.edit(text, "red"),
        scores.count(text, 4),
        scores.boxes(text, [(100, 100, 300, 300)] * 3),
        scores.points(text, [(100, 100)] * 3),
        scores.polygon(text, [(0, 0), (1000, 0), (500, 1000)]),
    ]
    assert all(0.0 <= score < 1.0 for score in found), found


def test_random_bytes_do_not_break_a_score():
    generator = np.random.default_rng(4)
    pieces = [
        "<box>",
        "</box>",
        "<point>",
        "</point>",
        "<polygon>",
        "</polygon>",
        ",",
        " ",
        "1",
        "99",
        "1000",
        "x",
        "-",
    ]
    for _ in range(500):
        text = "".join(generator.choice(pieces, 30).tolist())
        text += bytes(generator.integers(0, 256, 10).tolist()).decode("latin-1")
        for score in (scores.boxes(text, [(1, 1, 9, 9)]), scores.points(text, [(1, 9)]), scores.edit(text, "1")):
            assert 0.0 <= score <= 1.0
        assert 0.0 <= scores.polygon(text, [(0, 0), (99, 0), (9, 99)]) <= 1.0


# ---------------------------------------------------------------------------------------------------------------- length
def test_lengths_within_a_budget():
    assert [scores.within(length, 10) for length in (0, 10, 11, 10**9)] == [1.0, 1.0, 0.0, 0.0]
    assert [scores.within(length, 10, 0.5) for length in (10, 11, 12, 15, 16)] == pytest.approx([1, 0.8, 0.6, 0, 0])
    assert scores.within(10**9, math.inf) == scores.within(0, 0) == scores.within(0, 0, 1.0) == 1.0
    assert scores.within(1, 0) == scores.within(1, 0, 5.0) == 0.0


def test_longer_is_never_better_and_always_bounded():
    generator = np.random.default_rng(5)
    for _ in range(200):
        budget, slack = int(generator.integers(0, 50)), float(generator.choice([0.0, 0.1, 1.0, 7.0]))
        found = [scores.within(length, budget, slack) for length in range(500)]
        assert all(0.0 <= b <= a <= 1.0 for a, b in zip(found, found[1:], strict=False))
        assert found[: budget + 1] == [1.0] * (budget + 1) and found[-1] == 0.0


@pytest.mark.parametrize("given", [(-1, 5), (5, -1), (5, 5, -0.1), (math.nan, 5), (5, math.nan), (5, 5, math.inf)])
def test_lengths_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="must be numbers that are not negative"):
        scores.within(*given)
