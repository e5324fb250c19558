"""Decoding of every kind of image, refusal of every kind of damage, and the way from pixels to patches."""

import ast
import importlib.util
import io
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps, PngImagePlugin

from k25_jax.config import VisionConfig
from k25_jax.vision import image as image_module
from k25_jax.vision.image import (
    ImageError,
    load_image,
    normalise,
    patchify,
    preprocess,
    resize,
    target_size,
)

CONFIG = VisionConfig()
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:200:40j, 0:200:60j], 90.0), -1).astype(np.uint8)


def encode(pixels, kind, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, depth, colour, rows, *extra):
    """A PNG written by hand; `extra` are (name, data) chunks before the pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"".join(chunk(name, data) for name, data in extra) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def over_white(colour, alpha):
    return np.round(colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0))


# ------------------------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("kind,options", [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_the_pixels_back(kind, options, tmp_path):
    data = encode(PIXELS, kind, **options)
    (tmp_path / "a.bin").write_bytes(data)
    for source in (data, bytearray(data), tmp_path / "a.bin", str(tmp_path / "a.bin")):
        image = load_image(source)
        assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
        np.testing.assert_array_equal(image, PIXELS)


def test_jpeg_is_close_to_the_original():
    for options in ({"quality": 95}, {"quality": 95, "progressive": True}):
        image = load_image(encode(SMOOTH, "JPEG", **options))
        assert np.abs(image.astype(int) - SMOOTH).max() <= 6


def test_gif_gives_its_first_frame():
    red, blue = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    image = load_image(encode(red, "GIF", save_all=True, append_images=[blue], duration=100))
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8([255, 0, 0]), (4, 6, 3)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are not orientations
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(SMOOTH, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert expected.shape[:2] == ((60, 40) if 5 <= orientation <= 8 else (40, 60))
    np.testing.assert_array_equal(load_image(data), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_counts_as_upright():
    cut_off = encode(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xee" * 40)
    assert load_image(cut_off).shape == SMOOTH.shape
    garbage = png(1, 1, 8, 0, b"\0\x05", (b"eXIf", b"garbage " * 4))
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(garbage)).getexif()
    np.testing.assert_array_equal(load_image(garbage), [[[5, 5, 5]]])


def test_cmyk():
    image = load_image(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(image.astype(int) - [0, 255, 255]).max() <= 3
    image = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 51)), "TIFF"))
    np.testing.assert_array_equal(image[0, 0], [204, 0, 0])


def test_alpha_is_composited_over_white():
    alpha = np.linspace(0, 255, 35).round().astype(np.uint8).reshape(5, 7, 1)
    image = load_image(encode(np.concatenate([PIXELS, alpha], 2), "PNG")).astype(int)
    assert np.abs(image - over_white(PIXELS, alpha)).max() <= 1
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(image[-1, -1], PIXELS[-1, -1])
    grey = PIXELS[..., :1]
    image = load_image(encode(np.concatenate([grey, alpha], 2), "PNG")).astype(int)
    assert np.abs(image - over_white(grey, alpha)).max() <= 1


def test_palette_with_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    np.testing.assert_array_equal(load_image(encode(image, "PNG"))[0], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    for kind in ("PNG", "GIF"):
        one = load_image(encode(image, kind, transparency=1))
        np.testing.assert_array_equal(one[0], [[255, 0, 0], [255, 255, 255], [0, 0, 255]])
    per_entry = load_image(encode(image, "PNG", transparency=bytes([255, 255, 51])))
    np.testing.assert_array_equal(per_entry[0], [[255, 0, 0], [0, 255, 0], [204, 204, 255]])


def test_one_transparent_colour_of_a_png():
    pixels = np.uint8([[[1, 2, 3], [4, 5, 6]]])
    np.testing.assert_array_equal(load_image(encode(pixels, "PNG", transparency=(1, 2, 3)))[0], [[255] * 3, [4, 5, 6]])
    data = encode(np.uint8([[9, 8]]), "PNG", transparency=9)
    np.testing.assert_array_equal(load_image(data)[0], [[255] * 3, [8] * 3])


def test_one_bit():
    bits = np.array([[True, False, True]])
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(load_image(encode(bits, kind))[0], [[255] * 3, [0] * 3, [255] * 3])


def test_16_bit_greyscale_is_scaled_not_clipped():
    grey = np.array([[0, 128, 129, 257, 1000, 32768, 65535]], np.uint16)
    expected = np.repeat(np.round(grey / 257)[..., None], 3, 2)
    np.testing.assert_array_equal(expected[0, :, 0], [0, 0, 1, 1, 4, 128, 255])
    for data in (encode(grey, "PNG"), encode(grey, "TIFF"), encode(grey.astype(">u2"), "TIFF")):
        np.testing.assert_array_equal(load_image(data), expected)
    white_is_zero = encode(grey, "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(load_image(white_is_zero)[0, :, 0], np.round((65535 - grey[0].astype(int)) / 257))
    transparent = load_image(encode(grey, "PNG", transparency=1000))
    np.testing.assert_array_equal(transparent[0, :, 0], [0, 0, 1, 1, 255, 128, 255])


def test_16_bit_colour_is_scaled():
    rows = b"\0" + struct.pack(">6H", 65535, 257 * 3, 0, 257 * 200, 257, 65535)
    np.testing.assert_array_equal(load_image(png(2, 1, 16, 2, rows))[0], [[255, 3, 0], [200, 1, 255]])


def test_thin_images():
    for shape in ((1, 30000, 3), (30000, 1, 3), (1, 1, 3)):
        image = load_image(encode(np.full(shape, 77, np.uint8), "PNG"))
        assert image.shape == shape
        clip = preprocess(image, CONFIG, source="thin")
        assert max(clip.grid) <= 512 and clip.tokens == clip.grid[1] * clip.grid[2] // 4
        assert clip.patches[0].reshape(3, 14, 14)[0, 0, 0] == 77


# -------------------------------------------------------------------------------------------------------------- refusal
def refused(data, tmp_path, **options):
    """The message with which `data` is refused, as a file and as bytes; both must name it."""
    path = tmp_path / "holiday.img"
    path.write_bytes(data)
    with pytest.raises(ImageError) as as_bytes:
        load_image(data, name="record 17", **options)
    assert str(as_bytes.value).startswith("record 17: ")
    with pytest.raises(ImageError) as as_file:
        load_image(path, **options)
    assert str(as_file.value).startswith(f"{path}: ") and ";" in str(as_file.value)
    return str(as_file.value)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(kind, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode(pixels, kind)
    assert load_image(data).shape == (40, 40, 3)
    for share in (0.02, 0.3, 0.6, 0.9):
        assert "drop the record" in refused(data[: int(len(data) * share)], tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_empty_missing_and_not_a_file(tmp_path):
    assert "is empty" in refused(b"", tmp_path)
    for path, reason in [(tmp_path / "no.png", "no such file"), (tmp_path, "not a regular file"), ("a\0b", "read")]:
        with pytest.raises(ImageError, match=reason) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ImageError, match="<5 bytes>"):
        load_image(b"hello")


def test_a_path_that_is_far_too_long_is_not_repeated_in_full():
    with pytest.raises(ImageError, match="cannot be read") as caught:
        load_image("x" * 100_000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"hello, world " * 20,
        b"\0" * 500,
        b"%PDF-1.4\n%EOF",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encode(PIXELS, "PPM"),
        encode(PIXELS, "EPS"),
        encode(PIXELS, "ICO", sizes=[(5, 5)]),
    ],
    ids=["text", "zeros", "pdf", "svg", "ppm", "eps", "ico"],
)
def test_what_is_not_an_image_or_not_an_allowed_format(data, tmp_path):
    assert "is not an image of a known format (PNG, JPEG" in refused(data, tmp_path)


def test_zero_sized(tmp_path):
    for width, height in ((0, 4), (4, 0)):
        refused(png(width, height, 8, 2, b"\0" * 13 * 4), tmp_path)
    refused(b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";", tmp_path)


def test_the_pixel_limit_holds_before_decoding(tmp_path):
    data = png(12000, 12000, 8, 2, b"")  # no pixels at all: decoding would say that the file is truncated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns at a limit of its own
        message = refused(data, tmp_path)
        assert "12000 x 12000 pixels exceed the limit of 134217728" in message
        assert "truncated" in refused(data, tmp_path, max_pixels=12000**2)
    assert "exceed the limit of 34" in refused(encode(PIXELS, "PNG"), tmp_path, max_pixels=34)
    assert load_image(encode(PIXELS, "PNG"), max_pixels=35).shape == PIXELS.shape
    assert "decompression bomb" in refused(png(60000, 60000, 8, 2, b""), tmp_path)


@pytest.mark.parametrize(
    "name,head", [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"icc\0\0")]
)
def test_bombs_inside_png_chunks(name, head, tmp_path):
    bomb = zlib.compress(b"a" * (64 << 20), 9)
    assert len(bomb) < 100_000
    rows = b"\0" + bytes(3)
    assert load_image(png(1, 1, 8, 2, rows)).shape == (1, 1, 3)
    assert "too large" in refused(png(1, 1, 8, 2, rows, (name, head + bomb)), tmp_path)


def test_32_bit_greyscale_has_no_range(tmp_path):
    for dtype in (np.int32, np.float32):
        assert "32-bit greyscale" in refused(encode(np.ones((3, 3), dtype), "TIFF"), tmp_path)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it then survives
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_fuzzed_bytes_raise_nothing_but_image_error(kind):
    rng = np.random.default_rng(sum(map(ord, kind)))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "red")]} if kind == "GIF" else {}
    clean = encode(SMOOTH, kind, **frames, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
    outcomes = {"decoded": 0, "refused": 0}
    for round_number in range(75 if kind in ("PNG", "JPEG", "WEBP", "GIF") else 40):
        data = bytearray(clean)
        reach = len(data) if round_number % 2 else min(len(data), 200)  # headers break in more ways than pixels
        for place in rng.integers(0, reach, rng.integers(1, 8)):
            data[place] = rng.integers(0, 256)
        if round_number % 5 == 0:
            at = int(rng.integers(0, len(data)))
            data[at : at + int(rng.integers(0, 40))] = rng.bytes(int(rng.integers(0, 40)))
        try:
            image = load_image(bytes(data), max_pixels=2**22, name="fuzzed")
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            outcomes["decoded"] += 1
        except ImageError as problem:
            assert str(problem).startswith("fuzzed: ")
            outcomes["refused"] += 1
    assert outcomes["refused"] > 5


def png_variant(name: str) -> bytes:
    """PNG files for which the quick decoder is right, or has to be left alone."""
    pixels = np.random.default_rng(5).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image, info, exif = Image.fromarray(pixels), PngImagePlugin.PngInfo(), Image.Exif()
    options = {}
    match name:
        case "text":
            info.add_text("Software", "x")
        case "profile":
            options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        case "orientation":
            exif[0x0112] = 6
            options["exif"] = exif
        case "xmp":
            info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
        case "transparent colour":
            options["transparency"] = tuple(pixels[3, 4].tolist())
        case "palette":
            image = image.convert("P")
        case "alpha":
            image = image.convert("RGBA")
        case "grey":
            image = image.convert("L")
        case "animation":
            options |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info, **options)
    return file.getvalue()


PNG_VARIANTS = {
    "plain": True, "text": True, "profile": True, "orientation": False, "xmp": False, "transparent colour": False,
    "palette": False, "alpha": False, "grey": False, "animation": False,
}  # fmt: skip


@pytest.mark.parametrize("name, quick", PNG_VARIANTS.items())
def test_the_quick_png_decoder_gives_what_pillow_gives(name, quick, monkeypatch):
    data = png_variant(name)
    found = image_module._plain_png(data)
    assert (found is not None) == quick
    ours = load_image(data)
    monkeypatch.setattr(image_module, "_plain_png", lambda data: None)
    assert np.array_equal(ours, load_image(data))
    assert ours.shape == ((53, 37, 3) if name in ("orientation", "xmp") else (37, 53, 3))


def test_damaged_png_files_fare_the_same_with_both_decoders(monkeypatch):
    rng, data = np.random.default_rng(2), png_variant("plain")
    samples = [data[:cut] for cut in rng.integers(30, len(data), 30)]
    for _ in range(120):
        fuzzed = bytearray(data)
        fuzzed[int(rng.integers(33, len(data)))] ^= int(rng.integers(1, 256))
        samples.append(bytes(fuzzed))

    def outcomes():
        for sample in samples:
            try:
                yield load_image(sample).tobytes()
            except ImageError as problem:
                yield str(problem)

    quick = list(outcomes())
    monkeypatch.setattr(image_module, "_plain_png", lambda data: None)
    assert quick == list(outcomes())


# -------------------------------------------------------------------------------------------------------------- patches
def public_navit_resize():
    """The public function, taken out of its file, since importing that needs torchvision."""
    spec = importlib.util.find_spec("transformers")
    if spec is None:
        pytest.skip("transformers is not installed")
    (folder,) = spec.submodule_search_locations
    path = Path(folder, "models", "kimi_k25", "image_processing_kimi_k25.py")
    names = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "navit_resize"]
    scope = {"math": math}
    exec(compile(ast.Module(names, []), str(path), "exec"), scope)
    return scope["navit_resize"]


def sizes():
    rng = np.random.default_rng(3)
    yield from [
        (1, 1),
        (1, 10**6),
        (10**6, 1),
        (13, 15),
        (27, 7168),
        (1805, 1805),
        (1792, 1792),
        (7168, 7169),
        (28, 28),
    ]
    for _ in range(3000):
        yield tuple(int(v) for v in np.exp(rng.uniform(0, np.log(20000), 2)).astype(int))


def test_target_size_is_the_public_one():
    public = public_navit_resize()
    for height, width in sizes():
        for most, side, patch, merge in ((16384, 512, 14, 2), (4096, 512, 14, 2), (64, 512, 14, 2), (50, 12, 16, 3)):
            expected = public(height, width, patch, merge, most, side)
            assert target_size(height, width, most, side, patch, merge) == expected, (height, width, most)


def test_target_size_step_by_step():
    assert target_size(480, 640) == ((480, 640), (504, 644))
    assert target_size(1805, 1805) == ((1805, 1805), (1820, 1820))
    assert target_size(1, 1) == ((1, 1), (28, 28))
    for height, width in sizes():
        new, padded = target_size(height, width, 4096)
        patches = max(1, height // 14) * max(1, width // 14)
        scales = [1.0, (4096 / patches) ** 0.5, 7168 / height, 7168 / width]
        for before, after, full in zip((height, width), new, padded, strict=True):
            assert 1 <= after <= min(before, 7168) and abs(after - max(1, before * min(scales))) <= 1
            while after % 28:
                after += 1
            assert after == full


def test_target_size_refuses_nothing_to_see():
    with pytest.raises(ImageError, match="0 x 5"):
        target_size(0, 5)


def loop_patches(image, patch, merge):
    """Patches one value at a time."""
    height, width = (math.ceil(side / (patch * merge)) * patch * merge for side in image.shape[:2])
    patches = []
    for row in range(0, height, patch):
        for column in range(0, width, patch):
            values = []
            for channel in range(3):
                for y in range(row, row + patch):
                    for x in range(column, column + patch):
                        inside = y < image.shape[0] and x < image.shape[1]
                        values.append(image[y, x, channel] if inside else 0)
            patches.append(values)
    return np.array(patches, np.uint8)


def test_patchify_against_a_loop():
    config = VisionConfig(patch_size=4)
    for height, width in ((16, 8), (9, 23), (1, 1)):
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        patches, grid = patchify(image, config)
        assert grid == (math.ceil(height / 8) * 2, math.ceil(width / 8) * 2)
        np.testing.assert_array_equal(patches, loop_patches(image, 4, 2))


def test_preprocess_small_image_is_padded_only():
    clip = preprocess(SMOOTH, CONFIG, source="smooth.png")
    assert clip.grid == (1, 4, 6) and clip.tokens == 6 and clip.source == "smooth.png"
    assert clip.patches.dtype == np.uint8 and clip.patches.shape == (24, 588)
    np.testing.assert_array_equal(clip.patches, loop_patches(SMOOTH, 14, 2))


def test_preprocess_scales_down_bicubically():
    image = np.random.default_rng(5).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    clip = preprocess(image, CONFIG, max_patches=64)
    (height, width), (padded_height, padded_width) = target_size(300, 200, 64)
    assert (height, width) != (300, 200) and clip.grid == (1, padded_height // 14, padded_width // 14)
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(clip.patches, loop_patches(small, 14, 2))
    assert small.std() < 0.7 * image.std()  # antialiased: noise averages out


def test_resize_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize(SMOOTH, 40, 60), SMOOTH)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_preprocess_refuses_other_arrays(image):
    with pytest.raises(ImageError, match="scan.png: expected uint8"):
        preprocess(image, CONFIG, source="scan.png")


def test_normalise():
    values = normalise(np.uint8([0, 51, 255]))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [-1.0, -0.6, 1.0], rtol=1e-6)
