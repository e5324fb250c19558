"""Know a creature by its emblem: the invented world of `facts`, asked about in pictures."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import MILLION, Task
from k25_jax.data.tasks.drawing import COLOURS, Canvas, pick
from k25_jax.data.tasks.world import MOST, Creature, creatures, pairs

PAPERS = ((255, 255, 255), (205, 205, 205), (120, 124, 130), (40, 42, 48))
INKS = {"cream": (250, 244, 220), "black": (12, 12, 14)}
RENDERINGS = 8  # of each question in the test split


@dataclass(frozen=True)
class Emblems(Task):
    """Name the creature whose emblem is shown, or say a fact about it. `ask` is name, fact or any.

    Train: the name of every creature, and three facts in four, on three of four papers. Held out: the other facts,
    which no picture is asked about (the text task `facts` tells them all), and one paper for each creature. The test
    split shows emblems only on the held-out paper, and asks for names and for the held-out facts.
    """

    category: ClassVar[str] = "vision_knowledge"

    ask: str = "any"
    creatures: int = 32
    world: int = 0
    size: int = 56
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("ask", ("name", "fact", "any"))
        self.check_range("creatures", 4, MOST)
        self.check_range("size", 28, 448)

    def __len__(self) -> int:
        return MILLION if self.split == "train" else len(self._asked()) * RENDERINGS

    def question(self, index: int) -> str:
        return f"{self.asked(index)[1]}?"

    def answer(self, index: int) -> str:
        creature, about = self.asked(index)
        return creature.name if about == "name" else creature.facts[about]

    def image(self, index: int) -> np.ndarray:
        generator = self.generator(index, self.seed)
        creature, about = self._choose(generator, index)
        return draw(creature, PAPERS[self.paper(generator, creature)], generator, self.size)

    def asked(self, index: int) -> tuple[Creature, str]:
        """The creature, and "name" or the attribute that is asked for."""
        return self._choose(self.generator(index, self.seed), index)

    def _choose(self, generator: np.random.Generator, index: int) -> tuple[Creature, str]:
        if self.split == "test":
            return self._asked()[index % len(self._asked())]
        if self.ask == "name" or (self.ask == "any" and generator.random() < 0.4):
            return pick(generator, creatures(self.creatures, self.world)), "name"
        return pick(generator, pairs(self.name, self.creatures, self.world, False))

    def _asked(self) -> tuple[tuple[Creature, str], ...]:
        """All questions of the test split."""
        names = tuple((creature, "name") for creature in creatures(self.creatures, self.world))
        facts = pairs(self.name, self.creatures, self.world, True)
        return {"name": names, "fact": facts, "any": facts + names}[self.ask]

    def paper(self, generator: np.random.Generator, creature: Creature) -> int:
        """Which paper: a creature's own one when testing, another one when training."""
        own = creatures(self.creatures, self.world).index(creature) % len(PAPERS)
        return own if self.split == "test" else (own + int(generator.integers(1, len(PAPERS)))) % len(PAPERS)


def draw(creature: Creature, paper: tuple[int, int, int], generator: np.random.Generator, size: int) -> np.ndarray:
    """uint8 RGB [size, size, 3]: a shield with the shape on it, a little moved and turned."""
    canvas = Canvas(size, size, paper)
    x, y = generator.uniform(0.46, 0.54, 2) * size
    half, angle = generator.uniform(0.36, 0.44) * size, generator.uniform(-0.15, 0.15)
    shield = np.array([[-0.9, -1], [0.9, -1], [0.9, 0.2], [0.55, 0.75], [0, 1.05], [-0.55, 0.75], [-0.9, 0.2]])
    canvas.polygon(shield * half + np.array([x, y]), COLOURS[creature.field])
    canvas.shape(creature.shape, INKS[creature.ink], (x, y - 0.15 * half, 0.62 * half, angle))
    return canvas.pixels()
