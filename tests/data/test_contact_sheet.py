"""The picture of packed rows: its spans are the batch, its thumbnails the images, and its colours the loss mask."""

import json

import numpy as np
import pytest
from PIL import Image

from k25_jax.cli import main
from k25_jax.config import DataConfig, preset
from k25_jax.data.contact_sheet import LEARNT, PADDING, ContactSheet, clip_frames, learnt_BL, spans
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.vision.image import preprocess
from k25_jax.vision.patchpack import Clip

MODEL = preset("tiny")
DATA = DataConfig(batch_size=2, seq_len=64, packs=2, pack_patches=64)
PAD = MODEL.media_pad_id


def batch():
    """Two rows of several documents with images and a clip of three frames; also the images in order."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (28 * a, 28 * b, 3), dtype=np.uint8) for a, b in ((1, 2), (2, 2), (1, 1))]
    clips = [preprocess(image, MODEL.vision) for image in images]
    frames = rng.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    cut = np.concatenate([preprocess(frame, MODEL.vision).patches for frame in frames])
    clips.append(Clip(cut, (3, 2, 2)))
    a, b, end = *b"ab", BYTE_SPECIAL["[EOS]"]
    texts = [
        ([a, a, PAD, b, b, end], [0, 0, 0, 1, 1, 1], clips[:1]),
        ([a, PAD, PAD, b], [1, 0, 0, 1], clips[1:3]),
        ([a] * 50, [1] * 50, []),
        ([PAD, b, b], [0, 1, 0], clips[3:]),
    ]
    examples = [make_example(*text, PAD) for text in texts]
    return pack_examples(examples, DATA, MODEL), examples, [[image] for image in images] + [list(frames)]


def test_spans_are_the_row_in_order():
    packed, examples, _ = batch()
    learnt = learnt_BL(packed)
    special = frozenset(BYTE_SPECIAL.values())
    weights = [example.loss_weights.copy() for example in examples]
    for weight in weights:
        weight[0] = 0  # nothing predicts the first token of a document
    counted = np.concatenate([weight[example.tokens != PAD] for weight, example in zip(weights, examples, strict=True)])
    assert learnt.sum() == (counted > 0).sum()
    for row in range(2):
        found = spans(packed, row, special)
        assert [span.first for span in found] == [0, *(span.last for span in found[:-1])] and found[-1].last == 64
        for span in found:
            place = np.s_[row, span.first : span.last]
            assert (packed.segments_BL[place] == span.segment).all()
            assert (span.kind == "media") == (packed.media_BL[place] >= 0).all()
            assert (span.kind == "padding") == (span.segment == 0)
            assert span.kind in ("media", "padding") or (learnt[place] == span.learnt).all()
            assert span.kind != "special" or (span.last - span.first == 1 and packed.tokens_BL[place][0] in special)
    kinds = [[span.kind for span in spans(packed, row, special)].count("media") for row in range(2)]
    assert sum(kinds) == 4  # neighbouring images are apart


def test_thumbnails_are_the_images():
    packed, _, images = batch()
    found = []
    for row in range(2):
        for span in spans(packed, row, frozenset()):
            if span.kind == "media":
                first = int(packed.media_BL[row, span.first])
                found.append((first, clip_frames(packed, first, MODEL)))
    assert len(found) == 4
    keys = {tuple(frames[0].shape) + (len(frames), frames[0].tobytes()) for _, frames in found}
    assert keys == {tuple(frames[0].shape) + (len(frames), frames[0].tobytes()) for frames in images}
    (video,) = [frames for _, frames in found if len(frames) == 3]
    assert all(np.array_equal(mine, frame) for mine, frame in zip(video, images[3], strict=True))


def colours(image: Image.Image) -> dict:
    pixels, counts = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_counts=True)
    return {"#{:02x}{:02x}{:02x}".format(*pixel): int(count) for pixel, count in zip(pixels, counts, strict=True)}


def test_colours_follow_the_loss_mask():
    packed, _, _ = batch()
    sheet = ContactSheet(packed, MODEL, load_tokenizer())
    image = sheet.draw("title", range(2))
    some = colours(image)
    assert some[LEARNT] > 5000 and some[PADDING] > 1000
    mute = packed.replace(loss_weights_BL=np.zeros_like(packed.loss_weights_BL))
    assert (
        colours(ContactSheet(mute, MODEL, load_tokenizer()).draw("title", range(2)))[LEARNT] < 1000
    )  # the legend's only


def long_rows(rows: int):
    """Rows of 8192 tokens: a picture, a long text, and padding at the end."""
    data = DataConfig(batch_size=rows, seq_len=8192, packs=2 * rows, pack_patches=64)
    clip = preprocess(np.zeros((28, 56, 3), np.uint8), MODEL.vision)
    example = make_example([PAD, *b"word " * 1500, BYTE_SPECIAL["[EOS]"]], [0.0] + [1.0] * 7501, [clip], PAD)
    return pack_examples([example] * rows, data, MODEL)


@pytest.mark.parametrize("rows, height", [(1, 620), (2, 620), (6, 1500), (40, 2700)])
def test_a_sheet_is_read_at_one_glance(rows, height):
    image = ContactSheet(long_rows(rows), MODEL, load_tokenizer()).draw("t", range(rows))
    assert image.width == 1680 and 300 < image.height < height


def test_rows_that_are_not_drawn_are_said(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        ContactSheet, "_head", lambda self, title, left_out: drawn.append(left_out) or Image.new("RGB", (9, 9))
    )
    sheet = ContactSheet(long_rows(40), MODEL, load_tokenizer())
    for rows in (40, 13, 12, 1):
        sheet.draw("t", range(rows))
    assert drawn == [28, 1, 0, 0]


def test_only_what_is_left_out_is_counted():
    """What is drawn and what is counted are together the tokens of the row's documents; a byte is a token here."""
    special = frozenset(BYTE_SPECIAL.values())
    cases = [(batch()[0], 0, False), (batch()[0], 1, False), (long_rows(1), 0, True)]
    for packed, row, is_cut in cases:
        sheet = ContactSheet(packed, MODEL, load_tokenizer())
        for width in (300, 747, 1500):
            lines, left_out = sheet._lines(spans(packed, row, special, MODEL.vision.group), width)
            drawn = 0
            for item in (item for line in lines for item in line if not item.badge):
                span = item.span
                is_text = span.kind == "text"
                drawn += len(item.text) if is_text else (span.last - span.first) * (span.kind != "padding")
            assert drawn + left_out == np.count_nonzero(packed.segments_BL[row]) and (left_out > 0) == is_cut


def test_inspect_writes_statistics_and_a_picture(tmp_path, capsys):
    config = tmp_path / "x.py"
    config.write_text(
        "import ml_collections\n"
        "def get_config(arg=''):\n"
        "    data = dict(sources=[dict(path='digits:train'), dict(path='words:train')], batch_size=4, seq_len=128,\n"
        "                packs=2, pack_patches=256, max_image_patches=64)\n"
        "    return ml_collections.ConfigDict(dict(name='x', model='tiny', data=data))\n"
    )
    flags = [f"--config={config}", f"--output={tmp_path / 'out'}", "--records=20", "--samples=3", "--workers=1"]
    assert main(["data", "inspect", *flags]) == 0
    out = capsys.readouterr().out
    assert "conversation" in out and "tokens in a record" in out and "samples.png" in out
    found = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert 15 <= found["records"] <= 20 and found["bad"] == {} and sum(found["lengths"].values()) == found["good"]
    with Image.open(tmp_path / "out" / "samples.png") as image:
        assert image.width == 1680 and colours(image.convert("RGB"))[LEARNT] > 1000
