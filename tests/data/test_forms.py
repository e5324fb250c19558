"""Short forms of records: each is the same document as the parts that it stands for."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from k25_jax.config import DataConfig, preset
from k25_jax.data.forms import box_text, form_of, prepare
from k25_jax.data.records import Record, RecordError
from k25_jax.text.tokenizer import load_tokenizer

MODEL, TOKENIZER = preset("tiny"), load_tokenizer()
DATA = DataConfig(packs=2, pack_patches=256, seq_len=512)


def png(width=200, height=100, orientation=0) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def gif() -> bytes:
    frames, file = [Image.new("RGB", (48, 32), (40 * i, 0, 0)) for i in range(4)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    return file.getvalue()


def example(data, root=None):
    return prepare(Record("r", data, root), TOKENIZER, DATA, MODEL)


PNG, GIF = png(), gif()
CODED = base64.b64encode(PNG).decode()
FORMS = [
    ("text", {"text": "x"}, [{"text": "x"}]),
    ("pair", {"image": PNG, "caption": "a cat"}, [{"image": PNG}, {"text": "a cat"}]),
    ("pair", {"image_base64": CODED, "text": "a cat", "caption": None}, [{"image": PNG}, {"text": "a cat"}]),
    ("pair", {"image": {"bytes": PNG, "path": "x"}, "text": "a"}, [{"image": PNG}, {"text": "a"}]),
    ("video-text", {"video": GIF, "caption": "red", "url": 3}, [{"video": GIF}, {"text": "red"}]),
    ("ocr", {"image": PNG, "ocr": "STOP"}, [{"image": PNG}, {"text": "STOP"}]),
    (
        "grounding",
        {
            "image": PNG,
            "boxes": [{"label": "cat", "box": [20, 10, 100, 50]}, {"label": " a\ndog", "box": (0, 0, 200, 100)}],
        },
        [{"image": PNG}, {"text": "cat<box>100,100,500,500</box>\na dog<box>0,0,1000,1000</box>"}],
    ),
    (
        "grounding",
        {"image": PNG, "caption": "pets", "boxes": [{"label": "cat", "box": np.array([-0.5, 0, 200.5, 99])}]},
        [{"image": PNG}, {"text": "pets\ncat<box>0,0,1000,990</box>"}],
    ),
    (
        "screen",
        {
            "image": PNG,
            "elements": [
                {"type": "button", "text": "OK", "box": [1, 1, 3, 3]},
                {"type": "icon", "box": [0, 0, 50, 50]},
            ],
        },
        [{"image": PNG}, {"text": "button OK<box>5,10,15,30</box>\nicon<box>0,0,250,500</box>"}],
    ),
]


@pytest.mark.parametrize("form, record, parts", FORMS)
def test_a_short_form_is_its_parts(form, record, parts):
    assert form_of(record) == form
    short, long = example(record), example({"parts": parts})
    assert short.tokens.tolist() == long.tokens.tolist()
    assert short.loss_weights.tolist() == long.loss_weights.tolist()
    for mine, other in zip(short.clips, long.clips, strict=True):
        assert mine.grid == other.grid and np.array_equal(mine.patches, other.patches)


def test_boxes_count_pixels_of_the_picture_as_it_is_seen():
    """Stored 200 x 100, shown 100 x 200: a box that fits the one only is refused for the other."""
    boxes = {"boxes": [{"label": "x", "box": [0, 100, 50, 200]}]}
    turned = example({"image": png(orientation=6), **boxes})
    assert "<box>0,500,500,1000</box>" in TOKENIZER.decode(turned.tokens)
    with pytest.raises(RecordError, match="outside the picture of 200 x 100"):
        example({"image": png(), **boxes})


def test_box_text_against_fractions():
    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = rng.integers(1, 5000, 2).tolist()
        x1, x2 = sorted(rng.uniform(0, width, 2))
        y1, y2 = sorted(rng.uniform(0, height, 2))
        numbers = json.loads(f"[{box_text([x1, y1, x2, y2], height, width)[5:-6]}]")
        for number, value, side in zip(numbers, (x1, y1, x2, y2), (width, height, width, height), strict=True):
            assert 0 <= number <= 1000 and abs(number - 1000 * value / side) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "box",
    [
        *(None, 5, "1,2,3,4", {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2], [3, 4]], ["1", "2", "3", "4"]),
        *([1, 2, 3, None], [True, False, 3, 4], [math.nan, 1, 2, 3], [0, 0, math.inf, 5], [0, 0, 10**400, 5]),
        *([5, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [5, 9, 9, 5], [-3, 0, 5, 5], [0, -1.5, 5, 5], [0, 0, 202, 5]),
        *([0, 0, 5, 101.5], [300, 300, 400, 400], [1e308, 0, 1e309, 1], [0, 0, 1e-320, 1e400]),
    ],
)
def test_absurd_boxes(box):
    for record in ({"boxes": [{"label": "x", "box": box}]}, {"elements": [{"type": "x", "box": box}]}):
        with pytest.raises(RecordError) as error:
            example({"image": PNG, **record})
        assert error.value.reason == "box" and "[0]" in str(error.value)


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"caption": "x"}, "form"),
        ({"ocr": "x"}, "form"),
        ({"boxes": [{"label": "x", "box": [0, 0, 1, 1]}]}, "form"),
        ({"image": PNG}, "form"),
        ({"image": PNG, "text": "x", "caption": "y"}, "form"),
        ({"image": PNG, "video": GIF, "text": "x"}, "form"),
        ({"image": PNG, "parts": [{"text": "x"}]}, "form"),
        ({"video": GIF, "ocr": "x"}, "form"),
        ({"video": GIF, "boxes": []}, "form"),
        ({"image": PNG, "caption": 3}, "form"),
        ({"image": PNG, "ocr": ["x"]}, "form"),
        ({"image": PNG, "ocr": " "}, "empty"),
        ({"image": PNG, "boxes": []}, "empty"),
        ({"image": PNG, "boxes": {}}, "form"),
        ({"image": PNG, "boxes": ["x"]}, "form"),
        ({"image": PNG, "boxes": [{"box": [0, 0, 1, 1]}]}, "form"),
        ({"image": PNG, "boxes": [{"label": 5, "box": [0, 0, 1, 1]}]}, "form"),
        ({"image": PNG, "boxes": [{"label": "a<box>1", "box": [0, 0, 1, 1]}]}, "box"),
        ({"image": PNG, "caption": 5, "boxes": [{"label": "x", "box": [0, 0, 1, 1]}]}, "form"),
        ({"image": PNG, "elements": [{"type": "x", "text": 5, "box": [0, 0, 1, 1]}]}, "form"),
        ({"image": {"bytes": None, "path": None}, "text": "x"}, "form"),
        ({"image": 5, "boxes": [{"label": "x", "box": [0, 0, 1, 1]}]}, "form"),
        ({"image": "a.png", "text": "x"}, "path"),
        ({"image": {"bytes": None, "path": "../a.png"}, "text": "x"}, "path"),
        ({"image": b"", "text": "x"}, "image"),
        ({"image": PNG[:50], "boxes": [{"label": "x", "box": [0, 0, 1, 1]}]}, "image"),
    ],
)
def test_bad_records_of_the_short_forms(record, reason):
    with pytest.raises(RecordError) as error:
        example(record)
    assert error.value.reason == reason, error.value
