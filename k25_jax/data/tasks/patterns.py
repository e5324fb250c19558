"""Read and search by program: digits by template, a glyph in a crop, bars of a chart, ways through a maze (K2.5 §3.4)."""

import collections
from dataclasses import dataclass

import numpy as np

from k25_jax.data.tasks.drawing import pick
from k25_jax.data.tasks.programmed import DARK, Programmed, glyph, ink, paper

CELL = 4  # pixels of a maze's cell, and from digit to digit of a template
DIGITS = "0123456789"


@dataclass(frozen=True)
class Written:
    """Digits at a place (left, top)."""

    digits: str
    place: tuple[int, int]
    paint: int


@dataclass(frozen=True)
class Numerals(Programmed):
    """Read three digits by template: the second picture shows all ten, in order, four pixels each."""

    def compose(self, generator: np.random.Generator) -> Written:
        digits = "".join(pick(generator, DIGITS) for _ in range(3))
        return Written(digits, (0, 0), int(generator.integers(2**31)))

    def key(self, scene: Written) -> str:
        return scene.digits

    def question(self, index: int) -> str:
        return "which number? images[1] shows 0123456789"

    def media(self, index: int) -> tuple[np.ndarray, ...]:
        scene = self.scene(index)
        generator = np.random.default_rng(scene.paint)
        return strip(generator, scene.digits), strip(generator, DIGITS)

    def answer(self, index: int) -> str:
        return self.scene(index).digits

    def program(self, index: int) -> tuple[str, ...]:
        read = "m,t=[np.split(i.mean(2)<128,i.shape[1]//4,1) for i in images]"
        return (f"{read}\nprint(*[np.argmin([(a!=b).sum() for b in t]) for a in m],sep='')",)


def strip(generator: np.random.Generator, digits: str) -> np.ndarray:
    """Digits side by side, dark on light, 7 pixels high."""
    image, colour = paper(generator, 7, CELL * len(digits)), ink(generator)
    for i, digit in enumerate(digits):
        image[1:6, CELL * i : CELL * i + 3][glyph(digit)] = colour
    return image


@dataclass(frozen=True)
class Glyphs(Programmed):
    """Crop and look: a digit of three by five pixels, somewhere. The first cell finds it, the second prints its pixels."""

    def compose(self, generator: np.random.Generator) -> Written:
        left, top = generator.integers(1, (self.size - 4, self.size - 6)).tolist()
        return Written(pick(generator, DIGITS), (left, top), int(generator.integers(2**31)))

    def key(self, scene: Written) -> str:
        return f"{scene.digits} {scene.place}"

    def question(self, index: int) -> str:
        return "which digit is in the picture? crop it"

    def image(self, index: int) -> np.ndarray:
        scene = self.scene(index)
        generator, (left, top) = np.random.default_rng(scene.paint), scene.place
        image = paper(generator, self.size, self.size)
        image[top : top + 5, left : left + 3][glyph(scene.digits)] = ink(generator)
        return image

    def answer(self, index: int) -> str:
        return self.scene(index).digits

    def program(self, index: int) -> tuple[str, ...]:
        left, top = self.scene(index).place
        ends = f"{DARK}\ny,x=np.nonzero(m)\nprint(y.min(),y.max(),x.min(),x.max())"
        return ends, f"print(m[{top}:{top + 5},{left}:{left + 3}].astype(int))"


@dataclass(frozen=True)
class Chart:
    """Heights of bars in units, pixels of a unit, and the question: "highest", "lowest" or the number of a bar."""

    heights: tuple[int, ...]
    unit: int
    asked: str
    paint: int


@dataclass(frozen=True)
class Bars(Programmed):
    """Read a bar chart: the value of a bar, or which is the highest or the lowest. Bars are counted from 1."""

    def compose(self, generator: np.random.Generator) -> Chart:
        number, unit = int(generator.integers(3, 6)), int(generator.integers(2, 5))
        heights = tuple((generator.permutation((self.size - 6) // unit - 1)[:number] + 1).tolist())
        asked = pick(generator, ("highest", "lowest", *map(str, range(1, number + 1))))
        return Chart(heights, unit, asked, int(generator.integers(2**31)))

    def key(self, scene: Chart) -> str:
        return f"{scene.heights} {scene.asked}"

    def question(self, index: int) -> str:
        scene = self.scene(index)
        if scene.asked in ("highest", "lowest"):
            return f"which bar is the {scene.asked}?"
        return f"value of bar {scene.asked}? a unit has {scene.unit} pixels"

    def image(self, index: int) -> np.ndarray:
        scene = self.scene(index)
        generator = np.random.default_rng(scene.paint)
        image = paper(generator, self.size, self.size)
        step = self.size // len(scene.heights)
        for i, height in enumerate(scene.heights):
            bottom = self.size - 2
            image[bottom - height * scene.unit : bottom, i * step + 2 : (i + 1) * step - 1] = ink(generator)
        return image

    def answer(self, index: int) -> str:
        scene = self.scene(index)
        if scene.asked in ("highest", "lowest"):
            extreme = max if scene.asked == "highest" else min
            return str(scene.heights.index(extreme(scene.heights)) + 1)
        return str(scene.heights[int(scene.asked) - 1])

    def program(self, index: int) -> tuple[str, ...]:
        scene = self.scene(index)
        bars = f"{DARK}\nn,k=ndimage.label(m.any(0))\nh=[m[:,n==i+1].any(1).sum() for i in range(k)]\n"
        match scene.asked:
            case "highest":
                return (bars + "print(np.argmax(h)+1)",)
            case "lowest":
                return (bars + "print(np.argmin(h)+1)",)
        return (bars + f"print(h[{scene.asked}-1]//{scene.unit})",)


@dataclass(frozen=True)
class Maze:
    """Open cells, row by row; the way leads from the first one to `goal` (column, row)."""

    open: tuple[tuple[bool, ...], ...]
    goal: tuple[int, int]
    steps: int


@dataclass(frozen=True)
class Mazes(Programmed):
    """How many steps has the shortest way from the top left cell to another? Dark cells are walls."""

    size: int = 44

    def compose(self, generator: np.random.Generator) -> Maze:
        side = self.size // CELL
        while True:
            cells = generator.random((side, side)) < 0.68
            column, row = generator.integers(side // 2, side, 2).tolist()
            cells[0, 0] = True
            if steps := shortest(cells, (row, column)):
                return Maze(tuple(map(tuple, cells.tolist())), (column, row), steps)

    def key(self, scene: Maze) -> str:
        return f"{scene.open} {scene.goal}"

    def question(self, index: int) -> str:
        column, row = self.scene(index).goal
        return f"steps from cell 0,0 to column {column}, row {row}? a cell has {CELL} pixels, dark ones are walls"

    def image(self, index: int) -> np.ndarray:
        cells = np.array(self.scene(index).open)
        walls = np.repeat(np.repeat(~cells, CELL, 0), CELL, 1)
        generator = self.generator(index, self.seed + 1)
        image = paper(generator, *walls.shape)
        image[walls] = ink(generator)
        return image

    def answer(self, index: int) -> str:
        return str(self.scene(index).steps)

    def program(self, index: int) -> tuple[str, ...]:
        column, row = self.scene(index).goal
        flood = f"while not d[{row},{column}]:d=ndimage.binary_dilation(d)&f;n+=1"
        return (f"f=images[0][::{CELL},::{CELL}].mean(2)>128\nd=f&False\nd[0,0]=True\nn=0\n{flood}\nprint(n)",)


def shortest(cells: np.ndarray, goal: tuple[int, int]) -> int:
    """Steps of the shortest way from the first cell to `goal` (row, column), by search in breadth; 0 without one."""
    steps, waiting = {(0, 0): 0}, collections.deque([(0, 0)])
    while waiting:
        row, column = waiting.popleft()
        for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            inside = all(0 <= place < side for place, side in zip(near, cells.shape, strict=True))
            if inside and cells[near] and near not in steps:
                steps[near] = steps[row, column] + 1
                waiting.append(near)
    return steps.get(goal, 0)
