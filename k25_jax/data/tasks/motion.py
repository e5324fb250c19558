"""Watch a film: what moved, where it went, and in what order things came."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import COLOURS, SHAPES, Canvas, pick, pick_some

KINDS = ("what", "where", "order")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PAPERS = ((255, 255, 255), (28, 30, 36))
REACH = 0.4  # how far a shape goes, in shares of the side
EDGE = 0.16  # how near to the edge the middle of a shape may be


@dataclass(frozen=True)
class Actor:
    """A shape that goes from `start` to `end` (shares of the side) or stays, and is there from frame `since` on."""

    shape: str
    colour: str
    start: tuple[float, float]
    end: tuple[float, float]
    since: int


@dataclass(frozen=True)
class Scene:
    """A film, and what is asked about it."""

    question: str
    answer: str
    actors: tuple[Actor, ...]
    paper: tuple[int, int, int]


@dataclass(frozen=True)
class Motion(Endless):
    """`ask` is what, where, order or any; `objects` shapes in a film of `frames` frames of `size` pixels a side.

    Where: one shape moves, to the left, to the right, up or down. Order: the shapes appear one after another. Held out:
    shapes and colours with their ways, or in their order.
    """

    category: ClassVar[str] = "video"
    longest: ClassVar[int] = 32

    ask: str = "any"
    objects: int = 3
    frames: int = 8
    size: int = 56

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("ask", (*KINDS, "any"))
        self.check_range("objects", 2, 4)
        self.check_range("frames", 4, 64)
        self.check_range("size", 28, 448)

    def question(self, index: int) -> str:
        return self.scene(index).question

    def answer(self, index: int) -> str:
        return self.scene(index).answer

    def media(self, index: int) -> tuple[np.ndarray, ...]:
        return (draw(self.scene(index), self.frames, self.size),)

    def key(self, scene: Scene) -> str:
        ways = [[(b > a) - (b < a) for a, b in zip(actor.start, actor.end, strict=True)] for actor in scene.actors]
        return " ".join(f"{actor.shape} {actor.colour} {way}" for actor, way in zip(scene.actors, ways, strict=True))

    def compose(self, generator: np.random.Generator) -> Scene:
        kind = pick(generator, KINDS) if self.ask == "any" else self.ask
        colours = pick_some(generator, tuple(COLOURS), self.objects)
        shapes = [pick(generator, SHAPES) for _ in colours]
        way, paper = pick(generator, tuple(WAYS)), pick(generator, PAPERS)
        # Every shape has a lane of its own: a row when the mover goes left or right, a column otherwise.
        lanes = generator.permutation(self.objects).tolist()
        along = generator.uniform(EDGE, 1 - EDGE, self.objects).tolist()
        places = [self._place(way, lane, part) for lane, part in zip(lanes, along, strict=True)]
        if kind == "order":
            since = [round(i * self.frames / self.objects) for i in range(self.objects)]
            actors = tuple(Actor(*parts) for parts in zip(shapes, colours, places, places, since, strict=True))
            return Scene("order?", " ".join(colours), actors, paper)
        start = EDGE + (1 - 2 * EDGE - REACH) * generator.random()
        ends = [self._place(way, lanes[0], part) for part in (start, start + REACH)]
        start, end = ends if sum(WAYS[way]) > 0 else ends[::-1]
        mover = Actor(shapes[0], colours[0], start, end, 0)
        others = [Actor(*parts, 0) for parts in zip(shapes[1:], colours[1:], places[1:], places[1:], strict=True)]
        question, answer = ("what moved?", colours[0]) if kind == "what" else ("where?", way)
        return Scene(question, answer, (mover, *others), paper)

    def _place(self, way: str, lane: int, along: float) -> tuple[float, float]:
        across = (lane + 0.5) / self.objects
        return (along, across) if WAYS[way][0] else (across, along)


def draw(scene: Scene, frames: int, size: int) -> np.ndarray:
    """uint8 RGB [frames, size, size, 3]."""
    film, radius = [], min(0.15, 0.46 / len(scene.actors)) * size  # inside its lane
    for number in range(frames):
        canvas, share = Canvas(size, size, scene.paper), number / (frames - 1)
        for actor in scene.actors:
            if number >= actor.since:
                x, y = (a + share * (b - a) for a, b in zip(actor.start, actor.end, strict=True))
                canvas.shape(actor.shape, COLOURS[actor.colour], (x * size, y * size, radius, 0.0))
        film.append(canvas.pixels())
    return np.stack(film)
