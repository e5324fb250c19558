"""The work that a video makes is bounded, and a mistake of our own in reading one is no damaged file."""

import io
import logging
import struct

import av
import numpy as np
import pytest
from PIL import Image

from k25_jax.config import K25Config
from k25_jax.sampling.prompt import MediaReader
from k25_jax.vision import frame_sampler
from k25_jax.vision import video as video_module
from k25_jax.vision.frame_sampler import FrameSampler
from k25_jax.vision.video import VideoError, load_video


def mp4(count=20, metadata=""):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        if metadata:
            out.metadata["title"] = metadata
        for index in range(count):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), 9 * index, np.uint8), format="rgb24")))
        out.mux(video.encode())
    return file.getvalue()


def gif(count, width=2, height=2):
    """Frames of one pixel on a large screen."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    frame = b"!\xf9\4\4\x0a\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    return head + frame * count + b";"


def test_an_animation_of_small_frames_on_a_large_screen_is_left_in_time(monkeypatch, caplog):
    monkeypatch.setattr(frame_sampler, "MAX_WORK", video_module.ANIMATION * 10 * 1000 * 1000)
    data = gif(5000, 1000, 1000)
    with caplog.at_level(logging.WARNING):
        frames, _ = load_video(data, fps=10.0, max_frames=500, name="screen.gif")
    assert 5 <= len(frames) <= 10 and "screen.gif: is damaged (more than" in caplog.text


def test_scans_in_the_frames_of_a_film_count(monkeypatch):
    picture = io.BytesIO()
    Image.new("L", (64, 64), 128).save(picture, "JPEG", progressive=True)
    data = picture.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        video = out.add_stream("mjpeg", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuvj420p"
        out.start_encoding()
        for index in range(3):
            packet = av.Packet(data[:-2] + scan * 2000 + b"\xff\xd9")
            packet.stream, packet.pts, packet.dts = video, index, index
            out.mux(packet)
    assert len(load_video(file.getvalue())[0]) == 1
    monkeypatch.setattr(frame_sampler, "MAX_WORK", 1000 * 64 * 64)
    with pytest.raises(VideoError, match="pixels to decode"):
        load_video(file.getvalue())


@pytest.mark.parametrize("data", [mp4(), gif(20)], ids=["mp4", "gif"])
def test_a_deadline_ends_the_work_itself(data, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(frame_sampler, "monotonic", lambda: next(clock))
    with pytest.raises(VideoError, match="long.mp4: takes more than 5 s to decode; cut it"):
        load_video(data, name="long.mp4", seconds=5.0)
    assert next(clock) < 10
    assert load_video(data, name="long.mp4", seconds=100.0)[0]


def test_a_reader_of_requests_has_a_deadline():
    reader = MediaReader(K25Config(), video_seconds=0.0)
    with pytest.raises(VideoError, match="clip: takes more than 0 s to decode"):
        reader.video(mp4(3), "clip")


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError])
@pytest.mark.parametrize(
    "inner",
    ["_read_stream", "_packets", "_length", "_Clock", "_frame_rgb", "_display_matrix", "from_matrix", "turn", "_scans"],
)
def test_a_mistake_of_our_own_is_no_damaged_video(inner, error, monkeypatch):
    def wrong(*args):
        raise error("a mistake")

    monkeypatch.setattr(video_module, inner, wrong)
    with pytest.raises(error, match="a mistake"):
        load_video(mp4(3))


@pytest.mark.parametrize("inner", ["keep", "wants", "count", "_append"])
@pytest.mark.parametrize("data", [mp4(3), gif(3)], ids=["mp4", "gif"])
def test_a_mistake_in_the_sampler_is_no_damaged_video(inner, data, monkeypatch):
    def wrong(*args):
        raise TypeError("a mistake")

    monkeypatch.setattr(FrameSampler, inner, wrong)
    with pytest.raises(TypeError, match="a mistake"):
        load_video(data)


def test_a_mistake_in_reading_animations_is_no_damaged_video(monkeypatch):
    def wrong(*args):
        raise AttributeError("a mistake")

    monkeypatch.setattr(video_module, "to_rgb", wrong)
    with pytest.raises(AttributeError, match="a mistake"):
        load_video(gif(3))


@pytest.mark.parametrize("error", [TypeError, ValueError, MemoryError, SyntaxError])
def test_what_a_library_raises_is_the_files_fault(error, monkeypatch):
    def wrong(*args, **options):
        raise error("odd bytes")

    data = mp4(3)
    monkeypatch.setattr(video_module.av, "open", wrong)
    with pytest.raises(VideoError, match=f"{error.__name__}: odd bytes"):
        load_video(data)
    monkeypatch.setattr(video_module.Image, "open", wrong)
    with pytest.raises(VideoError, match=f"cannot be decoded .{error.__name__}: odd bytes"):
        load_video(gif(3))


def test_texts_that_are_not_utf_8_do_no_harm():
    """Titles of old films are in some national encoding."""
    data = mp4(3, metadata="ABCDEFGH")
    assert data.count(b"ABCDEFGH") == 1
    assert len(load_video(data.replace(b"ABCDEFGH", b"\xe9\xff\xfe\xe8EFGH"), fps=10.0)[0]) == 3
