"""Count, compare and relate: shapes of several kinds and colours in a grid, and what changed between two pictures."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import COLOURS, SHAPES, Canvas, pick, pick_some
from k25_jax.scoring import scores

KINDS = ("count", "more", "next", "biggest", "change")
SIDE = 3  # cells of the grid on a side
BESIDE = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
Paper = tuple[int, int, int]

PAPERS = ((255, 255, 255), (28, 30, 36))


@dataclass(frozen=True)
class Item:
    """A shape in a cell; `place` is x, y, radius as shares of the cell, and an angle."""

    cell: tuple[int, int]
    shape: str
    colour: str
    place: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """One picture, or two, and what is asked."""

    question: str
    answer: str
    pictures: tuple[tuple[Item, ...], ...]
    paper: Paper


@dataclass(frozen=True)
class Scenes(Endless):
    """`ask` is count, more, next, biggest, change or any; up to `objects` shapes in a picture of `size` pixels a side.

    A count scores 1 - |prediction - gold| / gold, at least 0 (K2.5 §3.5). Held out: which shapes of which colours are
    in which cells.
    """

    category: ClassVar[str] = "vision_reasoning"

    ask: str = "any"
    objects: int = 6
    size: int = 84

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("ask", (*KINDS, "any"))
        self.check_range("objects", 3, SIDE * SIDE)
        self.check_range("size", 42, 448)

    def question(self, index: int) -> str:
        return self.scene(index).question

    def answer(self, index: int) -> str:
        return self.scene(index).answer

    def media(self, index: int) -> tuple[np.ndarray, ...]:
        scene = self.scene(index)
        return tuple(draw(items, scene.paper, self.size) for items in scene.pictures)

    def score(self, prediction: str, index: int) -> float:
        gold = self.answer(index)
        return scores.count(prediction, int(gold)) if gold.isdigit() else scores.exact(prediction, gold)

    def key(self, scene: Scene) -> str:
        return " ".join(sorted(f"{item.cell} {item.shape} {item.colour}" for item in scene.pictures[0]))

    def compose(self, generator: np.random.Generator) -> Scene:
        kind = pick(generator, KINDS) if self.ask == "any" else self.ask
        number, paper = int(generator.integers(3, self.objects + 1)), pick(generator, PAPERS)
        match kind:
            case "count":
                return _count(_items(generator, number, repeat=True), generator, paper)
            case "more":
                return _more(_items(generator, number, repeat=True), generator, paper)
            case "next":
                return _next(_items(generator, min(number, len(SHAPES)), repeat=False), generator, paper)
            case "biggest":
                return _biggest(_items(generator, min(number, len(SHAPES)), repeat=False), generator, paper)
        return _change(_items(generator, min(number, len(SHAPES)), repeat=False), generator, paper)


def _items(generator: np.random.Generator, number: int, repeat: bool) -> tuple[Item, ...]:
    """Shapes in different cells. Without `repeat` no two have the same shape or colour; with it, few kinds of each."""
    cells = pick_some(generator, [(x, y) for y in range(SIDE) for x in range(SIDE)], number)
    shapes = pick_some(generator, SHAPES, 2 if repeat else number)
    colours = pick_some(generator, tuple(COLOURS), 2 if repeat else number)
    if repeat:
        shapes = [pick(generator, shapes) for _ in cells]
        colours = [pick(generator, colours) for _ in cells]
    places = [
        (*generator.uniform(0.44, 0.56, 2).tolist(), generator.uniform(0.3, 0.4), generator.uniform(-0.2, 0.2))
        for _ in cells
    ]
    return tuple(Item(*parts) for parts in zip(cells, shapes, colours, places, strict=True))


def _count(items: tuple[Item, ...], generator: np.random.Generator, paper: Paper) -> Scene:
    one, by = pick(generator, items), pick(generator, ("shape", "colour"))
    wanted = getattr(one, by)
    number = sum(getattr(item, by) == wanted for item in items)
    return Scene(f"how many {wanted}?", str(number), (items,), paper)


def _more(items: tuple[Item, ...], generator: np.random.Generator, paper: Paper) -> Scene:
    """Of two colours, which has more shapes; when they have as many, the first shape takes the other colour."""
    first, other = pick_some(generator, tuple(COLOURS), 2)
    colours = [first if generator.random() < 0.5 else other for _ in items]
    if 2 * colours.count(first) == len(items):
        colours[0] = other if colours[0] == first else first
    items = tuple(replace(item, colour=colour) for item, colour in zip(items, colours, strict=True))
    more = first if 2 * colours.count(first) > len(items) else other
    return Scene(f"more {first} or {other}?", more, (items,), paper)


def _next(items: tuple[Item, ...], generator: np.random.Generator, paper: Paper) -> Scene:
    """The second shape moves beside the first one, unless a shape is there already."""
    first, second, *rest = items
    ways = [way for way, (x, y) in BESIDE.items() if 0 <= first.cell[0] + x < SIDE and 0 <= first.cell[1] + y < SIDE]
    way = pick(generator, ways)
    cell = (first.cell[0] + BESIDE[way][0], first.cell[1] + BESIDE[way][1])
    there = next((item for item in rest if item.cell == cell), None)
    if there is None:
        there = replace(second, cell=cell)
        items = (first, there, *rest)
    return Scene(f"{way} {first.shape}?", there.shape, (items,), paper)


def _biggest(items: tuple[Item, ...], generator: np.random.Generator, paper: Paper) -> Scene:
    number = int(generator.integers(len(items)))
    sized = []
    for index, item in enumerate(items):
        x, y, radius, angle = item.place
        radius = generator.uniform(0.43, 0.47) if index == number else radius - 0.1
        sized.append(replace(item, place=(x, y, radius, angle)))
    return Scene("biggest?", items[number].shape, (tuple(sized),), paper)


def _change(items: tuple[Item, ...], generator: np.random.Generator, paper: Paper) -> Scene:
    """In the second picture one of the shapes has another colour."""
    number = int(generator.integers(len(items)))
    colour = pick(generator, [colour for colour in COLOURS if colour != items[number].colour])
    after = tuple(replace(item, colour=colour) if i == number else item for i, item in enumerate(items))
    return Scene("what changed?", items[number].shape, (items, after), paper)


def draw(items: tuple[Item, ...], paper: Paper, size: int) -> np.ndarray:
    """uint8 RGB [size, size, 3]."""
    canvas, cell = Canvas(size, size, paper), size / SIDE
    for item in items:
        x, y, radius, angle = item.place
        place = ((item.cell[0] + x) * cell, (item.cell[1] + y) * cell, radius * cell, angle)
        canvas.shape(item.shape, COLOURS[item.colour], place)
    return canvas.pixels()
