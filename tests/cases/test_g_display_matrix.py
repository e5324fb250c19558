"""Videos and images are seen as players show them: all turns and mirrors, whatever the container."""

import io
import logging
import struct

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from k25_jax.vision.image import load_image
from k25_jax.vision.orientation import MATRICES, from_matrix, turn
from k25_jax.vision.video import load_video

HEIGHT, WIDTH = 32, 48
ONE = 1 << 16

# The quadrants of the stored picture are 40 90 / 150 220; what is shown for each matrix (a, b, c, d), written by hand.
SHOWN = {
    (1, 0, 0, 1): ((40, 90), (150, 220)),
    (-1, 0, 0, 1): ((90, 40), (220, 150)),
    (1, 0, 0, -1): ((150, 220), (40, 90)),
    (-1, 0, 0, -1): ((220, 150), (90, 40)),
    (0, 1, -1, 0): ((150, 40), (220, 90)),  # a quarter clockwise
    (0, -1, 1, 0): ((90, 220), (40, 150)),  # a quarter against the clock
    (0, 1, 1, 0): ((40, 150), (90, 220)),
    (0, -1, -1, 0): ((220, 90), (150, 40)),
}


def quadrants():
    picture = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for (row, column), grey in {(0, 0): 40, (0, 1): 90, (1, 0): 150, (1, 1): 220}.items():
        rows, columns = HEIGHT // 2, WIDTH // 2
        picture[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = grey
    return picture


def film(container="mp4", codec="mpeg4"):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        video = out.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for _ in range(3):
            out.mux(video.encode(av.VideoFrame.from_ndarray(quadrants(), format="rgb24")))
        out.mux(video.encode())
    return file.getvalue()


def with_matrix(data, matrix, header=b"tkhd", offset=44):
    """The film with (a, b, c, d) in place of its display matrix."""
    data = bytearray(data)
    a, b, c, d = (round(value * ONE) for value in matrix)
    struct.pack_into(">9i", data, data.index(header) + offset, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(data)


def remuxed(data, container):
    """The same packets in another container, with what the first says of the stream."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as given, av.open(file, "w", format=container) as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return file.getvalue()


def seen(data):
    """The shades of the four quadrants of each frame, and the frames' sizes."""
    frames, _ = load_video(data, fps=10.0)
    assert len(frames) == 3
    for frame in frames:
        rows, columns = frame.shape[0] // 4, frame.shape[1] // 4
        middles = frame[rows :: 2 * rows, columns :: 2 * columns, 0].astype(int)
        shades = tuple(tuple(min((40, 90, 150, 220), key=lambda s: abs(s - v)) for v in row) for row in middles)
        assert np.abs(middles - np.array(shades)).max() < 12
        yield shades, frame.shape


FILM = film()


@pytest.mark.parametrize("scale", [1, 2, 0.25])
@pytest.mark.parametrize("matrix", SHOWN, ids=str)
def test_the_matrix_of_a_track(matrix, scale, caplog):
    size = (HEIGHT, WIDTH, 3) if matrix[0] else (WIDTH, HEIGHT, 3)
    for shades, shape in seen(with_matrix(FILM, [scale * value for value in matrix])):
        assert shades == SHOWN[matrix] and shape == size
    assert not caplog.records


@pytest.mark.parametrize("matrix", SHOWN, ids=str)
@pytest.mark.parametrize("container", ["mov", "matroska"])
def test_the_matrix_in_other_containers(container, matrix):
    """QuickTime has the same numbers, Matroska has angles."""
    for shades, _ in seen(remuxed(with_matrix(FILM, matrix), container)):
        assert shades == SHOWN[matrix]


@pytest.mark.parametrize("matrix", SHOWN, ids=str)
def test_the_matrix_of_the_whole_movie(matrix):
    """The movie's header has a matrix too, which is applied after the track's."""
    movie = with_matrix(FILM, matrix, b"mvhd", 40)
    for shades, _ in seen(movie):
        assert shades == SHOWN[matrix]
    undone = with_matrix(with_matrix(FILM, (-1, 0, 0, 1)), (-1, 0, 0, 1), b"mvhd", 40)
    assert {shades for shades, _ in seen(undone)} == {SHOWN[1, 0, 0, 1]}


@pytest.mark.parametrize("stretch", [(2, 0, 0, 1), (-1, 0, 0, 3), (0, 3, -1, 0), (0.999, 0.03, -0.03, 0.999)], ids=str)
def test_stretched_and_hardly_slanted_matrices_turn_only(stretch, caplog):
    """The shape of pixels is ignored, however it is written."""
    turned = tuple(int(np.sign(round(value))) for value in stretch)
    for shades, shape in seen(with_matrix(FILM, stretch)):
        assert shades == SHOWN[turned] and sorted(shape) == [3, HEIGHT, WIDTH]
    assert not caplog.records


@pytest.mark.parametrize(
    "odd", [(0, 0, 0, 0), (1, 1, 0, 1), (0.7, 0.7, -0.7, 0.7), (1, 0, 0, 0), (0.5, 0.87, -0.87, 0.5)], ids=str
)
def test_a_matrix_that_is_neither_a_turn_nor_a_mirror_is_named(odd, caplog):
    with caplog.at_level(logging.WARNING):
        frames, _ = load_video(with_matrix(FILM, odd), name="slanted.mp4", fps=10.0)
    assert {shades for shades, _ in seen(with_matrix(FILM, odd))} == {SHOWN[1, 0, 0, 1]}
    assert len(frames) == 3
    message = [record.getMessage() for record in caplog.records if "slanted.mp4" in record.getMessage()]
    assert len(message) == 1 and "neither a turn nor a mirror" in message[0] and "; shown as it is stored" in message[0]


def test_side_data_of_an_unknown_kind_hide_no_turn():
    """A camera's MJPEG: each frame has an EXIF block of its own, which older readers of side data stumble over."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = io.BytesIO()
    Image.fromarray(quadrants()).save(picture, "JPEG", quality=95, exif=exif)
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as out:
        video = out.add_stream("mjpeg", rate=10)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        out.start_encoding()
        for index in range(3):
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts = video, index, index
            out.mux(packet)
    assert {shades for shades, _ in seen(file.getvalue())} == {SHOWN[0, 1, -1, 0]}


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_by_exif(number, kind):
    exif = Image.Exif()
    exif[0x0112] = number
    file = io.BytesIO()
    Image.fromarray(quadrants()).save(file, kind, exif=exif, quality=95)
    image = load_image(file.getvalue())
    rows, columns = image.shape[0] // 4, image.shape[1] // 4
    np.testing.assert_allclose(image[rows :: 2 * rows, columns :: 2 * columns, 0], SHOWN[MATRICES[number]], atol=12)
    file.seek(0)
    np.testing.assert_array_equal(image, np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")))


def test_the_table_is_linear_algebra():
    """Each number turns a picture as its matrix moves the points; the eight are closed under being done one after another."""
    picture = np.arange(6 * 4 * 3).reshape(6, 4, 3)
    for number, (a, b, c, d) in MATRICES.items():
        shown = turn(picture, number)
        y, x = np.mgrid[:6, :4]
        across, down = a * x + c * y, b * x + d * y
        np.testing.assert_array_equal(shown[down - down.min(), across - across.min()], picture)
        assert from_matrix((a, b, c, d)) == number and shown.flags.c_contiguous
        for other, second in MATRICES.items():
            product = np.array([[a, b], [c, d]]) @ np.array(second).reshape(2, 2)
            np.testing.assert_array_equal(turn(shown, other), turn(picture, from_matrix(product.ravel())))
