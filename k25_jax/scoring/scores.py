"""Scores in [0, 1] of an answer against a gold answer (K2.5 §3.5): text, counts, lengths, boxes, points and polygons.

An answer is whatever a model wrote: no function here raises, or takes long, on any string. Coordinates are whole
numbers from 0 to 1000, shares of the image's width and height in thousandths.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from rapidfuzz.distance import Levenshtein
from scipy.optimize import linear_sum_assignment

SCALE = 1000  # the largest coordinate
MOST_TEXT = 20_000  # characters of an answer that are read
MOST_ITEMS = 200  # boxes or points in an answer, corners in a polygon; an answer with more counts as empty
SIGMA = 50.0  # of the Gaussian around a point, in thousandths of a side
RASTER = 250  # cells on a side, to compare polygons

Point = tuple[int, int]
Box = tuple[int, int, int, int]

_NUMBER = r"\s{0,3}([0-9]{1,4})\s{0,3}"
_BOX = re.compile(rf"<box>{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}</box>")
_POINT = re.compile(rf"<point>{_NUMBER},{_NUMBER}</point>")
_POLYGON = re.compile(r"<polygon>([0-9, \n]{1,4000})</polygon>")
_CORNER = re.compile(r"([0-9]{1,4}), {0,3}([0-9]{1,4})")


# ----------------------------------------------------------------------------------------------------- text and numbers
def normalise(answer: str) -> str:
    """`answer` in lower case, without space and full stops around it; cut off where nobody reads on."""
    return answer[:MOST_TEXT].strip().strip(".").strip().casefold()


def exact(prediction: str, gold: str) -> float:
    """1 for the gold answer, whatever its case and the space or full stop around it; 0 otherwise."""
    return float(normalise(prediction) == normalise(gold))


def edit(prediction: str, gold: str) -> float:
    """1 - the edit distance over the length of the longer text."""
    return float(Levenshtein.normalized_similarity(normalise(prediction), normalise(gold)))


def count(prediction: str, gold: int) -> float:
    """1 - |prediction - gold| / max(gold, 1), at least 0; 0 for what is not a whole number in ASCII digits."""
    prediction = normalise(prediction)
    if not re.fullmatch("[0-9]{1,9}", prediction):
        return 0.0
    return max(0.0, 1 - abs(int(prediction) - gold) / max(gold, 1))


def within(length: int, budget: float, slack: float = 0.0) -> float:
    """Budget control: 1 up to `budget` tokens, which may be infinite, 0 beyond; with `slack` a line between the two.

    It then falls to 0 at budget * (1 + slack), so that an answer which is a little too long is told from a long one.
    Both lengths are ours, not a model's: ValueError where one is negative or no number.
    """
    if not (length >= 0 and budget >= 0 and 0 <= slack < math.inf):
        raise ValueError(f"length={length}, budget={budget} and slack={slack} must be numbers that are not negative")
    if length <= budget:
        return 1.0
    room = budget * slack
    return max(0.0, 1 - (length - budget) / room) if room else 0.0


# -------------------------------------------------------------------------------------------------------------- writing
def write_boxes(boxes: Sequence[Box]) -> str:
    """Boxes (left, top, right, bottom) as an answer."""
    return "".join(f"<box>{','.join(map(str, box))}</box>" for box in boxes)


def write_points(points: Sequence[Point]) -> str:
    """Points (x, y) as an answer."""
    return "".join(f"<point>{x},{y}</point>" for x, y in points)


def write_polygon(corners: Sequence[Point]) -> str:
    """Corners (x, y) in order as an answer."""
    return f"<polygon>{' '.join(f'{x},{y}' for x, y in corners)}</polygon>"


# -------------------------------------------------------------------------------------------------------------- reading
def read_boxes(answer: str) -> list[Box]:
    """The boxes in an answer, in order; what does not read as a box inside the image is passed over."""
    return _inside(_BOX.findall(answer[:MOST_TEXT]))


def read_points(answer: str) -> list[Point]:
    """The points in an answer, in order; what does not read as a point inside the image is passed over."""
    return _inside(_POINT.findall(answer[:MOST_TEXT]))


def read_polygon(answer: str) -> list[Point]:
    """Corners of the first polygon in an answer; none when a corner lies outside the image."""
    found = _POLYGON.search(answer[:MOST_TEXT])
    corners = _CORNER.findall(found[1]) if found else []
    inside = _inside(corners)
    return inside if len(inside) == len(corners) else []


def _inside(items: list[tuple[str, ...]]) -> list[tuple[int, ...]]:
    if len(items) > MOST_ITEMS:
        return []
    numbers = [tuple(map(int, item)) for item in items]
    return [item for item in numbers if max(item) <= SCALE]


# ------------------------------------------------------------------------------------------------------------- geometry
def boxes(prediction: str, gold: Sequence[Box]) -> float:
    """F1 of the boxes in an answer: a pair counts its IoU, and the pairs are those with the largest sum."""
    found = read_boxes(prediction)
    overlaps_PG = [[box_iou(p, g) for g in gold] for p in found]
    return soft_f1(np.reshape(overlaps_PG, (len(found), len(gold))))


def points(prediction: str, gold: Sequence[Point], sigma: float = SIGMA) -> float:
    """F1 of the points in an answer: a pair counts exp(-d² / 2 sigma²), d its distance in thousandths."""
    found = read_points(prediction)
    weights_PG = [[math.exp(-(math.dist(p, g) ** 2) / (2 * sigma**2)) for g in gold] for p in found]
    return soft_f1(np.reshape(weights_PG, (len(found), len(gold))))


def polygon(prediction: str, gold: Sequence[Point]) -> float:
    """IoU of the areas inside two polygons, drawn on a raster."""
    corners = read_polygon(prediction)
    if len(corners) < 3:
        return 0.0
    a, b = raster(corners), raster(gold)
    return float((a & b).sum() / max((a | b).sum(), 1))


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of the areas; 0 for boxes that are inside out."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    sides = (a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1])
    if min(width, height, *sides) <= 0:
        return 0.0
    return width * height / (sides[0] * sides[1] + sides[2] * sides[3] - width * height)


def soft_f1(match_PG: np.ndarray) -> float:
    """F1 of predictions P against golds G whose pairs match in part; 1 when there are none of either."""
    if not sum(match_PG.shape):
        return 1.0
    chosen = linear_sum_assignment(match_PG, maximize=True)
    return float(2 * match_PG[chosen].sum() / sum(match_PG.shape))


def raster(corners: Sequence[Point]) -> np.ndarray:
    """bool [RASTER, RASTER]: the cells that the polygon covers."""
    image = Image.new("1", (RASTER, RASTER))
    scale = (RASTER - 1) / SCALE
    ImageDraw.Draw(image).polygon([(x * scale, y * scale) for x, y in corners], fill=1)
    return np.asarray(image)
