"""Pictures of few bytes and much work are refused before they are decoded; what programs write is not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from k25_jax.vision import image as image_module
from k25_jax.vision.cost import MOST_SCANS, too_costly
from k25_jax.vision.image import ImageError, load_image


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(width, height, scans, frame=0xC2, components=1, before=b""):
    """A JPEG of flat grey: each scan says in a few bytes that nothing changes."""
    parts = b"".join(bytes([index + 1, 0x11, 0]) for index in range(components))
    size = struct.pack(">BHHB", 8, height, width, components)
    tables = segment(0xDB, b"\0" + bytes([16] * 64)) + b"".join(
        segment(0xC4, bytes([kind, 1, *[0] * 15, symbol])) for kind, symbol in ((0, 0), (0x10, 0xE0))
    )
    first = segment(0xDA, bytes([components, *(n for i in range(components) for n in (i + 1, 0)), 0, 0, 1]))
    later = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + b"\x7f\xfe"
    return b"\xff\xd8" + before + segment(frame, size + parts) + tables + first + later * (scans - 1) + b"\xff\xd9"


def png(*chunks, width=8, height=8):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = (b"IDAT", zlib.compress(bytes((width + 1) * height)))
    body = ((b"IHDR", header), *chunks, pixels, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in body
    )


def bmp(width, height, compression, body):
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8 // compression, compression, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(1024) + body


def tiff(tags, body=b"", order="<", big=False):
    """A TIFF of whole numbers: `tags` from number to values."""
    count, word, entry = ("Q", "Q", 20) if big else ("H", "I", 12)
    head = struct.pack(order + "H", 43 if big else 42) + (struct.pack(order + "HHQ", 8, 0, 16) if big else b"")
    head = (b"II" if order == "<" else b"MM") + (head if big else head + struct.pack(order + "I", 8))
    size = struct.calcsize(order + word)
    end = len(head) + struct.calcsize(order + count) + entry * len(tags) + size
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(numbers)}I", *numbers)
        where = raw.ljust(size, b"\0") if len(raw) <= size else struct.pack(order + word, end + len(values))
        values += raw if len(raw) > size else b""
        entries += struct.pack(f"{order}HH{word}", tag, 4, len(numbers)) + where
    return head + struct.pack(order + count, len(tags)) + entries + bytes(size) + values + body


def grey_tiff(width, height, compression=1, **options):
    return {256: [width], 257: [height], 258: [8], 259: [compression], 262: [1], 277: [1]}


STRIPS = 70_000
GIF = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
ICC = b"icc\0\0" + zlib.compress(bytes(1 << 20))
COSTLY = {
    "1000 scans": (jpeg(1024, 1024, 1000), "1000 scans of 1048576 pixels"),
    "400 scans of 33 Mpx": (jpeg(8192, 4096, 400), "400 scans of 33554432 pixels"),
    "64 scans of 33 Mpx": (jpeg(8192, 4096, 64), "baseline JPEG"),
    "scans of a baseline file": (jpeg(4096, 4096, 100, frame=0xC0), "100 scans"),
    "scans after a comment that looks like an end": (
        jpeg(4096, 4096, 100, before=segment(0xFE, b"\xff\xd9\xff\xda")),
        "100 scans",
    ),
    "scans after filling bytes": (jpeg(4096, 4096, 100).replace(b"\xff\xda", b"\xff\xff\xff\xda"), "100 scans"),
    "scans with restarts": (jpeg(4096, 4096, 100).replace(b"\x7f\xfe", b"\x7f\xfe\xff\xd0\xff\xd1"), "100 scans"),
    "arithmetic coding": (jpeg(8192, 4096, 10, frame=0xCA, components=4), "Huffman"),
    "segments": (jpeg(8, 8, 1, before=b"\xff\xfe\0\2" * 20_000), "segments"),
    "markers without a length": (jpeg(8, 8, 1, before=b"\xff\xf0" * 20_000), "segments"),
    "a header of noise": (jpeg(8, 8, 1, before=segment(0xFE, b"") + bytes(2 << 20)), "before its pixels"),
    "noise after the start": (b"\xff\xd8\xff" + bytes(2 << 20), "before its pixels"),
    "noise after an end": (b"\xff\xd8\xff\xd9" + bytes(2 << 20), "before its pixels"),
    "noise that looks like segments": (b"\xff\xd8" + (b"\xff\xd9\xff\xf0" + bytes(65518)) * 40, "before its pixels"),
    "noise after reserved markers": (b"\xff\xd8" + (b"\xff\xf7\xff\xf0" + bytes(65518)) * 40, "before its pixels"),
    "metadata": (jpeg(8, 8, 1, before=segment(0xE1, b"Exif\0\0" + bytes(65000)) * 300), "before its pixels"),
    "chunks": (png(*[(b"IDAT", b"")] * 140_000), "chunks"),
    "profiles": (png(*[(b"iCCP", ICC)] * 300), "text and profiles"),
    "compressed texts": (png(*[(b"zTXt", b"a\0\0" + ICC[5:])] * 300), "text and profiles"),
    "blocks": (GIF + b"!\xfe" + b"\1a" * 70_000 + b"\0,", "blocks"),
    "extensions": (GIF + b"!\xfe\0" * 70_000 + b",", "blocks"),
    "noise between blocks": (GIF + b"!\xfe\0" + bytes(70_000) + b",", "blocks"),
    "noise and no block": (GIF + bytes(70_000), "blocks"),
    "run lengths of 4 bits": (bmp(8192, 8192, 2, b"\xff\x11" * 300_000), "run lengths"),
    "run lengths of 8 bits": (bmp(1000, 1000, 1, b"\1\1" * 2_000_000), "run lengths"),
    "run lengths upside down": (bmp(8192, -8192, 1, b"\1\1\0\0" * 8192), "run lengths"),
    "strips": (tiff(grey_tiff(1, STRIPS) | {273: [8] * STRIPS, 278: [1], 279: [1] * STRIPS}), "strips"),
    "tiles of one pixel": (tiff(grey_tiff(300, 300) | {322: [1], 323: [1], 324: [8] * 90_000}), "strips"),
    "a tile far larger": (tiff(grey_tiff(16, 16, 8) | {322: [1 << 15], 323: [1 << 15], 324: [8], 325: [9]}), "parts of"),
    "a tile, Motorola": (tiff(grey_tiff(16, 16, 8) | {322: [1 << 15], 323: [1 << 15], 324: [8]}, order=">"), "parts of"),
    "a tile, BigTIFF": (tiff(grey_tiff(16, 16, 8) | {322: [1 << 15], 323: [1 << 15], 324: [8]}, big=True), "parts of"),
    "scans in a TIFF": (
        tiff(grey_tiff(1024, 1024, 7) | {273: [200], 278: [1024], 279: [9000]}, jpeg(1024, 1024, 1000)),
        "1000 scans",
    ),
    "strips that share one JPEG": (
        tiff(grey_tiff(1024, 64, 7) | {273: [900] * 64, 278: [1], 279: [3000] * 64}, jpeg(1024, 1, 20)),
        "in 192000 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_too_much_is_refused_before_it_is_decoded(name, monkeypatch):
    data, reason = COSTLY[name]
    monkeypatch.setattr(image_module.Image, "open", lambda *args, **options: pytest.fail("Pillow was asked"))
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(data, name="cover.jpg")
    message = str(caught.value)
    assert message.startswith("cover.jpg: ") and "save it" in message and message.endswith("or drop the record")
    assert "\n" not in message and len(message) < 300


def test_a_file_is_bounded_as_bytes_are(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(COSTLY["1000 scans"][0])
    with pytest.raises(ImageError, match="1000 scans of 1048576 pixels"):
        load_image(tmp_path / "a.jpg")
    monkeypatch.setattr(image_module, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        load_image(png() + bytes(100))


def test_the_bound_of_scans_is_exact():
    """One scan more than the bound allows is refused; the last that it allows is decoded."""
    side = 2048
    most = MOST_SCANS // side**2
    assert not too_costly(jpeg(side, side, most)) and too_costly(jpeg(side, side, most + 1))
    assert not too_costly(jpeg(16384, 8192, 1, frame=0xC0, components=3))  # one scan is bounded by max_pixels alone
    assert load_image(jpeg(64, 64, 500)).shape == (64, 64, 3)


def test_only_scans_of_the_picture_itself_count():
    """Not those of a thumbnail in its metadata, nor of what follows its end."""
    other = jpeg(4096, 4096, 100)
    inside = segment(0xE1, b"Exif\0\0" + other[:60000])
    assert not too_costly(jpeg(4096, 4096, 10, before=inside) + other)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
def test_what_pillow_writes_is_never_too_costly(kind, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    variants = {
        "JPEG": [{"progressive": True}, {"exif": b"Exif\0\0" + bytes(60000), "comment": b"a" * 60000}],
        "PNG": [{"icc_profile": bytes(50000)}, {"optimize": True}],
        "TIFF": [{"compression": name} for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")],
        "GIF": [{"save_all": True, "append_images": [image] * 2, "comment": b"a" * 5000}],
    }  # fmt: skip
    for options in ({}, *variants.get(kind, ())):
        file = io.BytesIO()
        try:
            image.convert(mode).save(file, kind, **options)
        except (OSError, ValueError):
            continue  # this format has not this mode
        assert too_costly(file.getvalue()) == ""
        assert load_image(file.getvalue()).shape == (200, 300, 3)


def test_no_bytes_break_the_count():
    """The counts are our own code: on damaged bytes they answer, they don't raise."""
    rng = np.random.default_rng(0)
    samples = [COSTLY[name][0][:3000] for name in COSTLY]
    samples += [
        magic + rng.bytes(60) for magic in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0+")
    ]
    for sample in samples:
        for cut in (1, 2, 3, 7, 8, 9, 12, 20, 30, 33, len(sample) // 2):
            assert isinstance(too_costly(sample[:cut]), str)
        for _ in range(40):
            fuzzed = bytearray(sample)
            for place in rng.integers(0, min(len(sample), 100), 4):
                fuzzed[place] = rng.integers(0, 256)
            assert isinstance(too_costly(bytes(fuzzed)), str)


@pytest.mark.parametrize("inner", ["too_costly", "check_pixels", "_plain_png", "to_rgb", "_orientation", "turn"])
@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError])
def test_a_mistake_of_our_own_is_no_damaged_image(inner, error, monkeypatch):
    def wrong(*args):
        raise error("a mistake")

    monkeypatch.setattr(image_module, inner, wrong)
    with pytest.raises(error, match="a mistake"):
        load_image(png())
