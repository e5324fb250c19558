"""Find the way on a screen: which button is where, which is off, and where to press for what one wants."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from k25_jax.data.tasks import Endless
from k25_jax.data.tasks.drawing import Canvas, pick, pick_some

KINDS = ("at", "where", "want", "off", "open")
BUTTONS = {  # label -> what it is pressed for
    "Save": "keep it",
    "Open": "load a file",
    "Send": "mail it",
    "Print": "put it on paper",
    "Undo": "take it back",
    "Copy": "have it twice",
    "Help": "read advice",
    "Exit": "leave",
    "Find": "search",
    "Mute": "hear nothing",
    "Zoom": "see it larger",
    "Play": "start the film",
}
TITLES = ("Notes", "Mail", "Music", "Maps", "Paint", "Shop", "News", "Clock")
ROWS = ("top", "middle", "bottom")
SIDES = ("left", "right")
WIDTH, BAR, ROW = 112, 18, 22  # pixels: of the screen, of the title bar, of a row of buttons
THEMES = (  # screen, title bar, title, button, label, button that is off, its label
    ((240, 242, 246), (52, 92, 180), (255, 255, 255), (255, 255, 255), (20, 24, 32), (216, 219, 225), (160, 164, 172)),
    ((34, 37, 44), (14, 15, 19), (230, 232, 238), (70, 108, 190), (255, 255, 255), (52, 56, 64), (100, 105, 114)),
    ((250, 244, 232), (150, 74, 50), (255, 250, 240), (255, 214, 130), (60, 36, 20), (234, 226, 210), (186, 176, 158)),
)


@dataclass(frozen=True)
class Screen:
    """A window with a title and buttons, two in a row; the button `off` cannot be pressed."""

    question: str
    answer: str
    title: str
    labels: tuple[str, ...]
    off: int
    theme: int


@dataclass(frozen=True)
class Screens(Endless):
    """`ask` is at, where, want, off, open or any; `rows` of two buttons.

    Held out: which buttons are where.
    """

    category: ClassVar[str] = "screens"

    ask: str = "any"
    rows: int = 3

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("ask", (*KINDS, "any"))
        self.check_range("rows", 2, len(ROWS))

    def question(self, index: int) -> str:
        return self.scene(index).question

    def answer(self, index: int) -> str:
        return self.scene(index).answer

    def image(self, index: int) -> np.ndarray:
        return draw(self.scene(index))

    def key(self, scene: Screen) -> str:
        return " ".join(scene.labels)

    def compose(self, generator: np.random.Generator) -> Screen:
        labels = pick_some(generator, tuple(BUTTONS), self.rows * len(SIDES))
        title, theme = pick(generator, TITLES), int(generator.integers(len(THEMES)))
        place, off = (int(generator.integers(len(labels))) for _ in range(2))
        rows = ROWS if self.rows == len(ROWS) else (ROWS[0], ROWS[-1])
        where = f"{rows[place // len(SIDES)]} {SIDES[place % len(SIDES)]}"
        match pick(generator, KINDS) if self.ask == "any" else self.ask:
            case "at":
                question, answer = f"{where}?", labels[place]
            case "where":
                question, answer = f"where is {labels[place]}?", where
            case "want":
                question, answer = f"press where to {BUTTONS[labels[place]]}?", where
            case "off":
                question, answer = "which is off?", labels[off]
            case "open":
                question, answer = "which window?", title
        return Screen(question, answer, title, tuple(labels), off, theme)


def draw(screen: Screen) -> np.ndarray:
    """uint8 RGB [h, 112, 3]."""
    back, bar, title, button, label, off, off_label = THEMES[screen.theme]
    canvas = Canvas(WIDTH, BAR + ROW * (len(screen.labels) // len(SIDES)), back)
    canvas.box(0, 0, WIDTH, BAR, bar)
    canvas.text(screen.title, 5, BAR / 2, 13, title)
    canvas.text("x", WIDTH - 6, BAR / 2 - 1, 13, title, "rm")
    for number, text in enumerate(screen.labels):
        row, side = divmod(number, len(SIDES))
        left, top = side * WIDTH / 2, BAR + ROW * row
        is_off = number == screen.off
        canvas.box(left + 3, top + 2, left + WIDTH / 2 - 3, top + ROW - 2, off if is_off else button, 4)
        canvas.text(text, left + WIDTH / 4, top + ROW / 2, 13, off_label if is_off else label, "mm")
    return canvas.pixels()
