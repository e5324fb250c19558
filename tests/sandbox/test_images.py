"""Images are decoded in a process that can be ended."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from k25_jax.sandbox.images import MOST_PIXELS, ImageCheck


@pytest.fixture
def check():
    check = ImageCheck()
    yield check
    check.close()


def encoded(kind, size=(30, 20), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def soon(seconds=60.0):
    return time.monotonic() + seconds


def test_images_one_after_the_other(check):
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF") * 2:
        assert check.problem(encoded(kind), soon()) == ""
    assert check.problem(b"", soon()) == "it is empty"
    assert "cannot identify image file" in check.problem(b"not an image", soon())
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(noise, "PNG")
    assert check.problem(noise.getvalue(), soon()) == "" and check.problem(noise.getvalue()[:4000], soon()) != ""
    assert f"5000 x 5000 pixels are more than {MOST_PIXELS}" in check.problem(encoded("PNG", (5000, 5000), "1"), soon())
    assert check.problem(encoded("PNG", (4000, 4000)), soon()) == ""  # as many as may be, and larger than a pipe


def test_one_that_takes_too_long_ends_the_process(check):
    image = encoded("PNG", (4000, 4000))
    assert check.problem(image, soon()) == ""
    process = check._process
    assert check.problem(image, soon(-1)) == "its decoding took too long or too much memory"
    assert process.poll() is not None
    assert check.problem(image, soon()) == ""  # in another one
    check._process.kill()
    check._process.wait()
    assert check.problem(image, soon()) == "its decoding took too long or too much memory"
    assert check.problem(image, soon()) == ""
