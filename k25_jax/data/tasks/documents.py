"""Find a field in a small form, invoice or receipt."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import Canvas, pick, pick_some
from k25_jax.scoring import scores

KINDS = ("form", "invoice", "receipt")
WIDTH, ROW, SIZE = 112, 17, 13  # pixels: of the page, of a row, of the font
PAPERS = ((255, 255, 255), (250, 246, 234), (238, 243, 248))
INK, FAINT = (24, 26, 32), (196, 200, 208)
NAMES = ("ada", "ben", "cleo", "dina", "emil", "fay", "gus", "hana", "ivo", "jun", "kira", "leo", "mia", "ned", "olga")
CITIES = ("oslo", "rome", "lima", "cairo", "delhi", "kyoto", "paris", "quito", "accra", "hanoi", "perth", "turin")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
GOODS = ("tea", "milk", "bread", "soap", "rice", "pens", "figs", "oil", "salt", "eggs", "wool", "nuts")


@dataclass(frozen=True)
class Page:
    """A title, and fields (label, value) from top to bottom; `asked` is the number of the field that is asked for."""

    kind: str
    fields: tuple[tuple[str, str], ...]
    asked: int
    paper: tuple[int, int, int]


@dataclass(frozen=True)
class Documents(Endless):
    """`kind` is form, invoice, receipt or any; `fields` is how many there are below the title.

    The score is 1 - the edit distance over the length of the longer text. Held out: all the fields with their values.
    """

    category: ClassVar[str] = "documents"

    kind: str = "any"
    fields: int = 4

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("kind", (*KINDS, "any"))
        self.check_range("fields", 2, 5)

    def question(self, index: int) -> str:
        page = self.scene(index)
        return f"{page.fields[page.asked][0]}?"

    def answer(self, index: int) -> str:
        page = self.scene(index)
        return page.fields[page.asked][1]

    def score(self, prediction: str, index: int) -> float:
        return scores.edit(prediction, self.answer(index))

    def key(self, scene: Page) -> str:
        return " ".join(map(" ".join, scene.fields))

    def compose(self, generator: np.random.Generator) -> Page:
        kind = pick(generator, KINDS) if self.kind == "any" else self.kind
        if kind == "receipt":
            goods = pick_some(generator, GOODS, self.fields - 1)
            prices = generator.integers(1, 60, len(goods)).tolist()
            fields = [*zip(goods, map(str, prices), strict=True), ("total", str(sum(prices)))]
        else:
            values = {
                "name": pick(generator, NAMES),
                "city": pick(generator, CITIES),
                "date": f"{generator.integers(1, 29)} {pick(generator, MONTHS)}",
                "age" if kind == "form" else "due": str(generator.integers(10, 100)),
                "no" if kind == "form" else "item": str(generator.integers(100, 1000)),
            }
            fields = pick_some(generator, tuple(values.items()), self.fields)
        return Page(kind, tuple(fields), int(generator.integers(len(fields))), pick(generator, PAPERS))

    def image(self, index: int) -> np.ndarray:
        return draw(self.scene(index))


def draw(page: Page) -> np.ndarray:
    """uint8 RGB [h, 112, 3]: labels on the left; values beside them in a form, at the right edge otherwise."""
    canvas = Canvas(WIDTH, ROW * (len(page.fields) + 1), page.paper)
    canvas.box(0, 0, WIDTH, ROW, FAINT)
    canvas.text(page.kind.upper(), WIDTH / 2, ROW / 2, SIZE - 2, INK, "mm")
    for row, (label, value) in enumerate(page.fields, 1):
        y = ROW * (row + 0.5)
        canvas.text(label, 4, y, SIZE, INK)
        if page.kind == "form":
            canvas.line([(46, y + 7), (WIDTH - 4, y + 7)], FAINT)
            canvas.text(value, 48, y, SIZE, INK)
        else:
            canvas.text(value, WIDTH - 4, y, SIZE, INK, "rm")
    if page.kind == "receipt":
        y = ROW * len(page.fields)
        canvas.line([(4, y + 0.5), (WIDTH - 4, y + 0.5)], INK)
    return canvas.pixels()
