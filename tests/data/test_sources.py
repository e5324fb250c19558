import base64
import io
import json
import os

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.records import DataError, Record, RecordError
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.vision.image import preprocess
from k25_jax.vision.patchpack import first_fit
from k25_jax.vision.video import chunks, load_video

MODEL = preset("tiny")
DATA = DataConfig(packs=2, pack_patches=64, seq_len=256)
TOKENIZER = load_tokenizer()


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def save_gif(path, frames=6):
    """Half a second a frame."""
    images = [Image.fromarray(np.full((32, 48, 3), 40 * i % 256, np.uint8)) for i in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=500)


def jsonl(folder, *lines):
    """A JSONL source; bytes are written as they are, anything else as JSON."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "data.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return open_source(SourceConfig(str(folder / "data.jsonl")))


def example_of(record, data=DATA):
    return prepare(record, TOKENIZER, data, MODEL)


def ids(template):
    """Tokens of a string in which «name» stands for a special token."""
    out = []
    for i, part in enumerate(template.replace("»", "«").split("«")):
        out += [BYTE_SPECIAL[part]] if i % 2 else list(part.encode())
    return out


def media(kind, tokens):
    return f"«<|media_begin|>»{kind}«<|media_content|>»" + "«<|media_pad|>»" * tokens + "«<|media_end|>»"


# --------------------------------------------------------------------------------------------------------------- folder
def test_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "notes.md").write_text("# Notes")
    (tmp_path / "code.py").write_text("x = 1")
    (tmp_path / "table.csv").write_text("1,2")
    (tmp_path / "alone.png").write_bytes(png(picture()))
    (tmp_path / "a.PNG").write_bytes(png(picture(seed=1)))
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b" / "c.jpg").write_bytes(png(picture(seed=2)))
    (tmp_path / "b" / "c.json").write_text('{"caption": "a dog"}')
    (tmp_path / "b" / "c.txt").write_text("not used")
    (tmp_path / "b" / "d.png").write_bytes(png(picture(seed=3)))
    parts = {"parts": [{"text": "see"}, {"image": "d.png"}, {"text": "end"}]}
    (tmp_path / "b" / "d.json").write_text(json.dumps(parts))
    source = open_source(SourceConfig(str(tmp_path)))
    assert [os.path.relpath(source[i].name, tmp_path) for i in range(len(source))] == [
        *("a.PNG", "code.py", "notes.md", "b/c.jpg", "b/d.png"),
    ]
    assert source.left_out == {"no caption": 1, "file of an operating system": 1, "other file": 1}
    image = "«[BOS]»" + media("image", 6) + "{}«[EOS]»"
    assert example_of(source[0]).tokens.tolist() == ids(image.format("a cat"))
    assert example_of(source[1]).tokens.tolist() == ids("«[BOS]»x = 1«[EOS]»")
    assert example_of(source[3]).tokens.tolist() == ids(image.format("a dog"))
    last = example_of(source[4])
    assert last.tokens.tolist() == ids("«[BOS]»see" + media("image", 6) + "end«[EOS]»")
    assert np.array_equal(last.clips[0].patches, preprocess(picture(seed=3), MODEL.vision).patches)


def test_links_are_followed_within_the_folder_only(tmp_path):
    (tmp_path / "data" / "blobs").mkdir(parents=True)
    (tmp_path / "data" / "blobs" / "0").write_bytes(png(picture()))
    (tmp_path / "data" / "snapshot").mkdir()
    (tmp_path / "data" / "snapshot" / "x.png").symlink_to("../blobs/0")
    (tmp_path / "data" / "snapshot" / "x.txt").write_text("linked")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for whole in (tmp_path / "data", tmp_path / "link"):
        source = open_source(SourceConfig(str(whole)))
        assert len(source) == 1 and len(example_of(source[0]).clips) == 1
    (record,) = open_source(SourceConfig(str(tmp_path / "data" / "snapshot")))
    assert record.data.reason == "path" and "x.png is a link that leads out of" in str(record.data)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.txt", b"\xff\xfe bad", "utf-8"),
        ("a.json", b"{", "json"),
        ("a.json", b"[1]", "form"),
        ("a.json", b'{"caption": 3}', "form"),
        ("a.json", b'{"parts": [{"image": "../a.png"}]}', "path"),
    ],
)
def test_bad_captions(tmp_path, name, content, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").write_bytes(png(picture()))
    (tmp_path / "folder" / "a.png").write_bytes(png(picture()))
    (tmp_path / "folder" / name).write_bytes(content)
    with pytest.raises(RecordError) as error:
        example_of(open_source(SourceConfig(str(tmp_path / "folder")))[0])
    assert error.value.reason == reason


def test_file_that_vanishes_is_a_bad_record(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    source = open_source(SourceConfig(str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(RecordError, match="a.txt: cannot be read") as error:
        example_of(source[0])
    assert error.value.reason == "file"


def test_pipes_and_devices_in_a_folder_are_bad_records_and_not_a_hang(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "d.png")
    (tmp_path / "d.txt").write_text("a picture")
    source = open_source(SourceConfig(str(tmp_path)))
    reasons = []
    for i in range(4):
        with pytest.raises(RecordError) as error:
            example_of(source[i])
        reasons.append(error.value.reason)
    assert sorted(reasons) == ["file", "file", "missing", "path"]


# ---------------------------------------------------------------------------------------------------------------- jsonl
def test_jsonl_lines_against_split(tmp_path):
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"text": "two"}\r',
        b"  ",
        b'{"text": "\xc3\xa9"}',
        b"x",
        b"",
        b'{"text": "end"}',
    ]
    wanted = {i + 1: line for i, line in enumerate(lines) if line.strip()}
    for tail in (b"", b"\n", b"\n\n"):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(lines) + tail)
        source = open_source(SourceConfig(str(path)))
        assert [source[i].name for i in range(len(source))] == [f"{path}:{number}" for number in wanted]
        texts = [source[i].data["text"] for i in (0, 1, 2, 4)]
        assert texts == ["one", "two", "é", "end"]
        assert source[3].data.reason == "json"


def test_jsonl_larger_than_a_block(tmp_path):
    generator = np.random.default_rng(0)
    records = [{"text": "x" * int(n), "n": i} for i, n in enumerate(generator.integers(0, 200_000, 250))]
    source = jsonl(tmp_path, *records)
    assert (tmp_path / "data.jsonl").stat().st_size > 2**24
    assert len(source) == 250
    for i in generator.permutation(250)[:50]:
        assert source[i].data == records[i]


def test_jsonl_with_a_byte_order_mark(tmp_path):
    source = jsonl(tmp_path, b'\xef\xbb\xbf{"text": "x"}')
    assert source[0].data == {"text": "x"}


def test_text_record(tmp_path):
    example = example_of(jsonl(tmp_path, {"text": "hé<|im_end|>"})[0])
    assert example.tokens.tolist() == [256, *"hé<|im_end|>".encode(), 257]
    assert example.loss_weights.tolist() == [1.0] * len(example.tokens)
    assert example.tokens.dtype == np.int32 and example.loss_weights.dtype == np.float32


def test_parts_record(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(picture()))
    parts = [{"text": "see "}, {"image": "images/a.png"}, {"type": "text", "text": " now"}]
    example = example_of(jsonl(tmp_path, {"parts": parts})[0])
    assert example.tokens.tolist() == ids("«[BOS]»see " + media("image", 6) + " now«[EOS]»")
    text = [0 <= token < 258 for token in example.tokens]
    text[6:11] = [False] * 5  # the word image, inside the markers
    assert example.loss_weights.tolist() == [float(is_text) for is_text in text]
    assert np.array_equal(example.clips[0].patches, preprocess(picture(), MODEL.vision).patches)


def test_messages_record(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture()))
    coded = base64.b64encode(png(picture(seed=5))).decode()
    content = [{"type": "image", "image": "a.png"}, {"type": "image", "image_base64": coded}, {"text": "which?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "the second"}]
    example = example_of(jsonl(tmp_path, {"messages": messages, "text": None})[0])
    images = media("image", 6) * 2
    assert example.tokens.tolist() == ids(
        f"«<|im_user|>»user«<|im_middle|>»{images}which?«<|im_end|>»"
        "«<|im_assistant|>»assistant«<|im_middle|>»the second«<|im_end|>»"
    )
    assert example.loss_weights.sum() == len("the second") + 1 and example.loss_weights[-11:].all()
    for clip, seed in zip(example.clips, (0, 5), strict=True):
        assert np.array_equal(clip.patches, preprocess(picture(seed=seed), MODEL.vision).patches)


def test_video_record(tmp_path):
    save_gif(tmp_path / "v.gif")
    data = DataConfig(packs=2, pack_patches=256, seq_len=256, video_fps=2.0)
    example = example_of(jsonl(tmp_path, {"parts": [{"video": "v.gif"}, {"text": "grey"}]})[0], data)
    times = "00:00:00.000" + media("video", 4), "00:00:02.000" + media("video", 4)
    assert example.tokens.tolist() == ids("«[BOS]»" + "".join(times) + "grey«[EOS]»")
    assert example.loss_weights.sum() == 1 + len("grey") + 1
    frames, stamps = load_video(tmp_path / "v.gif", fps=2.0, config=MODEL.vision)
    for clip, (_, wanted) in zip(example.clips, chunks(frames, stamps, MODEL.vision), strict=True):
        assert clip.grid == wanted.grid and np.array_equal(clip.patches, wanted.patches)


def test_media_are_scaled_to_the_packs(tmp_path):
    for name, size in (("wide", (30, 900)), ("square", (403, 403)), ("high", (3000, 29))):
        (tmp_path / f"{name}.png").write_bytes(png(picture(*size)))
    save_gif(tmp_path / "v.gif", frames=40)
    names = ["wide.png", "square.png", "high.png"]
    source = jsonl(tmp_path, *({"parts": [{"image": name}, {"text": "x"}]} for name in names))
    for patches in (32, 36, 64, 100):
        data = DataConfig(packs=1, pack_patches=patches)
        for i in range(3):
            (clip,) = example_of(source[i], data).clips
            assert 4 <= len(clip.patches) <= patches
    source = jsonl(tmp_path, {"parts": [{"video": "v.gif"}, {"text": "x"}]})
    for packs, patches, clips in ((1, 16, 1), (3, 16, 3), (1, 40, 1), (2, 96, 2)):
        example = example_of(source[0], DataConfig(packs=packs, pack_patches=patches, video_fps=10.0))
        assert len(example.clips) == clips
        sizes = [len(clip.patches) for clip in example.clips]
        assert len(first_fit(sizes, packs, patches)) == len(sizes)
        assert all(clip.grid[0] == 4 for clip in example.clips[:-1])


def test_media_need_packs(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture()))
    source = jsonl(tmp_path, {"parts": [{"text": "x"}, {"image": "a.png"}]}, {"text": "x"})
    with pytest.raises(RecordError, match="data.packs is 0") as error:
        example_of(source[0], DataConfig(packs=0))
    assert error.value.reason == "media"
    assert len(example_of(source[1], DataConfig(packs=0))) == 3


# -------------------------------------------------------------------------------------------------------------- hostile
DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
HOSTILE = [
    (b'{"text": "\xff\xfe"}', "utf-8"),
    (b"\x00\x01\x02\x03", "json"),
    (b'{"text": "x"', "json"),
    (b'{"text": "x"} {"text": "y"}', "json"),
    (b'{"text": ' + b"9" * 10_000 + b"}", "json"),
    (DEEP, "json"),
    (b'["text"]', "form"),
    (b'"text"', "form"),
    (b"null", "form"),
    (b"12345678901234567890", "form"),
    ({}, "form"),
    ({"txt": "x"}, "form"),
    ({"text": "x", "parts": []}, "form"),
    ({"text": None}, "form"),
    ({"text": 123456789012345678901234567890}, "form"),
    ({"text": ["x"]}, "form"),
    ({"text": {"a": 1}}, "form"),
    ({"text": ""}, "empty"),
    ({"text": " \n "}, "empty"),
    ({"parts": "x"}, "form"),
    ({"parts": {"text": "x"}}, "form"),
    ({"parts": ["x"]}, "form"),
    ({"parts": [None]}, "empty"),
    ({"parts": []}, "empty"),
    ({"parts": [{"image": "a.png"}]}, "empty"),
    ({"parts": [{"text": "x"}, {"image": 5}]}, "form"),
    ({"parts": [{"text": "x"}, {"image": ["a.png"]}]}, "form"),
    ({"parts": [{"text": "x", "image": "a.png"}]}, "form"),
    ({"parts": [{"text": "x"}, {"image": "none.png"}]}, "missing"),
    ({"parts": [{"text": "x"}, {"image": "."}]}, "missing"),
    ({"parts": [{"text": "x"}, {"image": ""}]}, "missing"),
    ({"parts": [{"text": "x"}, {"image": "../secret.png"}]}, "path"),
    ({"parts": [{"text": "x"}, {"image": "sub/../../secret.png"}]}, "path"),
    ({"parts": [{"text": "x"}, {"image": "link.png"}]}, "path"),
    ({"parts": [{"text": "x"}, {"image": "loop"}]}, "path"),
    ({"parts": [{"text": "x"}, {"image": "/etc/passwd"}]}, "path"),
    ({"parts": [{"text": "x"}, {"video": "../secret.png"}]}, "path"),
    ({"parts": [{"text": "x"}, {"image": "a\0.png"}]}, "path"),
    ({"parts": [{"text": "x"}, {"image": "a" * 5000}]}, "path"),
    ({"parts": [{"text": "x"}, {"image": "broken.png"}]}, "image"),
    ({"parts": [{"text": "x"}, {"image": "empty.png"}]}, "image"),
    ({"parts": [{"text": "x"}, {"image": "data.jsonl"}]}, "image"),
    ({"parts": [{"text": "x"}, {"video": "a.png"}]}, "video"),
    ({"parts": [{"text": "x"}, {"image_base64": "!!!"}]}, "base64"),
    ({"parts": [{"text": "x"}, {"image_base64": 7}]}, "base64"),
    ({"parts": [{"text": "x"}, {"image_base64": "aGVsbG8="}]}, "image"),
    ({"parts": [{"text": "x"}, {"video_base64": "aGVsbG8="}]}, "video"),
    ({"messages": []}, "form"),
    ({"messages": {"role": "user"}}, "form"),
    ({"messages": [5]}, "form"),
    ({"messages": [{"role": "root", "content": "x"}]}, "form"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "../secret.png"}]}]}, "path"),
]


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(png(picture()))
    (inside / "a.png").write_bytes(png(picture()))
    (inside / "broken.png").write_bytes(png(picture())[:200])
    (inside / "empty.png").write_bytes(b"")
    (inside / "sub").mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "loop").symlink_to(inside / "loop")
    return inside


def test_hostile_records_are_errors_with_a_reason(folder):
    source = jsonl(folder, *(line for line, _ in HOSTILE), {"text": "good"})
    assert len(source) == len(HOSTILE) + 1
    for i, (line, reason) in enumerate(HOSTILE):
        record = source[i]
        assert record.name.endswith(f"data.jsonl:{i + 1}")
        with pytest.raises(RecordError) as error:
            example_of(record)
        assert error.value.reason == reason, (line[:80] if isinstance(line, bytes) else line, error.value)
        assert len(str(error.value)) < 1000
    assert example_of(source[len(HOSTILE)]).tokens.tolist() == [256, *b"good", 257]


def test_escape_is_named(folder):
    source = jsonl(folder, {"parts": [{"text": "x"}, {"image": "../secret.png"}]})
    with pytest.raises(RecordError, match=r"'\.\./secret\.png' leads out of .*inside"):
        example_of(source[0])


def test_paths_need_a_folder():
    record = Record("r", {"parts": [{"text": "x"}, {"image": "a.png"}]})
    with pytest.raises(RecordError, match="no folder for media"):
        example_of(record)


def test_oversized_record(tmp_path):
    with open(tmp_path / "data.jsonl", "wb") as file:  # a sparse file
        file.write(b'{"text": "x"}\n')
        file.truncate(2**28 + 100)
    source = open_source(SourceConfig(str(tmp_path / "data.jsonl")))
    assert len(source) == 2 and source[0].data == {"text": "x"}
    assert source[1].data.reason == "too large"


# --------------------------------------------------------------------------------------------------- arrayrecord, tasks
def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else json.dumps(record).encode())
    writer.close()


def test_array_record_shards(tmp_path):
    coded = base64.b64encode(png(picture())).decode()
    (tmp_path / "a.png").write_bytes(png(picture(seed=4)))
    write_array_record(tmp_path / "x.array_record-00000-of-00002", [{"text": "one"}, b"not json"])
    second = [{"parts": [{"image_base64": coded}, {"image": "a.png"}, {"text": "two"}]}, {"text": "three"}]
    write_array_record(tmp_path / "x.array_record-00001-of-00002", second)
    (tmp_path / "readme.md").write_text("not a record")
    for path in (tmp_path, tmp_path / "x.array_record-*"):
        source = open_source(SourceConfig(str(path), kind="arrayrecord"))
        assert len(source) == 4
        assert source[0].data == {"text": "one"} and source[3].data == {"text": "three"}
        assert source[1].data.reason == "json"
        clips = example_of(source[2]).clips
        for clip, seed in zip(clips, (0, 4), strict=True):
            assert np.array_equal(clip.patches, preprocess(picture(seed=seed), MODEL.vision).patches)
    assert type(open_source(SourceConfig(str(tmp_path)))) is type(source)  # found out by itself


def test_damaged_array_record(tmp_path):
    path = tmp_path / "x.array_record"
    path.write_bytes(b"\0" * 5000)
    with pytest.raises(DataError, match="x.array_record"):
        open_source(SourceConfig(str(path)))


def test_task():
    pytest.importorskip("sklearn")  # its task shows digits that come with scikit-learn
    source = open_source(SourceConfig("digits:train"))
    record = source[3]
    assert record.name == "digits:train[3]"
    (image, _), answer = record.data["messages"][0]["content"], record.data["messages"][1]["content"]
    example = example_of(record)
    assert np.array_equal(example.clips[0].patches, preprocess(image["image"], MODEL.vision).patches)
    taught = example.tokens[example.loss_weights > 0]
    assert TOKENIZER.decode(taught) == answer + "<|im_end|>"


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("kind", ["auto", "folder", "jsonl", "arrayrecord"])
def test_missing_path(tmp_path, kind):
    for path in (str(tmp_path / "missing"), str(tmp_path / "missing.jsonl")):
        with pytest.raises(DataError, match="missing"):
            open_source(SourceConfig(path, kind=kind))


def test_empty_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no record"):
        open_source(SourceConfig(str(tmp_path / "empty")))
    (tmp_path / "empty" / "x.png").write_bytes(png(picture()))
    with pytest.raises(DataError, match="no caption"):
        open_source(SourceConfig(str(tmp_path / "empty")))
    for content in (b"", b"\n\n\n"):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="x.jsonl holds no record"):
            open_source(SourceConfig(str(tmp_path / "x.jsonl")))


def test_wrong_kinds(tmp_path):
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(DataError, match="cannot tell what .*x.bin is"):
        open_source(SourceConfig(str(tmp_path / "x.bin")))
    for kind, path in (("folder", tmp_path / "x.bin"), ("jsonl", tmp_path), ("arrayrecord", tmp_path)):
        with pytest.raises(DataError, match="kind"):
            open_source(SourceConfig(str(path), kind=kind))
