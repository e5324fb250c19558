"""An animation given as a video gives all its frames or is refused by name: never one frame in silence."""

import io

import av
import numpy as np
import pytest
from PIL import Image, features

from k25_jax.vision.video import VideoError, load_video

SHADES = (20, 120, 220)


def animation(kind, count=3, **options):
    frames = [Image.new("RGB", (48, 32), (shade,) * 3) for shade in SHADES[:count]]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=500, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_all_frames_are_read(kind):
    frames, times = load_video(animation(kind))
    assert [int(np.abs(np.array(SHADES) - frame.mean()).argmin()) for frame in frames] == [0, 1, 2]
    assert times == [0.0, 0.5, 1.0]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
@pytest.mark.parametrize("count", [1, 3])
def test_avif_is_refused_by_name(count, tmp_path):
    data = animation("AVIF", count)
    for name in ("a.avif", "a.avifs", "a.mp4", "a"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            VideoError, match="is a picture or animation in AVIF or HEIF, .*; convert it to mp4"
        ) as caught:
            load_video(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("count", [1, 3])
def test_png_is_refused_by_name(count):
    with pytest.raises(VideoError, match=r"clip: is a PNG picture or animation \(APNG\), .*; convert it to mp4"):
        load_video(animation("PNG", count), name="clip")


def mp4():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        video = out.add_stream("mpeg4", rate=2)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for shade in SHADES:
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), shade, np.uint8), format="rgb24")))
        out.mux(video.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    "brand", [b"avif", b"avis", b"heic", b"heix", b"hevc", b"heis", b"mif1", b"msf1"], ids=bytes.decode
)
def test_brands_of_pictures(brand):
    """As the major brand, or as one that the file is compatible with; the minor version is no brand."""
    data = mp4()
    assert data[4:12] == b"ftypisom" and len(load_video(data)[0]) == 3
    for place in (8, 16, 20):
        with pytest.raises(VideoError, match="AVIF or HEIF"):
            load_video(data[:place] + brand + data[place + 4 :])
    assert len(load_video(data[:12] + brand + data[16:])[0]) == 3
