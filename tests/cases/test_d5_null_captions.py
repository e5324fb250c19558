"""A null in the JSON beside a text does not hide it."""

import io
import json
import tarfile

import pytest
from PIL import Image

from k25_jax.config import SourceConfig
from k25_jax.data.sources import open_source


def png():
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    return file.getvalue()


def read(kind, tmp_path, record, text=b"from the text", ending="txt"):
    """The one record of a picture with JSON and text beside it."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.png", png()), ("a.json", json.dumps(record).encode()), (f"a.{ending}", text)):
            (tmp_path / "folder").mkdir(exist_ok=True)
            (tmp_path / "folder" / name).write_bytes(data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(SourceConfig(str(tmp_path / ("a.tar" if kind == "tar" else "folder"))))
    assert len(source) == 1
    return {key: value for key, value in source[0].data.items() if value is not None and key != "image"}


BOTH = pytest.mark.parametrize("kind", ["tar", "folder"])
DOWNLOADED = {
    "caption": None,
    "url": "http://x/a.jpg",
    "key": "000",
    "status": "success",
    "error_message": None,
    "exif": "{}",
}


@BOTH
@pytest.mark.parametrize("record", [{"caption": None}, {"text": None}, {"text": None, "parts": None}, {"messages": None},
                                    {"ocr": None}, {"image": None, "caption": None}, {}, DOWNLOADED])  # fmt: skip
def test_null_counts_as_absent(tmp_path, kind, record):
    rest = {key: value for key, value in record.items() if value is not None}
    assert read(kind, tmp_path, record) == {"text": "from the text", **rest}
    assert read(kind, tmp_path, record, ending="caption") == {"text": "from the text", **rest}


@BOTH
@pytest.mark.parametrize("record", [{"caption": "said"}, {"text": "said"}, {"ocr": "said", "caption": None},
                                    {"parts": [{"text": "said"}], "text": None}])  # fmt: skip
def test_what_json_says_goes_first(tmp_path, kind, record):
    assert read(kind, tmp_path, record) == {key: value for key, value in record.items() if value is not None}


@BOTH
@pytest.mark.parametrize("key", ["boxes", "elements"])
def test_a_text_beside_boxes_is_their_caption(tmp_path, kind, key):
    boxes = [{"label": "x", "type": "x", "box": [1, 2, 3, 4]}]
    assert read(kind, tmp_path, {key: boxes, "caption": None}) == {key: boxes, "caption": "from the text"}
