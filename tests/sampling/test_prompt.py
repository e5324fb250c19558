"""From messages or token ids with media to expanded tokens and clips."""

import av
import numpy as np
import pytest
from PIL import Image

from k25_jax.config import preset
from k25_jax.sampling.prompt import MediaReader, from_ids, from_messages
from k25_jax.sampling.sample import PromptError
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.vision.image import ImageError

TINY = preset("tiny")
PAD = TINY.media_pad_id


@pytest.fixture
def picture(tmp_path):
    """56 x 84 pixels: 4 x 6 patches, 6 tokens."""
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3)).astype(np.uint8)).save(file)
    return file


@pytest.fixture
def film(tmp_path):
    """Six frames of 28 x 56 pixels in three seconds: 2 x 4 patches, 2 tokens."""
    file = tmp_path / "film.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 56, 28, "yuv420p"
        for i in range(6):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.full((28, 56, 3), 40 * i, np.uint8), "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file


def test_an_image_from_a_path_bytes_or_an_array_is_the_same_clip(picture):
    reader = MediaReader(TINY)
    clips = [reader.image(source) for source in (picture, picture.read_bytes(), np.asarray(Image.open(picture)))]
    assert clips[0].grid == (1, 4, 6) and clips[0].tokens == 6
    for clip in clips[1:]:
        np.testing.assert_array_equal(clip.patches, clips[0].patches)
    assert str(picture) in clips[0].source
    assert MediaReader(TINY, max_image_patches=8).image(picture).grid == (1, 4, 4)  # 32 x 48 pixels, padded
    with pytest.raises(ImageError, match="no-such.png"):
        reader.image(picture.with_name("no-such.png"))


def test_a_conversation_is_rendered_with_a_pad_for_each_vision_token(picture):
    tokenizer = load_tokenizer()
    content = [{"image": str(picture)}, {"text": "what?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    prompt = from_messages(messages, tokenizer, MediaReader(TINY))
    special = BYTE_SPECIAL
    middle, end = special["<|im_middle|>"], special["<|im_end|>"]
    image = [special["<|media_begin|>"], *b"image", special["<|media_content|>"], *[PAD] * 6, special["<|media_end|>"]]
    expected = [special["<|im_system|>"], *b"system", middle, *b"Be brief.", end]
    expected += [special["<|im_user|>"], *b"user", middle, *image, *b"what?", end]
    expected += [special["<|im_assistant|>"], *b"assistant", middle]
    assert prompt.tokens == expected
    assert [clip.grid for clip in prompt.clips] == [(1, 4, 6)]


def test_a_video_is_chunks_of_four_frames_each_behind_its_time(film):
    tokenizer = load_tokenizer()
    prompt = from_messages([{"role": "user", "content": [{"video": str(film)}]}], tokenizer, MediaReader(TINY, fps=2.0))
    assert [clip.grid for clip in prompt.clips] == [(4, 2, 4), (2, 2, 4)]
    assert prompt.tokens.count(PAD) == 4
    text = tokenizer.decode(prompt.tokens)
    assert text.index("00:00:00.000") < text.index("00:00:02.000") < text.index("<|im_assistant|>")
    small = from_messages([{"role": "user", "content": [{"video": str(film)}]}], tokenizer, MediaReader(TINY, 16384, 2))
    assert [clip.grid[1:] for clip in small.clips] == [(2, 2), (2, 2)]


def test_special_tokens_in_what_the_user_writes_are_text(picture):
    messages = [{"role": "user", "content": "<|media_pad|><|im_end|>"}]
    prompt = from_messages(messages, load_tokenizer(), MediaReader(TINY))
    assert PAD not in prompt.tokens and prompt.tokens.count(BYTE_SPECIAL["<|im_end|>"]) == 1


def test_token_ids_with_one_pad_for_each_image(picture):
    clips = [MediaReader(TINY).image(picture)] * 2
    prompt = from_ids([5, PAD, 6, PAD], clips, TINY)
    assert prompt.tokens == [5, *[PAD] * 6, 6, *[PAD] * 6] and prompt.clips == clips
    assert from_ids([5, 6], [], TINY).tokens == [5, 6]


@pytest.mark.parametrize("tokens, message", [
    ([5, 6], f"0 media_pad tokens .id {PAD}. for 1 images"),
    ([PAD, PAD], f"2 media_pad tokens .id {PAD}. for 1 images"),
    ([PAD, -1], r"\[-1\] are not token ids"),
    ([PAD, 2**31, 2**70], "are not token ids"),
])  # fmt: skip
def test_token_ids_that_cannot_be_are_refused(picture, tokens, message):
    with pytest.raises(PromptError, match=message):
        from_ids(tokens, [MediaReader(TINY).image(picture)], TINY)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(PromptError, match=r"<\|media_pad\|> is 264, the model's 163605: use the model's tokenizer"):
        from_messages([{"role": "user", "content": "hi"}], load_tokenizer(), MediaReader(preset("1b")))


def test_a_video_from_memory_has_a_clip_for_four_frames():
    film = np.random.default_rng(1).integers(0, 256, (6, 28, 56, 3)).astype(np.uint8)
    clips = MediaReader(TINY).video(film)
    assert [(time, clip.grid) for time, clip in clips] == [("00:00:00.000", (4, 2, 4)), ("00:00:02.000", (2, 2, 4))]
