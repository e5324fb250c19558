"""Sampling, timestamps and chunks of real videos made here, and refusal of broken ones."""

import io
import logging
import struct

import av
import numpy as np
import pytest
from PIL import Image

from k25_jax.config import VisionConfig
from k25_jax.vision import frame_sampler
from k25_jax.vision.image import target_size
from k25_jax.vision.patchpack import pack_clips
from k25_jax.vision.video import VideoError, chunks, format_timestamp, load_video

CONFIG = VisionConfig()
HEIGHT, WIDTH = 32, 48


def shade(index):
    """The grey of the frame with this index, so that a decoded frame tells which it was."""
    return 16 + 7 * (index % 32)


def index_of(frame):
    return round((float(frame.mean()) - 16) / 7)


def film(count=20, rate=10, container="mp4", codec="mpeg4", audio=False, picture=None, options=None):
    """Bytes of a video whose frames are flat, each of its own shade."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as out:
        video = out.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt, video.gop_size = WIDTH, HEIGHT, "yuv420p", 5
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio else None
        for index in range(count):
            pixels = np.full((HEIGHT, WIDTH, 3), shade(index), np.uint8) if picture is None else picture(index)
            out.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(video.encode())
        if sound:
            add_sound(out, sound, seconds=3 * count // rate)
    return file.getvalue()


def add_sound(out, stream, seconds):
    for block in range(seconds * 16):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, block * 1000
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


def sound_only(container="mp4"):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        add_sound(out, out.add_stream("aac", rate=16000, layout="mono"), 1)
    return file.getvalue()


def gif(delays, kind="GIF", size=(WIDTH, HEIGHT)):
    """An animation of flat frames; delays in milliseconds."""
    frames = [Image.new("L", size, shade(i)).convert("RGB") for i in range(len(delays))]
    file = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=delays, **lossless)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(
    "container,codec",
    [
        ("mp4", "mpeg4"),
        ("mp4", "libx264"),
        ("webm", "libvpx"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
    ],
)
def test_frames_and_timestamps(container, codec, tmp_path, caplog):
    data = film(20, 10, container, codec)
    (tmp_path / "film").write_bytes(data)
    for source in (data, tmp_path / "film", str(tmp_path / "film")):
        frames, times = load_video(source)
        assert [index_of(frame) for frame in frames] == [0, 5, 10, 15]
        np.testing.assert_allclose(times, [0.0, 0.5, 1.0, 1.5], atol=1e-6)
        assert all(f.dtype == np.uint8 and f.shape == (HEIGHT, WIDTH, 3) for f in frames)
    assert not caplog.records


@pytest.mark.parametrize("container,codec", [("mp4", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_sampling_does_not_drift(container, codec):
    """At 3 frames a second of 30, with clocks that round to milliseconds or to whole frames."""
    frames, times = load_video(film(30, 30, container, codec), fps=3.0)
    np.testing.assert_allclose(times, [0, 1 / 3, 2 / 3], atol=1e-3)
    assert [index_of(frame) for frame in frames] == [0, 10, 20]


def test_a_slow_video_gives_every_frame_once():
    _, times = load_video(film(6, 1), fps=2.0)
    np.testing.assert_allclose(times, range(6))
    _, times = load_video(film(7, 10), fps=1000.0)
    np.testing.assert_allclose(times, np.arange(7) / 10)


@pytest.mark.parametrize(
    "most,expected", [(1, [0]), (4, [0, 5, 10, 15]), (5, [0, 4, 8, 12, 16]), (50, list(range(20)))]
)
def test_a_long_video_is_sampled_evenly(most, expected):
    for container, codec in (("mp4", "mpeg4"), ("webm", "libvpx")):
        frames, times = load_video(film(20, 10, container, codec), fps=10.0, max_frames=most)
        assert [index_of(frame) for frame in frames] == expected
        np.testing.assert_allclose(times, np.array(expected) / 10, atol=1e-6)


def test_unknown_length_is_thinned_on_the_way():
    raw = film(26, 25, "h264", "libx264")  # no header, no clock: 25 frames a second are assumed
    with av.open(io.BytesIO(raw)) as opened:
        assert opened.duration is None
    frames, times = load_video(raw, fps=25.0, max_frames=8)
    assert [index_of(frame) for frame in frames] == [0, 4, 8, 12, 16, 20, 24]
    np.testing.assert_allclose(times, np.arange(7) * 4 / 25, atol=1e-6)
    frames, _ = load_video(raw, fps=25.0, max_frames=1)
    assert [index_of(frame) for frame in frames] == [0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations(kind, tmp_path):
    path = tmp_path / "film.gif"
    path.write_bytes(gif([300] * 8, kind))
    frames, times = load_video(path, fps=2.0)
    assert [index_of(frame) for frame in frames] == [0, 2, 4, 5, 7]
    np.testing.assert_allclose(times, [0.0, 0.6, 1.2, 1.5, 2.1])
    frames, times = load_video(path, fps=100.0, max_frames=4)
    assert [index_of(frame) for frame in frames] == [0, 2, 4, 6]
    np.testing.assert_allclose(times, [0.0, 0.6, 1.2, 1.8])
    single, times = load_video(gif([100], kind))
    assert [index_of(frame) for frame in single] == [0] and times == [0.0]


def test_animation_of_uneven_delays():
    _, times = load_video(gif([1000, 50, 50, 2000, 0, 0]), fps=50.0)
    np.testing.assert_allclose(times, [0.0, 1.0, 1.05, 1.1, 3.1, 3.2])  # a delay of 0 is shown for 0.1 s
    _, times = load_video(gif([1000, 50, 50, 2000, 0, 0]), fps=50.0, max_frames=3)
    np.testing.assert_allclose(times, [0.0, 3.1], atol=1.2)
    assert len(times) <= 3 and times[0] == 0.0


def test_frames_are_scaled_down():
    frames, _ = load_video(film(3, 1), max_patches=4)
    (height, width), _ = target_size(HEIGHT, WIDTH, 4)
    assert (height, width) != (HEIGHT, WIDTH) and {f.shape for f in frames} == {(height, width, 3)}
    assert [index_of(frame) for frame in frames] == [0, 1, 2]


def test_rotation_metadata():
    """A phone held upright: the left half of the stored picture is shown at the top."""

    def halves(_):
        return (
            np.repeat(np.where(np.arange(WIDTH) < WIDTH // 2, 200, 40)[None, :, None], HEIGHT, 0)
            .repeat(3, 2)
            .astype(np.uint8)
        )

    data = bytearray(film(3, 1, picture=halves))
    upright, _ = load_video(bytes(data))
    assert (
        upright[0].shape == (HEIGHT, WIDTH, 3) and upright[0][:, :16].mean() > 180 and upright[0][:, -16:].mean() < 60
    )
    place = data.index(b"tkhd") + 4 + 40  # the matrix of the track header: turn by 90 degrees clockwise
    assert struct.unpack_from(">9i", data, place) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, place, 0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    turned, _ = load_video(bytes(data))
    assert turned[0].shape == (WIDTH, HEIGHT, 3) and turned[0][:16].mean() > 180 and turned[0][-16:].mean() < 60
    np.testing.assert_array_equal(turned[0], np.rot90(upright[0], -1))


def test_sound_beside_the_video_changes_nothing(caplog):
    frames, times = load_video(film(20, 10, audio=True))
    assert [index_of(frame) for frame in frames] == [0, 5, 10, 15] and len(times) == 4
    frames, _ = load_video(
        film(20, 10, "matroska", audio=True), fps=10.0, max_frames=5
    )  # only the sound's length is known
    assert 3 <= len(frames) <= 5
    assert not caplog.records


# --------------------------------------------------------------------------------------------------------------- damage
def refused(data, tmp_path, **options):
    path = tmp_path / "birthday.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError) as as_bytes:
        load_video(data, name="record 9", **options)
    assert str(as_bytes.value).startswith("record 9: ")
    with pytest.raises(VideoError) as as_file:
        load_video(path, **options)
    assert str(as_file.value).startswith(f"{path}: ") and ";" in str(as_file.value)
    return str(as_file.value)


def test_empty_missing_and_not_a_video(tmp_path):
    assert "is empty" in refused(b"", tmp_path)
    assert "known container" in refused(b"hello, world " * 100, tmp_path)
    assert "known container" in refused(b"\0" * 1000, tmp_path)
    with pytest.raises(VideoError, match="no such file") as caught:
        load_video(tmp_path / "no.mp4")
    assert "no.mp4" in str(caught.value)
    with pytest.raises(VideoError, match="not a regular file"):
        load_video(tmp_path)


def test_playlists_are_refused(tmp_path):
    """They would make the decoder open other files."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(film(3, 1))
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {secret}\n",
    ):
        assert "known container" in refused(text.encode(), tmp_path)


def test_sound_only(tmp_path):
    assert "has no video stream" in refused(sound_only(), tmp_path)


def test_cover_art_is_not_a_video(tmp_path):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8), format="rgb24")))
        out.mux(cover.encode())
    assert "has no video stream" in refused(file.getvalue(), tmp_path)


def test_no_decoder(tmp_path):
    data = film(3, 1, "matroska")
    assert data.count(b"V_MPEG4/ISO/ASP") == 1
    assert "there is no decoder" in refused(data.replace(b"V_MPEG4/ISO/ASP", b"V_NOBODY/KNOWS/"), tmp_path)


def test_an_index_that_was_cut_off(tmp_path):
    data = film()
    assert data.index(b"moov") > data.index(b"mdat")
    assert "cut off" in refused(data[: len(data) // 2], tmp_path)


def noise(index):
    return np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize("container,codec", [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_a_truncated_video_gives_what_it_has(container, codec, tmp_path, caplog):
    """With the index in front, as for streaming, the first half can be decoded."""
    path = tmp_path / "film.mp4"
    options = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else None
    whole = film(100, 10, container, codec, picture=noise, options=options)
    path.write_bytes(whole[: len(whole) // 2])
    if container == "mp4":  # fragments say nothing about the length; break one instead
        path.write_bytes(faststart(tmp_path)[0])
    with caplog.at_level(logging.WARNING):
        frames, times = load_video(path)
    assert 5 <= len(frames) < 19 and len(times) == len(frames)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and f"{len(frames)} frames" in record.getMessage()


def faststart(tmp_path):
    """Half of an mp4 whose index comes first, and the whole of it."""
    path = tmp_path / "whole.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        video = out.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt, video.gop_size = WIDTH, HEIGHT, "yuv420p", 5
        for index in range(100):
            out.mux(video.encode(av.VideoFrame.from_ndarray(noise(index), format="rgb24")))
        out.mux(video.encode())
    whole = path.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    return whole[: len(whole) // 2], whole


def test_nothing_but_the_index_is_left(tmp_path):
    _, whole = faststart(tmp_path)
    refused(whole[: whole.index(b"mdat") + 4], tmp_path)


def test_damage_in_the_middle_is_passed_over(tmp_path, caplog):
    _, whole = faststart(tmp_path)
    data = bytearray(whole)
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    with caplog.at_level(logging.WARNING):
        frames, times = load_video(bytes(data), name="scratched.mp4")
    assert len(frames) >= 15 and times[-1] > 9.0
    assert [r for r in caplog.records if "scratched.mp4" in r.getMessage()]


def test_truncated_animations(tmp_path, caplog):
    pixels = [Image.fromarray(noise(i)) for i in range(10)]
    file = io.BytesIO()
    pixels[0].save(file, "GIF", save_all=True, append_images=pixels[1:], duration=500)
    data = file.getvalue()
    with caplog.at_level(logging.WARNING):
        frames, _ = load_video(data[: len(data) // 2], name="half.gif")
    assert 3 <= len(frames) <= 5 and "half.gif" in caplog.text
    refused(data[:900], tmp_path)
    refused(gif([100] * 3, "WEBP")[:60], tmp_path)


def test_the_pixel_limit(tmp_path):
    assert "exceed the limit" in refused(film(3, 1), tmp_path, max_pixels=HEIGHT * WIDTH - 1)
    assert "exceed the limit" in refused(gif([100] * 3), tmp_path, max_pixels=HEIGHT * WIDTH - 1)
    assert len(load_video(film(3, 1), max_pixels=HEIGHT * WIDTH)[0]) == 3


def test_impossible_rates(tmp_path):
    assert "fps=0" in refused(film(3, 1), tmp_path, fps=0)
    assert "max_frames=0" in refused(film(3, 1), tmp_path, max_frames=0)


@pytest.mark.parametrize("container,codec", [("mp4", "mpeg4"), ("webm", "libvpx"), ("GIF", ""), ("WEBP", "")])
def test_fuzzed_bytes_raise_nothing_but_video_error(container, codec):
    rng = np.random.default_rng(len(container) + len(codec))
    clean = film(8, 4, container, codec) if codec else gif([200] * 8, container)
    refusals = 0
    for _ in range(30):
        data = bytearray(clean)
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] = rng.integers(0, 256)
        try:
            frames, times = load_video(
                bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]), max_pixels=2**22, name="fuzzed"
            )
            assert 1 <= len(frames) == len(times) <= 256
        except VideoError as problem:
            assert str(problem).startswith("fuzzed: ")
            refusals += 1
    assert refusals


# --------------------------------------------------------------------------------------------------------------- chunks
def test_chunks_of_up_to_four_frames():
    frames, times = load_video(film(22, 4), fps=2.0)
    assert len(frames) == 11
    parts = chunks(frames, times, CONFIG, "trip.mp4")
    assert [clip.grid for _, clip in parts] == [(4, 4, 4), (4, 4, 4), (3, 4, 4)]
    np.testing.assert_allclose([time for time, _ in parts], [0.0, 2.0, 4.0], atol=1e-6)
    assert [format_timestamp(time) for time, _ in parts] == ["00:00:00.000", "00:00:02.000", "00:00:04.000"]
    assert parts[1][1].source == "trip.mp4 at 00:00:02.000" and parts[1][1].tokens == 4
    shown = parts[1][1].patches.reshape(4, 4, 4, 3, 14, 14)
    for number in range(4):  # raster order, frame by frame; zeros below and to the right of the picture
        picture = shown[number].transpose(0, 3, 1, 4, 2).reshape(56, 56, 3)
        np.testing.assert_array_equal(picture[:HEIGHT, :WIDTH], frames[4 + number])
        assert not picture[HEIGHT:].any() and not picture[:, WIDTH:].any()
    pack, starts = pack_clips([clip for _, clip in parts], 1, 256)
    assert starts.tolist() == [0, 4, 8] and pack.coords_PN5[0, :64, 0].tolist() == sum(
        ([f] * 16 for f in (1, 2, 3, 4)), []
    )


def test_a_last_chunk_of_one_frame_has_no_time():
    parts = chunks([np.zeros((28, 28, 3), np.uint8)] * 5, range(5), CONFIG)
    assert [clip.grid[0] for _, clip in parts] == [4, 1]
    pack, _ = pack_clips([parts[1][1]], 1, 4)
    assert pack.coords_PN5[0, :, 0].tolist() == [0] * 4


def test_chunks_of_nothing_and_of_unequal_frames():
    assert chunks([], [], CONFIG) == []
    frame = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(VideoError, match="trip.mp4: 1 frames but 2 timestamps"):
        chunks([frame], [0.0, 1.0], CONFIG, "trip.mp4")
    with pytest.raises(VideoError, match="trip.mp4: its frames differ"):
        chunks([frame, frame[:14]], [0.0, 1.0], CONFIG, "trip.mp4")


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0.0, "00:00:00.000"),
        (0.5, "00:00:00.500"),
        (1.001, "00:00:01.000"),
        (59.9996, "00:00:59.999"),
        (3661.25, "01:01:01.250"),
        (90000.0, "01:00:00.000"),
    ],
)
def test_format_timestamp(seconds, text):
    assert format_timestamp(seconds) == text


# -------------------------------------------------------------------------------------------------------------- in memory
def test_frames_in_memory_are_as_they_are():
    film = np.random.default_rng(0).integers(0, 256, (6, 28, 42, 3)).astype(np.uint8)
    frames, times = load_video(film, fps=4.0)
    np.testing.assert_array_equal(frames, film)
    assert times == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]


def test_frames_in_memory_are_thinned_and_scaled_as_those_of_files():
    film = np.stack([np.full((140, 140, 3), 10 * number, np.uint8) for number in range(20)])
    frames, times = load_video(film, fps=2.0, max_frames=5, max_patches=25)
    assert [int(frame[0, 0, 0]) for frame in frames] == [0, 40, 80, 120, 160] and times == [0, 2, 4, 6, 8]
    assert frames[0].shape == (70, 70, 3)


@pytest.mark.parametrize(
    "shape, dtype", [((4, 28, 28), "uint8"), ((4, 28, 28, 3), "float32"), ((0, 28, 28, 3), "uint8")]
)
def test_an_array_that_is_no_film_is_named(shape, dtype):
    with pytest.raises(VideoError, match=r"film: an array of frames must be uint8 \[frames, h, w, 3\], not"):
        load_video(np.zeros(shape, dtype), name="film")


@pytest.mark.parametrize("data", [film(count=40), gif([100] * 40)], ids=["mp4", "gif"])
def test_a_video_that_goes_on_and_on_is_left_in_time(data, monkeypatch, caplog):
    """The limit counts what is decoded, so it is the same on every machine."""
    monkeypatch.setattr(frame_sampler, "MAX_WORK", 20 * frame_sampler.LEAST_WORK)
    frames, times = load_video(data, fps=10.0)
    assert 5 <= len(frames) <= 20 and times[-1] < 2.0
    assert "pixels to decode; cut it into shorter videos" in caplog.text
    monkeypatch.setattr(frame_sampler, "MAX_WORK", frame_sampler.LEAST_WORK // 2)
    with pytest.raises(VideoError, match="pixels to decode"):
        load_video(data)
