"""Count, find, compare and measure what is on noisy paper, and find what changed: a line or two of NumPy each (K2.5 §3.4)."""

from dataclasses import dataclass

import numpy as np

from k25_jax.data.tasks.drawing import pick
from k25_jax.data.tasks.programmed import DARK, Programmed, apart, disc, ink, paper

MOST = 9  # dots to count
SMALL, LARGE = (2, 3), (5, 6)  # radii, when only the large ones count
LIMIT = 60  # pixels between the two


@dataclass(frozen=True)
class Dotted:
    """Discs (column, row, radius), the words of the question, and the seed of paper and ink."""

    asked: str
    places: tuple[tuple[int, int, int], ...]
    paint: int


@dataclass(frozen=True)
class Dots(Programmed):
    """Count dots: all, or those of more than 60 pixels; dark ones on light paper or the other way round."""

    def compose(self, generator: np.random.Generator) -> Dotted:
        asked = pick(generator, ("dark", "light", "large dark", "large light"))
        radii = (*SMALL, *LARGE) if "large" in asked else (2, 3, 4)
        places = apart(generator, int(generator.integers(1, MOST + 1)), self.size, radii)
        return Dotted(asked, places, int(generator.integers(2**31)))

    def key(self, scene: Dotted) -> str:
        return f"{scene.asked} {scene.places}"

    def question(self, index: int) -> str:
        asked = self.scene(index).asked
        if "large" in asked:
            return f"how many {asked.split()[1]} dots have more than {LIMIT} pixels?"
        return f"how many {asked} dots?"

    def image(self, index: int) -> np.ndarray:
        scene = self.scene(index)
        return painted(scene, self.size, "light" in scene.asked)

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        return str(sum("large" not in scene.asked or radius >= LARGE[0] for _, _, radius in scene.places))

    def program(self, index: int) -> tuple[str, ...]:
        asked = self.scene(index).asked
        mask = f"images[0].mean(2){'>' if 'light' in asked else '<'}128"
        if "large" in asked:
            return (f"n=ndimage.label({mask})[0]\nprint((np.bincount(n.ravel())[1:]>{LIMIT}).sum())",)
        return (f"print(ndimage.label({mask})[1])",)


@dataclass(frozen=True)
class Spots(Programmed):
    """Say where the only dot is, in pixels: column,row of its middle."""

    def compose(self, generator: np.random.Generator) -> Dotted:
        places = apart(generator, 1, self.size, (2, 3, 4, 5))
        return Dotted(pick(generator, ("dark", "light")), places, int(generator.integers(2**31)))

    def key(self, scene: Dotted) -> str:
        return f"{scene.asked} {scene.places}"

    def question(self, index: int) -> str:
        return f"column,row of the middle of the {self.scene(index).asked} dot?"

    def image(self, index: int) -> np.ndarray:
        scene = self.scene(index)
        return painted(scene, self.size, scene.asked == "light")

    def answer(self, index: int) -> str:
        ((x, y, _),) = self.scene(index).places
        return f"{x},{y}"

    def program(self, index: int) -> tuple[str, ...]:
        sign = ">" if self.scene(index).asked == "light" else "<"
        return (f"y,x=ndimage.center_of_mass(images[0].mean(2){sign}128)\nprint(f'{{x:.0f}},{{y:.0f}}')",)


def painted(scene: Dotted, side: int, light: bool) -> np.ndarray:
    """The discs on noisy paper; `light` ones on dark paper."""
    generator = np.random.default_rng(scene.paint)
    image = paper(generator, side, side, light=not light)
    for x, y, radius in scene.places:
        image[disc(side, side, x, y, radius)] = ink(generator, light)
    return image


@dataclass(frozen=True)
class Pair:
    """Boxes (left, top, width, height) in the left and the right half, and the question."""

    asked: str
    boxes: tuple[tuple[int, int, int, int], ...]
    paint: int


@dataclass(frozen=True)
class Sizes(Programmed):
    """Compare two boxes: which one is larger or smaller, or by how many pixels do they differ?"""

    def compose(self, generator: np.random.Generator) -> Pair:
        half = self.size // 2
        while True:
            boxes = []
            for side in (0, half):
                width, height = generator.integers(4, half - 2), generator.integers(4, self.size - 2)
                left = side + generator.integers(1, half - width)
                boxes.append((int(left), int(generator.integers(1, self.size - height)), int(width), int(height)))
            if boxes[0][2] * boxes[0][3] != boxes[1][2] * boxes[1][3]:
                asked = pick(generator, ("larger", "smaller", "difference", "difference"))
                return Pair(asked, tuple(boxes), int(generator.integers(2**31)))

    def key(self, scene: Pair) -> str:
        return f"{scene.asked} {scene.boxes}"

    def question(self, index: int) -> str:
        asked = self.scene(index).asked
        if asked == "difference":
            return "by how many pixels do the boxes differ?"
        return f"which box is {asked}, left or right?"

    def image(self, index: int) -> np.ndarray:
        return boxed(self.scene(index), self.size)

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        left, right = (width * height for _, _, width, height in scene.boxes)
        if scene.asked == "difference":
            return str(abs(left - right))
        return "left" if (left > right) == (scene.asked == "larger") else "right"

    def program(self, index: int) -> tuple[str, ...]:
        asked, halves = self.scene(index).asked, f"{DARK}\na,b=[int(h.sum()) for h in np.split(m,2,1)]\n"
        if asked == "difference":
            return (halves + "print(abs(a-b))",)
        sign = ">" if asked == "larger" else "<"
        return (halves + f"print('left' if a{sign}b else 'right')",)


@dataclass(frozen=True)
class Lengths(Programmed):
    """Measure a box in pixels: its width, height, or area."""

    def compose(self, generator: np.random.Generator) -> Pair:
        width, height = generator.integers(3, self.size - 2, 2).tolist()
        left, top = int(generator.integers(1, self.size - width)), int(generator.integers(1, self.size - height))
        asked = pick(generator, ("wide", "high", "large"))
        return Pair(asked, ((left, top, width, height),), int(generator.integers(2**31)))

    def key(self, scene: Pair) -> str:
        return f"{scene.asked} {scene.boxes}"

    def question(self, index: int) -> str:
        asked = self.scene(index).asked
        return "how many pixels has the dark box?" if asked == "large" else f"how many pixels {asked} is the dark box?"

    def image(self, index: int) -> np.ndarray:
        return boxed(self.scene(index), self.size)

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        _, _, width, height = scene.boxes[0]
        return str({"wide": width, "high": height, "large": width * height}[scene.asked])

    def program(self, index: int) -> tuple[str, ...]:
        found = {"wide": "m.any(0).sum()", "high": "m.any(1).sum()", "large": "m.sum()"}
        return (f"{DARK}\nprint({found[self.scene(index).asked]})",)


def boxed(scene: Pair, side: int) -> np.ndarray:
    """Dark boxes on light paper."""
    generator = np.random.default_rng(scene.paint)
    image = paper(generator, side, side)
    for left, top, width, height in scene.boxes:
        image[top : top + height, left : left + width] = ink(generator)
    return image


@dataclass(frozen=True)
class Change:
    """A box (left, top, width, height) in which two pictures differ, and the question."""

    asked: str
    box: tuple[int, int, int, int]
    paint: int


@dataclass(frozen=True)
class Changes(Programmed):
    """Two pictures that differ inside a box: how many pixels differ, or where the box begins."""

    def compose(self, generator: np.random.Generator) -> Change:
        width, height = generator.integers(2, 12, 2).tolist()
        left, top = int(generator.integers(self.size - width)), int(generator.integers(self.size - height))
        asked = pick(generator, ("count", "corner"))
        return Change(asked, (left, top, width, height), int(generator.integers(2**31)))

    def key(self, scene: Change) -> str:
        return f"{scene.asked} {scene.box}"

    def question(self, index: int) -> str:
        if self.scene(index).asked == "count":
            return "how many pixels differ?"
        return "column,row of the first pixel that differs?"

    def media(self, index: int) -> tuple[np.ndarray, ...]:
        scene = self.scene(index)
        generator = np.random.default_rng(scene.paint)
        before = paper(generator, self.size, self.size)
        left, top, width, height = scene.box
        after = before.copy()
        after[top : top + height, left : left + width] -= generator.integers(20, 60, (height, width, 1)).astype(
            np.uint8
        )
        return before, after

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        left, top, width, height = scene.box
        return str(width * height) if scene.asked == "count" else f"{left},{top}"

    def program(self, index: int) -> tuple[str, ...]:
        differs = "d=(images[0]!=images[1]).any(2)\n"
        if self.scene(index).asked == "count":
            return (differs + "print(d.sum())",)
        return (differs + "y,x=np.argwhere(d)[0]\nprint(f'{x},{y}')",)
