"""Read a handwritten digit: scikit-learn's 1797 scans of 8 x 8 pixels."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from k25_jax.data.tasks import Task, TaskError

PAD = 2  # black pixels around a scan, so that strokes that end at its edge end softly


@dataclass(frozen=True)
class Digits(Task):
    """1437 digits to train on, each in `variants` positions and sizes, and 360 to test on, as scanned.

    `size` is the side of the image in pixels. White ink on black, as the scans are.
    """

    category: ClassVar[str] = "ocr"

    size: int = 28
    variants: int = 8
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.size < 8 or self.variants < 1:
            raise TaskError(f"digits: size={self.size} must be at least 8 and variants={self.variants} at least 1")

    def __len__(self) -> int:
        return len(_split(self.split)) * (self.variants if self.split == "train" else 1)

    def question(self, index: int) -> str:
        return "digit?"

    def image(self, index: int) -> np.ndarray:
        scan = _scans()[0][self._scan(index)]
        scale, shift_x, shift_y = 1.0, 0.0, 0.0
        if index >= len(_split(self.split)):  # the first round is as scanned
            generator = self.generator(index, self.seed)
            scale = generator.uniform(0.75, 1.05)
            shift_x, shift_y = generator.uniform(-0.8, 0.8, 2)
        # A pixel (x, y) of the image comes from the place (step * x + left, step * y + top) of the padded scan.
        step = 8 / (self.size * scale)
        left, top = PAD + 4 - 4 / scale + shift_x, PAD + 4 - 4 / scale + shift_y
        drawn = Image.fromarray(scan).transform(
            (self.size, self.size), Image.Transform.AFFINE, (step, 0, left, 0, step, top), Image.Resampling.BICUBIC
        )
        grey = np.clip(np.asarray(drawn) * (255 / 16), 0, 255).round().astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)

    def answer(self, index: int) -> str:
        return str(_scans()[1][self._scan(index)])

    def _scan(self, index: int) -> int:
        places = _split(self.split)
        return places[self.check_index(index) % len(places)]


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """float32 [1797, 12, 12] of 0..16, padded, and the digits [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError("digits needs scikit-learn: pip install 'k25-jax[demo]'") from error
    data = load_digits()
    return np.pad(data.images.astype(np.float32), ((0, 0), (PAD, PAD), (PAD, PAD))), data.target


@functools.cache
def _split(split: str) -> np.ndarray:
    """Indices of the split's scans, mixed. Every fifth scan of a digit is a test scan, after one fixed shuffle."""
    generator = np.random.default_rng(0)
    labels = _scans()[1]
    order = generator.permutation(len(labels))
    by_digit = order[np.argsort(labels[order], kind="stable")]
    test = np.arange(len(labels)) % 5 == 0
    return generator.permutation(by_digit[test if split == "test" else ~test])
