"""Media under another name are attached where the meaning is clear, else the record is bad and the field is named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from given import GIF, OTHER, PNG, coded, example, parquet_rows, prepared, refusal, same, text, write_media

from k25_jax.config import SourceConfig
from k25_jax.data.normalise import canonical
from k25_jax.data.records import Record
from k25_jax.data.sources import open_source

STRUCT = {"bytes": PNG, "path": "a.png"}
URL = f"data:image/png;base64,{coded(PNG)}"
PAIR, FILM = {"image": PNG, "text": "seen"}, {"video": GIF, "text": "seen"}
ASK = {"role": "user", "content": [{"image": PNG}, {"text": "which?"}]}
TALK = {"messages": [ASK, {"role": "assistant", "content": "one"}]}


def talk(content, **fields) -> dict:
    """A conversation that asks `content`."""
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "one"}], **fields}


# ------------------------------------------------------------------------------------------------------------- attached
@pytest.mark.parametrize(
    "media",
    [
        {"images": [STRUCT]}, {"images": [PNG]}, {"images": ["cat.png"]}, {"images": "cat.png"}, {"image": ["cat.png"]},
        {"images": [STRUCT, None]}, {"images": '["cat.png"]'}, {"IMAGE": PNG}, {"Images": [PNG]}, {"img": PNG},
        {"imgs": ["cat.png"]},
        {"picture": PNG}, {"photo": "cat.png"}, {"image_path": "cat.png"}, {"image_file": "cat.png"},
        {"imagePath": "cat.png"}, {"image_paths": ["cat.png"]}, {"image_file_name": "cat.png"}, {"file_name": "cat.png"},
        {"image_url": URL}, {"image_url": {"url": URL}}, {"image_urls": [URL]}, {"images": [{"url": URL}]},
        {"image": URL}, {"image": coded(PNG)}, {"image_b64": coded(PNG)}, {"image_bytes": PNG},
        {"images_base64": [coded(PNG)]},
        {"images": [{"base64": coded(PNG)}]}, {"images": [{"type": "image", "image": "cat.png"}]}, {"png": STRUCT},
        {"image": {"bytes": coded(PNG), "path": None}}, {"images": [{"path": "cat.png"}]}, {"JPG": PNG},
        {"image": "cat.png", "image_url": "https://x/cat.png"}, {"image_base64": coded(PNG), "image": "elsewhere.png"},
        {"images": [STRUCT], "image_path": "old/cat.png"},
    ],
    ids=str,
)  # fmt: skip
def test_one_medium_beside_a_text(tmp_path, media):
    root = write_media(tmp_path)
    assert same(example({**media, "text": "seen"}, root), example(PAIR))
    assert same(example({**media, "ocr": "seen"}, root), example(PAIR))
    boxes = {"boxes": [{"label": "x", "box": [1, 2, 3, 4]}]}
    assert same(example({**media, **boxes}, root), example({"image": PNG, **boxes}))


@pytest.mark.parametrize(
    "media",
    [{"videos": [GIF]}, {"video_path": "clip.mp4"}, {"video_url": f"data:video/mp4;base64,{coded(GIF)}"}, {"mp4": GIF},
     {"movie": GIF}, {"video_file": "clip.mp4"}, {"file_name": "clip.mp4"}, {"videos": ["clip.mp4"]}, {"Video": GIF}],
    ids=str,
)  # fmt: skip
def test_one_video_beside_a_text(tmp_path, media):
    assert same(example({**media, "caption": "seen"}, write_media(tmp_path)), example(FILM))


def test_a_table_with_a_list_of_pictures(tmp_path):
    """As trl and others write them."""
    pa.parquet.write_table(pa.table({"images": [[STRUCT]], "text": ["seen"]}), tmp_path / "i.parquet")
    assert same(prepared(open_source(SourceConfig(str(tmp_path / "i.parquet")))[0]), example(PAIR))
    asked = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "which?", "index": None}]
    answer = {"role": "assistant", "content": [{"text": "one"}]}
    rows = [
        {"messages": [{"role": "user", "content": asked}, answer], "images": [one]}
        for one in (STRUCT, {"bytes": OTHER})
    ]
    first, second = parquet_rows(tmp_path, rows)
    assert same(prepared(first), example(TALK)) and not same(prepared(second), example(TALK))


@pytest.mark.parametrize(
    "given",
    [
        talk([{"type": "image"}, {"type": "text", "text": "which?"}], images=[PNG]),
        talk([{"type": "image"}, {"text": "which?"}], image="cat.png"),
        talk("<image>which?", images=["cat.png"]),
        talk([{"type": "text", "text": "<image>which?"}], image_path="cat.png"),
        talk([{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "which?"}]),
        talk([{"type": "image_url", "image_url": URL}, {"text": "which?"}]),
        talk([{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": "which?"}]),
        talk([{"type": "image", "url": URL}, {"text": "which?"}]),
        talk([{"type": "image", "path": "cat.png"}, {"text": "which?"}]),
        talk([{"type": "image", "base64": coded(PNG)}, {"text": "which?"}]),
        talk([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": coded(PNG)}},
              {"text": "which?"}]),
        talk([{"image_url": {"url": URL}}, {"text": "which?"}]),
        {"conversations": [{"from": "human", "value": "<image>which?"}, {"from": "gpt", "value": "one"}], "image": "cat.png"},
        {"messages": [{"role": "user", "content": "<image>which?", "images": ["cat.png"]}, TALK["messages"][1]]},
    ],
    ids=range(14),
)  # fmt: skip
def test_a_picture_in_a_conversation(tmp_path, given):
    assert same(example(given, write_media(tmp_path)), example(TALK))


def test_several_media_go_to_their_places_in_order(tmp_path):
    root = write_media(tmp_path)
    wanted = example({"parts": [{"text": "a "}, {"image": PNG}, {"text": " b "}, {"video": GIF}, {"image": OTHER}]})
    texts = "a <image> b <video><image>"
    assert same(example({"text": texts, "images": ["cat.png", "dog.png"], "videos": ["clip.mp4"]}, root), wanted)
    parts = [{"text": "a "}, {"type": "image"}, {"text": " b <video><image>"}]
    assert same(example({"parts": parts, "images": ["cat.png", "dog.png"], "video": "clip.mp4"}, root), wanted)
    turns = [("human", "<image>\n<image>\nsame?"), ("gpt", "no"), ("human", "<video>?"), ("gpt", "red")]
    given = {"conversations": [{"from": who, "value": value} for who, value in turns], "image": ["cat.png", "dog.png"],
             "video": "clip.mp4", "id": "000123"}  # fmt: skip
    messages = [
        {"role": "user", "content": [{"image": PNG}, {"text": "\n"}, {"image": OTHER}, {"text": "\nsame?"}]},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"video": GIF}, {"text": "?"}]},
        {"role": "assistant", "content": "red"},
    ]
    assert same(example(given, root), example({"messages": messages}))


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    "field, value",
    [
        ("media", "a.png"), ("media", [{"type": "image", "path": "a.png"}]), ("frames", ["a.png", "b.png"]),
        ("audio", "a.wav"), ("audio", {"bytes": b"RIFF", "path": "a.wav"}), ("audios", ["a.wav"]), ("pixel_values", [[0.5]]),
        ("media_url", "https://x/a"), ("image_1", STRUCT), ("original_image", STRUCT), ("screenshot", "s.png"),
        ("attachments", ["a.png"]), ("file", "sub/a.jpeg"), ("path", "a.MP4"), ("content_url", URL), ("source", "img/1.png"),
        ("asset", PNG), ("blob", {"bytes": PNG, "path": None}), ("data", {"deep": [{"x": PNG}]}), ("thumbnail", STRUCT),
        ("frame_paths", "a"), ("heic", "a"), ("sound", "a.flac"), ("files", [{"name": "a.webp"}]),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_holds_media_makes_no_text_document(field, value):
    for data in (
        {"text": "seen"},
        {"messages": [{"role": "assistant", "content": "seen"}]},
        {"parts": [{"text": "seen"}]},
    ):
        problem = refusal({**data, field: value})
        assert problem.reason == "form" and repr(field) in str(problem) and "write it into image" in str(problem)


@pytest.mark.parametrize(
    "field, value",
    [("audio", "a.wav"), ("frames", ["a"]), ("media", "x"), ("mask", STRUCT), ("depth", PNG), ("audio", [1])],
)
def test_a_second_medium_beside_a_picture(field, value):
    for data in (PAIR, TALK, {"parts": [{"image": PNG}, {"text": "seen"}]}):
        assert repr(field) in str(refusal({**data, field: value}))


@pytest.mark.parametrize(
    "data, named",
    [
        ({"text": "seen", "images": [PNG, OTHER]}, "2 media of kind image for 0 places"),
        ({"text": "<image> seen", "images": [PNG, OTHER]}, "2 media of kind image for 1 places"),
        ({"text": "<image><image>", "images": [PNG]}, "1 media of kind image for 2 places"),
        ({"caption": "<video>", "image": PNG}, "1 media of kind image for 0 places"),
        ({"ocr": "seen", "images": [PNG, OTHER]}, "2 media"),
        ({"text": "seen", "image": PNG, "video": GIF}, "places"),
        (talk("which?", images=[PNG]), "1 media of kind image for 0 places"),
        (talk("which?", videos=[GIF]), "1 media of kind video for 0 places"),
        (talk("<image>which?", video=GIF), "media of kind image for 1 places"),
        (talk([{"type": "image"}, {"text": "x"}], images=[PNG, OTHER]), "2 media of kind image for 1 places"),
        ({"parts": [{"text": "x"}], "image": PNG}, "1 media of kind image for 0 places"),
        ({"messages": [{"role": "user", "content": "x", "images": [coded(PNG)]}]}, "images beside messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "messages[0]: the field 'audio'"),
        (talk([{"text": "x", "frames": ["a"]}]), "messages[0].content[0]: the field 'frames'"),
        (talk([{"type": "video", "video": ["a.png", "b.png"]}, {"text": "x"}]), "content[0].video is a list"),
        (talk([{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"text": "x"}], images=[PNG, OTHER]), "index 1"),
        (talk([{"type": "input_audio", "input_audio": {"data": "x"}}]), "content[0]"),
        ({"image_path": "cat.png", "img": "dog.png", "text": "x"}, "several names, image_path, img"),
        ({"images": [PNG], "image": OTHER, "text": "x"}, "several names"),
        ({"text": "x", "images": [5]}, "image has the wrong type"),
        ({"messages": TALK["messages"], "conversations": []}, "messages and conversations"),
        ({"text": "x", "tools": [{}]}, "tools belong to messages"),
    ],
    ids=range(22),
)  # fmt: skip
def test_media_without_a_clear_place(data, named):
    problem = refusal(data)
    assert problem.reason == "form" and named in str(problem)
    fields = [name for name in data if name in ("image", "images", "video", "videos")]
    assert "places" not in named or all(name in str(problem) for name in fields)


@pytest.mark.parametrize(
    "data",
    [
        {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]},
        talk("what?\n<image>"), talk([{"text": "<video>"}, {"text": "what?"}]), {"text": "<image>\na cat"},
        {"text": "<image>a cat", "images": []}, {"parts": [{"text": "<image>"}, {"text": "a cat"}]},
        talk([{"type": "image"}]),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_place_whose_medium_is_missing(data):
    problem = refusal(data)
    assert problem.reason == "form" and "image" in str(problem) or "video" in str(problem)


def test_an_address_is_not_fetched():
    for given in ({"image_url": "https://x/a.png"}, {"image": "http://x/a.png"}, {"images": ["s3://x/a.png"]}):
        problem = refusal({**given, "text": "seen"})
        assert problem.reason == "path" and "not fetched" in str(problem)


# ---------------------------------------------------------------------------------------------------------- no media at all
@pytest.mark.parametrize(
    "field, value",
    [
        ("id", "cat.7"), ("source", "wikipedia"), ("url", "https://x/page"), ("url", "https://x/wiki/File:Cat.jpg"),
        ("license", "CC-BY"), ("image_id", "000"), ("num_images", 3), ("has_video", True), ("image_size", [3, 4]),
        ("video_duration", "3 s"), ("images", []), ("path", "src/main.py"), ("file_name", "main.py"), ("image_count", "3"),
        ("media_type", "text"), ("embedding", [0.1, 0.2]), ("clip_score", 0.3), ("images", None), ("meta", {"lang": "en"}),
        ("timestamp", "2024-01-01"), ("image", None), ("prompt", "seen?"), ("video_ids", ["a", "b"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_said_about_a_text_is_no_medium(field, value):
    for data in ({"text": "seen"}, {"messages": [{"role": "assistant", "content": "seen"}]}):
        assert same(example({**data, field: value}), example(data))
        assert value is None or value == [] or canonical(Record("r", {**data, field: value})).data[field] == value


@pytest.mark.parametrize(
    "content",
    ["<image>\n<url>x</url></image> in RSS", "write <image> in the middle of it", "a <b>", "<images>", "x < image"],
)
def test_marks_in_texts_without_media_are_text(content):
    for data in ({"text": content}, talk(content)):
        assert content in text(example(data))


def test_many_marks_take_no_time():
    """Neither those of media nor those of XML; a mark too many is one record that is bad."""
    many = "<image>" * 200_000
    assert "200000 places" in str(refusal({"text": f"{many} x", "image": PNG}))
    for end in ("</image>", "</video>", "x"):
        assert len(example({"text": f"a{many}{end}"})) > 1_400_000


def test_pixels_of_tasks():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert same(example({"images": [pixels], "text": "x"}), example({"image": pixels, "text": "x"}))
