"""What a picture will cost, read from its bytes before anything is decoded.

Pixels are bounded by their number in `load_image`. Here is bounded what makes a small file slow all the same: scans, chunks
and segments by the thousand, tiles that are larger than the picture. The limits are far above what cameras and programs
write, and keep the work of Pillow, and of these counts themselves, within about two seconds.
"""

import re
import struct

MOST_SCANS = 2**29  # scans times pixels of a JPEG; a baseline one has one scan, a progressive one about ten
ARITHMETIC = 8  # a scan of arithmetic coding counts as so many
MOST_SEGMENTS = 2**14  # of a JPEG
MOST_HEADER = 2**24  # bytes of a JPEG before its pixels
MOST_JUNK = 2**20  # bytes between segments, there
MOST_CHUNKS = 2**17  # of a PNG
MOST_COMPRESSED = 256  # chunks of compressed text or profiles, there
MOST_BLOCKS = 2**16  # of a GIF before its first picture
MOST_RUNS = 2**24  # pixels, and eight for a byte, of a BMP with run lengths
MOST_PARTS = 2**16  # strips or tiles of a TIFF; entries of its directory
SLACK = 2**24  # pixels by which tiles may exceed the picture

# In a scan, bytes FF 00 and the restart markers D0 to D7 are data.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
_GIF_BLOCK = re.compile(rb"[!,;]")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset({0xD8, 0xD9, *range(0xF0, 0xFE)})  # markers without a length
_END, _SCAN = 0xD9, 0xDA


def too_costly(data: bytes) -> str:
    """Why an image of these bytes is not to be decoded, with the remedy; "" when there is no reason, or no known format."""
    for magics, count in _COUNTS:
        if data.startswith(magics):
            return count(data)
    return ""


def _number(data: bytes, place: int, size: int, order: str = "big") -> int:
    """An unsigned number; what is beyond the end counts as absent."""
    return int.from_bytes(data[place : place + size], order)


def _jpeg(data: bytes) -> str:
    place, junk, segments, scans, pixels, weight = 2, 0, 0, 0, 0, 1
    while True:
        found = _MARKER.search(data, place)
        start = found.start() if found else len(data)
        junk += 0 if scans else max(0, start - place)
        if junk > MOST_JUNK or segments > MOST_SEGMENTS or (not scans and start > MOST_HEADER):
            return (
                f"a JPEG of more than {MOST_SEGMENTS} segments, or of more than {MOST_HEADER} bytes ({MOST_JUNK} of no "
                "meaning) before its pixels; save it again without its metadata"
            )
        if not found or (scans and found[1][0] == _END):
            break
        marker, place, segments = found[1][0], start + 2, segments + 1
        if marker in _FRAMES:
            pixels = max(pixels, _number(data, place + 3, 2) * _number(data, place + 5, 2))
            weight = max(weight, ARITHMETIC if marker > 0xC8 else 1)
        scans += marker == _SCAN
        place += 0 if marker in _BARE else max(2, _number(data, place, 2))
    if scans + weight > 2 and scans * pixels * weight > MOST_SCANS:
        kind = "of arithmetic coding" if weight > 1 else "of many scans"
        return (
            f"a JPEG {kind} takes too long to decode ({scans} scans of {pixels} pixels, at most {MOST_SCANS // weight} "
            "together); save it again as a baseline JPEG with Huffman coding, not a progressive one"
        )
    return ""


def _png(data: bytes) -> str:
    place, chunks, compressed = 8, 0, 0
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        if kind == b"IEND":
            break
        chunks, compressed = chunks + 1, compressed + (kind in (b"zTXt", b"iTXt", b"iCCP"))
        if chunks > MOST_CHUNKS or compressed > MOST_COMPRESSED:
            return (
                f"a PNG of more than {MOST_CHUNKS} chunks, or of more than {MOST_COMPRESSED} of text and profiles; save it "
                "again without its metadata"
            )
        place += 12 + _number(data, place, 4)
    return ""


def _gif(data: bytes) -> str:
    flags = _number(data, 10, 1)
    place, blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while found := _GIF_BLOCK.search(data, place):
        blocks += found.start() - place + 1  # what stands between blocks is passed over byte by byte
        if found[0] != b"!" or blocks > MOST_BLOCKS:
            break
        place = found.end() + 1
        while (size := _number(data, place, 1)) and blocks <= MOST_BLOCKS:
            place, blocks = place + 1 + size, blocks + 1
        place += 1
    if blocks > MOST_BLOCKS or not found and len(data) - place > MOST_BLOCKS:
        return f"a GIF of more than {MOST_BLOCKS} blocks of metadata; save it again without its metadata"
    return ""


def _bmp(data: bytes) -> str:
    """Pillow decodes run lengths byte by byte."""
    header, compression = _number(data, 14, 4, "little"), _number(data, 30, 4, "little")
    if header < 40 or compression not in (1, 2):
        return ""
    width, height = struct.unpack("<2i", data[18:26].ljust(8, b"\0"))
    size = len(data) - _number(data, 10, 4, "little")
    if abs(width * height) + 8 * size > MOST_RUNS:
        return (
            f"a BMP with run lengths of {width} x {abs(height)} pixels in {size} bytes is too large; save it as a PNG or "
            "as an uncompressed BMP"
        )
    return ""


def _tiff(data: bytes) -> str:
    tags = _tiff_tags(data)
    if tags is None:
        return f"a TIFF of more than {MOST_PARTS} entries; save it again without its metadata"

    def first(tag: int, default: int) -> int:
        return next(iter(tags.get(tag, ())), default)

    width, height = first(256, 0), first(257, 0)
    parts = len(tags.get(324, tags.get(273, ())))
    sides = (first(322, width), first(323, height)) if 324 in tags else (width, min(height, first(278, height)))
    part, samples = sides[0] * sides[1], min(first(277, 1), 6)
    if parts > MOST_PARTS or (parts or 1) * part > 2 * samples * width * height + SLACK:
        return (
            f"a TIFF of {width} x {height} pixels in {parts} parts of {sides[0]} x {sides[1]}; save it again in few strips, "
            "or as a PNG"
        )
    if first(259, 1) in (6, 7):
        scans, stored = data.count(b"\xff\xda"), sum(tags.get(325, tags.get(279, ())))
        if (scans > 1 and scans * part > MOST_SCANS) or stored > len(data):
            return (
                f"a TIFF whose {parts} parts of {part} pixels hold JPEG files of {scans} scans in {stored} bytes (at most "
                f"{MOST_SCANS} together, and {len(data)} bytes); save it again as a baseline JPEG"
            )
    return ""


_SIZES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8}  # of the types of whole numbers
_READ = (256, 257, 259, 273, 277, 278, 279, 322, 323, 324, 325)


def _tiff_tags(data: bytes) -> dict[int, list[int]] | None:
    """The whole numbers of the first directory that tell the cost; None when it has too many entries."""
    order = "little" if data[:2] == b"II" else "big"
    big = 43 in data[2:4]
    word, entry = (8, 20) if big else (4, 12)
    start = _number(data, 8 if big else 4, word, order)
    entries = _number(data, start, 8 if big else 2, order)
    start += 8 if big else 2
    if entries > MOST_PARTS:
        return None
    tags = {}
    for place in range(start, min(start + entries * entry, len(data) - entry + 1), entry):
        tag, kind = _number(data, place, 2, order), _number(data, place + 2, 2, order)
        if tag not in _READ or kind not in _SIZES or tag in tags:
            continue
        size, count, value = _SIZES[kind], _number(data, place + 4, word, order), place + 4 + word
        if count * size > word:
            value = _number(data, value, word, order)
        count = min(count, max(0, len(data) - value) // size, MOST_PARTS + 1)
        tags[tag] = [_number(data, value + size * index, size, order) for index in range(count)]
    return tags


_COUNTS = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    ((b"GIF87a", b"GIF89a"), _gif),
    (b"BM", _bmp),
    ((b"II", b"MM"), _tiff),
)
