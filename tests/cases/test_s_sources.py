"""What a newcomer gives as a source is read, or the answer says what to do on the command line."""

import io
import json
import sys

import av
import numpy as np
import pytest
from PIL import Image

from k25_jax.cli import main
from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.records import DataError
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import load_tokenizer

MODEL, TOKENIZER, DATA = preset("tiny"), load_tokenizer(), DataConfig(packs=2, pack_patches=256, seq_len=256)


def png(size=(60, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def mp4():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(6):
            pixels = np.full((32, 48, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def read(path):
    """The examples of a source: text without media tokens, and how many clips."""
    source = open_source(SourceConfig(str(path)))
    found = [prepare(source[i], TOKENIZER, DATA, MODEL) for i in range(len(source))]
    return [(TOKENIZER.decode(example.tokens), len(example.clips)) for example in found]


def told(path) -> str:
    """The error, which must help somebody who has the command line alone."""
    with pytest.raises(DataError) as error:
        open_source(SourceConfig(str(path)))
    message = str(error.value)
    assert "set kind" not in message and "remove it" not in message and "{}" not in message and "\n" not in message
    assert message.count(str(path)) <= 2
    return message


# ------------------------------------------------------------------------------------------------------------- one file
@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.md", "a.py"])
def test_a_text(tmp_path, name):
    (tmp_path / name).write_text("once upon a time")
    (tmp_path / "other.txt").write_text("not given")
    (tmp_path / "other.png").write_bytes(png())
    assert read(tmp_path / name) == [("[BOS]once upon a time[EOS]", 0)]


@pytest.mark.parametrize("name, data", [("a.png", png()), ("A.PNG", png()), ("a.mp4", mp4()), ("a.MP4", mp4())])
@pytest.mark.parametrize("side", [".txt", ".json"])
def test_a_picture_or_video_with_its_caption(tmp_path, name, data, side):
    (tmp_path / name).write_bytes(data)
    assert "has no caption; write one beside it, " in told(tmp_path / name)
    caption = tmp_path / f"{name[0]}{side}"
    caption.write_text("a red square" if side == ".txt" else '{"caption": "a red square"}')
    (tmp_path / "ab.png").write_bytes(png())
    for given in (tmp_path / name, caption) if side == ".txt" else (tmp_path / name,):
        ((text, clips),) = read(given)
        assert "a red square" in text and clips >= 1


def test_an_image_of_a_list_as_llava_writes_it(tmp_path):
    """Its pictures are found below the file's folder."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png())
    messages = [{"role": "user", "content": [{"type": "image", "image": "images/1.png"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "red"}]  # fmt: skip
    records = [{"id": "1", "messages": messages}, {"id": "2", "image": "images/1.png", "text": "a red square"}]
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    records.append({"id": "3", "image": "images/1.png", "conversations": turns})
    for indent in (None, 2):
        (tmp_path / "llava.json").write_text(json.dumps(records, indent=indent))
        assert [clips for _, clips in read(tmp_path / "llava.json")] == [1, 1, 1]
    assert "red" in read(tmp_path / "llava.json")[2][0]


# ---------------------------------------------------------------------------------------------------------- image folder
@pytest.mark.parametrize("table", ["metadata.jsonl", "train/metadata.jsonl"])
@pytest.mark.parametrize("key", ["text", "caption"])
def test_an_image_folder(tmp_path, table, key):
    file = tmp_path / table
    file.parent.mkdir(exist_ok=True)
    for name in ("1.png", "2.PNG", "not_named.png"):
        (file.parent / name).write_bytes(png())
    (file.parent / "v.mp4").write_bytes(mp4())
    names = ["1.png", "2.PNG", "v.mp4", "gone.png", "x.heic", "../1.png"]
    file.write_text("".join(json.dumps({"file_name": name, key: f"of {name}", "id": 5}) + "\n" for name in names))
    for given in (tmp_path, file):
        source = open_source(SourceConfig(str(given)))
        records = [source[i] for i in range(len(source))]
        assert len(records) == len(names)
        for record, name in zip(records[:3], names, strict=False):
            example = prepare(record, TOKENIZER, DATA, MODEL)
            assert f"of {name}" in TOKENIZER.decode(example.tokens) and len(example.clips) >= 1
        for record, reason in zip(records[3:], ("missing", "unknown medium", "path"), strict=True):
            with pytest.raises(ValueError) as error:
                prepare(record, TOKENIZER, DATA, MODEL)
            assert error.value.reason == reason


def test_pictures_that_metadata_does_not_name_are_counted(tmp_path):
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n')
    assert open_source(SourceConfig(str(tmp_path))).left_out == {"medium not in metadata.jsonl": 2}


def test_a_file_name_of_a_text_is_no_picture(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "main.py", "text": "x = 1"}\n')
    assert read(tmp_path) == [("[BOS]x = 1[EOS]", 0)]


# --------------------------------------------------------------------------------------------------------------- advice
@pytest.mark.parametrize("name, advice", [
    ("a.jsonl.gz", "decompress it"), ("a.json.zst", "decompress it"), ("a.txt.gz", "decompress it"), ("a.zip", "unpack it"),
    ("a.csv", "JSONL or Parquet"), ("a.XLSX", "JSONL or Parquet"), ("a.arrow", "Parquet or JSONL"), ("a.pdf", ".txt file"),
    ("a.heic", "convert it to PNG"), ("a.wav", "convert it"), ("a.xyz", "give a folder of texts"), ("a", "a task such as"),
])  # fmt: skip
def test_what_is_not_read(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"x" * 100)
    assert "cannot tell what" in told(tmp_path / name) and advice in told(tmp_path / name)


def test_empty_folders_say_what_was_left_out(tmp_path):
    assert "holds no record (nothing was left out); a picture or video needs its caption" in told(tmp_path)
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.heic").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert "(left out: 1 x file of an operating system, 1 x no caption, 1 x other file)" in told(tmp_path)
    (tmp_path / "table.json").write_text("[]")
    assert f"to read table.json and the like, give {tmp_path / 'table.json'}" in told(tmp_path)


def test_what_is_not_there(tmp_path):
    for name in ("no", "no.jsonl", "no.txt", "no.mp4", "no.json", "*.jsonl", "*", "no/*.tar"):
        message = told(tmp_path / name)
        assert "there is no" in message and "check the path" in message
    assert "download it" in told("https://example.org/a.xyz") and "download it" in told("hf://datasets/a/b")


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "bad.xyz").write_text("text")
    assert main(["data", "check", f"--source={tmp_path / 'a.txt'}", "--workers=1"]) == 0
    with pytest.raises(SystemExit):
        sys.exit(main(["data", "check", f"--source={tmp_path / 'bad.xyz'}", "--workers=1"]))
    assert "cannot tell what" in capsys.readouterr().err
