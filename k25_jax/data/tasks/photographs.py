"""Name the photograph that a piece was cut from: the images that scikit-image and scikit-learn ship."""

import functools
import importlib.resources
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from k25_jax.data.tasks import Task, TaskError

# answer -> the file inside the package
PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "bricks": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cat": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "galaxies": "skimage/data/hubble_deep_field.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "page": "skimage/data/page.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "temple": "sklearn/datasets/images/china.jpg",
    "text": "skimage/data/text.png",
    "tissue": "skimage/data/ihc.png",
}
SIDES = (56, 84, 112)  # pixels


@dataclass(frozen=True)
class Photographs(Task):
    """Random pieces of photographs. A photograph is cut into 3 x 3 fields: 6 are for training and 3 for testing.

    Height and width of an image are drawn from 56, 84 and 112 pixels; `size` fixes both.
    """

    category: ClassVar[str] = "vision_knowledge"

    records: int = 0  # 0: 9000 to train on, 360 to test on
    size: int = 0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.records < 0 or self.size < 0:
            raise TaskError(f"photographs: records={self.records} and size={self.size} must not be negative")

    def __len__(self) -> int:
        return self.records or (9000 if self.split == "train" else 360)

    def question(self, index: int) -> str:
        return "photo?"

    def image(self, index: int) -> np.ndarray:
        box, size = self.piece(index)
        return np.asarray(_photograph(self.answer(index)).crop(box).resize(size, Image.Resampling.BICUBIC))

    def piece(self, index: int) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """Where the image is cut out (left, top, right, bottom), and the (width, height) that it is brought to."""
        photograph, generator = _photograph(self.answer(index)), self.generator(index, self.seed)
        width, height = (self.size, self.size) if self.size else generator.choice(SIDES, 2).tolist()
        columns, rows = photograph.width // 3, photograph.height // 3  # pixels of a field
        # Each row of fields, and each column, has one field for testing.
        row = int(generator.integers(3))
        column = (row + 1) % 3 if self.split == "test" else (row + 2 * int(generator.integers(2))) % 3
        zoom = generator.uniform(0.7, 1.0) * min(columns / width, rows / height)
        wide, high = int(zoom * width), int(zoom * height)
        left = column * columns + int(generator.integers(columns - wide + 1))
        top = row * rows + int(generator.integers(rows - high + 1))
        return (left, top, left + wide, top + high), (width, height)

    def answer(self, index: int) -> str:
        return tuple(PHOTOGRAPHS)[self.check_index(index) % len(PHOTOGRAPHS)]


@functools.cache
def _photograph(answer: str) -> Image.Image:
    """The whole photograph in RGB, read from the installed package."""
    package, _, path = PHOTOGRAPHS[answer].partition("/")
    try:
        file = importlib.resources.files(package) / path
    except ImportError as error:
        raise TaskError("photographs needs scikit-image and scikit-learn: pip install 'k25-jax[demo]'") from error
    if not file.is_file():
        raise TaskError(
            f"photographs: the installed {package} has no {path}; install the pinned version (constraints/)"
        )
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")
