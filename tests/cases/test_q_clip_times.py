"""The time before a clip is the one that the public processor writes, of real videos too."""

import ast
import importlib.util
import io
import time
import types
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from k25_jax.config import VisionConfig
from k25_jax.vision.video import chunks, format_timestamp, load_video

NTSC = Fraction(30000, 1001)


def public_rule(seconds):
    """How the public processor writes a time."""
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}"


def film(count, rate, container="mp4", codec="mpeg4", start=0):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        video = out.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
        for index in range(count):
            frame.pts = start + index
            out.mux(video.encode(frame))
        out.mux(video.encode())
    return file.getvalue()


def times():
    yield from (0.0, 0.5, 1.0, 1.001, 1.0009999999999999, 0.29, 0.57, 1.1, 59.9996, 59.9999999, 3599.9999, 3661.25)
    yield from (86399.9999, 86400.0, 90000.0, 1e6 + 0.1)
    for rate in (NTSC, Fraction(24000, 1001), Fraction(25), Fraction(60000, 1001), Fraction(10), Fraction(7, 3)):
        yield from (index / float(rate) for index in range(4000))
    yield from np.random.default_rng(0).uniform(0, 20000, 4000)


def test_many_times():
    for seconds in times():
        assert format_timestamp(seconds) == public_rule(seconds), seconds
    assert format_timestamp(1.001) == "00:00:01.000" and format_timestamp(0.0334) == "00:00:00.033"


def public_prompt():
    """The installed processor's method that writes the prompt of a video, taken out of its file: importing that is slow."""
    spec = importlib.util.find_spec("transformers")
    if spec is None:
        pytest.skip("transformers is not installed")
    path = Path(spec.submodule_search_locations[0], "models", "kimi_k25", "processing_kimi_k25.py")
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if getattr(n, "name", "") == "replace_video_token"]
    scope = {"np": np, "time": time}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), scope)
    return scope["replace_video_token"]


def test_the_prompt_of_the_public_processor():
    """200 texts at 29.97 frames a second."""
    write = public_prompt()
    metadata = types.SimpleNamespace(fps=float(NTSC), timestamps=[index / float(NTSC) for index in range(800)])
    video_processor = types.SimpleNamespace(merge_size=2, temporal_patch_size=4)
    processor = types.SimpleNamespace(video_processor=video_processor, video_token="*")
    inputs = {
        "num_chunks_per_video": np.array([200]),
        "video_grid_thw": np.full((200, 3), 2),
        "video_metadata": [metadata],
    }
    prompt = write(processor, inputs, 0)
    public = [text.rsplit("<|media_end|>")[-1] for text in prompt.split("<|media_begin|>")[:-1]]
    assert len(public) == 200 and public[0] == "00:00:00.000" and public[1] == "00:00:00.133"
    frames, seconds = load_video(film(800, NTSC), fps=1000.0, max_frames=800, max_patches=4)
    ours = [format_timestamp(time) for time, _ in chunks(frames, seconds, VisionConfig())]
    assert ours == public


@pytest.mark.parametrize("start", [0, 77])
@pytest.mark.parametrize("rate", [NTSC, Fraction(24000, 1001), Fraction(25), Fraction(12)], ids=str)
@pytest.mark.parametrize(
    "container,codec",
    [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("mpegts", "libx264"), ("avi", "mpeg4"), ("h264", "libx264")],
)
def test_times_of_files_whose_clocks_round(container, codec, rate, start):
    """Matroska counts milliseconds, a transport stream starts late: a frame's time is its number over the rate, though."""
    start = 0 if container == "avi" else start  # it would be filled with empty frames
    if container == "h264":
        rate, start = Fraction(25), 0  # it has no clock at all
    _, seconds = load_video(film(200, rate, container, codec, start), fps=1000.0, max_frames=1000, max_patches=4)
    assert seconds == [index / float(rate) for index in range(200)]


def test_a_rate_that_varies_keeps_the_times_of_the_file():
    ticks = [0, 100, 101, 250, 777, 1333, 2001]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        video = out.add_stream("mpeg4", rate=1000)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
        for tick in ticks:
            frame.pts = tick
            out.mux(video.encode(frame))
        out.mux(video.encode())
    _, seconds = load_video(file.getvalue(), fps=10000.0, max_frames=10_000)
    np.testing.assert_allclose(seconds, np.array(ticks) / 1000, atol=1.01e-3)


def test_times_of_animations_do_not_drift():
    """Tenths of a second added up as floats would be 0.7999999999999999 and .799."""
    frames = [Image.new("L", (32, 32), 7 * index) for index in range(30)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    _, seconds = load_video(file.getvalue(), fps=100.0)
    assert seconds == [index / 10 for index in range(30)]
