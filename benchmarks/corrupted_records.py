"""100,000 corrupted records of every form and kind of source through `k25 data build`: is every one accounted for?

Fuzzed and cut-off media, decompression bombs, a picture that decodes for minutes, bad UTF-8, broken and absurdly nested
JSON, wrong types, absurd boxes, paths that lead out of the folder, damaged archives; among them one clean record in
twenty, which must all be built. The figure is the number of records that are neither built nor named with a reason, plus
clean ones that were lost; the bound is 0. Prints the reasons and records a second; with --json one JSON line.
"""

import argparse
import base64
import dataclasses
import functools
import io
import json
import random
import struct
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.build import build
from k25_jax.data.sources import open_source
from k25_jax.data.statistics import Reader

CLEAN = 0.05  # share of records that nothing is wrong with
DEADLINE = 10.0
SHARES = {"jsonl": 0.5, "arrayrecord": 0.2, "parquet": 0.1, "webdataset": 0.1, "folder": 0.1}
DATA = DataConfig(packs=2, pack_patches=1024, max_image_patches=256, max_frame_patches=64, seq_len=2048)


# --------------------------------------------------------------------------------------------------------------- media
def picture(form: str, side: int = 48) -> bytes:
    """A small picture in one format."""
    y, x = np.mgrid[:side, : side + 16]
    pixels = np.stack([x * 4, y * 5, (x * y) % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def video() -> bytes:
    """Ten frames of MP4."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(10):
            pixels = np.full((32, 48, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def png_bomb(width: int, height: int, honest: bool) -> bytes:
    """A PNG that says it is so large; honest: it really holds as many zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    raw = zlib.compress(bytes((width + 7) // 8 + 1) * height if honest else b"\0" * 100, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", raw) + chunk(b"IEND", b"")


def jpeg_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: few bytes, minutes of work."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "grey").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


MEDIA = {form: picture(form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")} | {"MP4": video()}


@functools.cache
def bombs() -> tuple[bytes, ...]:
    """Small files that are large or long to decode."""
    return (
        png_bomb(2**31 - 1, 2**31 - 1, honest=False),
        png_bomb(200_000, 200_000, honest=False),
        png_bomb(30_000, 30_000, honest=True),
        png_bomb(11_000, 11_000, honest=True),
        jpeg_bomb(6000, 400),
    )


def fuzz(data: bytes, rng: random.Random) -> bytes:
    """Cut off, or with bytes changed, inserted or removed."""
    data = bytearray(data)
    match rng.randrange(5):
        case 0:
            return bytes(data[: rng.randrange(len(data))])
        case 1:
            for _ in range(rng.randint(1, 30)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(50)] = rng.randbytes(rng.randrange(50))
        case 3:
            at = rng.randrange(min(64, len(data) - 8))  # sizes in headers
            data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
        case 4:
            return rng.randbytes(rng.randrange(1, 400))
    return bytes(data)


def bad_medium(rng: random.Random) -> tuple[str, bytes]:
    """image or video, and its bytes."""
    if rng.random() < 0.0005:
        return "image", rng.choice(bombs())
    form = rng.choice(list(MEDIA) if rng.random() < 0.3 else ["PNG", "JPEG", "WEBP"])
    return ("video" if form == "MP4" else "image"), fuzz(MEDIA[form], rng)


# -------------------------------------------------------------------------------------------------------------- records
WRONG = (None, True, -1, 1e308, [], {}, [[]], {"a": 1}, "", "\ud800", [None], "x" * 5000, 10**30)
ESCAPES = (
    "../secret.png",
    "/etc/passwd",
    "sub/../../secret.png",
    "link.png",
    "loop",
    "a\0.png",
    "",
    ".",
    "no.png",
    "//",
)


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def clean(rng: random.Random) -> dict:
    """A record that nothing is wrong with, in any form."""
    image = {"image_base64": coded(MEDIA[rng.choice(("PNG", "JPEG", "WEBP"))])}
    box = [4, 5, 30.5, 40]
    return rng.choice((
        {"text": "a clean text"},
        image | {"caption": "a clean picture"},
        image | {"ocr": "CLEAN"},
        image | {"boxes": [{"label": "clean", "box": box}]},
        image | {"elements": [{"type": "button", "text": "OK", "box": box}]},
        {"parts": [{"text": "before "}, image, {"text": " after"}]},
        {"video_base64": coded(MEDIA["MP4"]), "caption": "a clean video"},
        {"messages": [{"role": "user", "content": [image, {"text": "what?"}]}, {"role": "assistant", "content": "it"}]},
    ))  # fmt: skip


def bad_box(rng: random.Random):
    """A box that no picture has."""
    wild = (float("nan"), float("inf"), -1e30, 1e308, 10**400, "7", None, True, -500, 99999, [1])
    return rng.choice((
        [rng.choice(wild) for _ in range(4)], [30, 30, 3, 3], [5, 5, 5, 5], [1, 2, 3], [1, 2, 3, 4, 5], "1,2,3,4", {}, None,
        [10, 10, 10_000, 20], {"x": 1},
    ))  # fmt: skip


def bad_json(rng: random.Random) -> bytes:
    """A line that something is wrong with: of bytes, JSON, types, boxes, paths or media."""
    record = clean(rng)
    match rng.randrange(8):
        case 0:
            line = bytearray(json.dumps(record).encode())
            line[rng.randrange(len(line))] = rng.randrange(128, 256)
            return bytes(line).replace(b"\n", b"?")
        case 1:
            line = json.dumps(record).encode()
            return line[: rng.randrange(2, len(line))]
        case 2:
            depth = rng.choice((10, 1000, 60_000))
            return rng.choice(
                (b'{"text": ' + b"[" * depth, b'{"parts": ' + b'[{"a":' * depth, b"[" * depth + b"]" * depth)
            )
        case 3:
            for key in rng.sample(sorted(record), rng.randint(1, len(record))):
                record[key] = rng.choice(WRONG)
        case 4:
            label = rng.choice(("cat", "cat", "<box>1</box>", 5, ""))
            entry = {"label": label, "type": label, "box": bad_box(rng)}
            record = {"image_base64": coded(MEDIA["PNG"]), rng.choice(("boxes", "elements")): [entry]}
        case 5:
            path, kind = rng.choice(ESCAPES), rng.choice(("image", "video"))
            record = rng.choice(({kind: path, "caption": "x"}, {"parts": [{"text": "x"}, {kind: path}]}))
        case 6:
            kind, data = bad_medium(rng)
            record = {f"{kind}_base64": coded(data), "caption": "damaged"}
        case 7:
            role, content = rng.choice(("user", "root", 5, None)), rng.choice((*WRONG, [{"image": 5}], "text"))
            record = {"messages": rng.choice(([{"role": role, "content": content}], *WRONG))}
    return json.dumps(record).encode()


# -------------------------------------------------------------------------------------------------------------- sources
@dataclasses.dataclass
class Given:
    """A source that was written: where, how many records, and which of them are clean."""

    path: str
    records: int
    clean: set[int]


def _lines(count: int, rng: random.Random) -> tuple[list[bytes], set[int]]:
    good = {i for i in range(count) if rng.random() < CLEAN}
    return [json.dumps(clean(rng)).encode() if i in good else bad_json(rng) for i in range(count)], good


def write_jsonl(folder: Path, count: int, rng: random.Random) -> Given:
    lines, good = _lines(count, rng)
    (folder / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "loop").symlink_to(folder / "loop")
    return Given(str(folder / "data.jsonl"), count, good)


def write_arrayrecord(folder: Path, count: int, rng: random.Random) -> Given:
    """One shard whose records are bad, and one whose compressed bytes were changed."""
    lines, good = _lines(count, rng)
    half = count // 2
    for number, part in enumerate((lines[:half], lines[half:])):
        writer = ArrayRecordWriter(str(folder / f"x.array_record-{number:05d}-of-00002"), "group_size:1")
        for line in part:
            writer.write(line)
        writer.close()
    file = folder / "x.array_record-00001-of-00002"
    data = bytearray(file.read_bytes())
    for _ in range(max(1, count // 100)):
        data[rng.randrange(2**16, max(2**16 + 1, len(data) * 8 // 10))] ^= 0xFF  # not its head or its index
    file.write_bytes(data)
    return Given(str(folder), count, {i for i in good if i < half})


def write_parquet(folder: Path, count: int, rng: random.Random) -> Given:
    """Pictures as {bytes, path}, captions of which some are not UTF-8, boxes as JSON has no place for them."""
    good = {i for i in range(count) if rng.random() < CLEAN}
    images, captions = [], []
    for i in range(count):
        image, caption = {"bytes": MEDIA["PNG"], "path": None}, b"clean"
        if i not in good:
            image = rng.choice((None, {"bytes": None, "path": rng.choice(ESCAPES)}, {"bytes": fuzz(MEDIA["JPEG"], rng),
                                "path": "a.jpg"}, {"bytes": b"", "path": None}))  # fmt: skip
            caption = rng.choice((b"\xff\xfe", b"text", b" ", b"\xc3("))
        images.append(image)
        captions.append(caption)
    captions = pa.array(captions, pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(captions), captions.buffers())  # not checked to be UTF-8
    table = pa.table(
        {"image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "caption": strings}
    )
    pa.parquet.write_table(table, folder / "a.parquet", row_group_size=64)
    return Given(str(folder / "a.parquet"), count, good)


def write_webdataset(folder: Path, count: int, rng: random.Random) -> Given:
    """Neighbours of one stem; where the header of the second was damaged, its piece of the archive counts as one more."""
    good, damaged = {i for i in range(count) if rng.random() < CLEAN}, {}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            kind, medium = ("image", MEDIA["JPEG"]) if i in good else bad_medium(rng)
            text = b"clean" if i in good else rng.choice((b"text", b"\xff", b"", bad_json(rng)))
            side = "txt" if i in good else rng.choice(("txt", "json"))
            above = "" if i in good else rng.choice(("", "../", "/etc/"))
            for ending, data in (("jpg" if kind == "image" else "mp4", medium), (side, text)):
                info = tarfile.TarInfo(f"{above}{i:06d}.{ending}")
                info.size = len(data)
                if i not in good and ending == side and rng.random() < 0.02:
                    damaged[i] = out.tell()
                tar.addfile(info, io.BytesIO(data))
    data = bytearray(out.getvalue())
    for offset in damaged.values():
        data[offset + 148 : offset + 154] = b"999999"  # its checksum
    (folder / "a.tar").write_bytes(data)
    before = {i: sum(other < i for other in damaged) for i in good}
    return Given(str(folder / "a.tar"), count + len(damaged), {i + before[i] for i in good})


def write_folder(folder: Path, count: int, rng: random.Random) -> Given:
    """Pictures and videos, each with a text or JSON beside it."""
    files, names = [], set()
    for i in range(count):
        good = rng.random() < CLEAN
        kind, medium = ("image", MEDIA["PNG"]) if good else bad_medium(rng)
        ending = ".png" if kind == "image" else ".mp4"
        side, text = (
            (".txt", b"clean") if good else rng.choice(((".txt", b"\xff"), (".txt", b"x"), (".json", bad_json(rng))))
        )
        (folder / f"{i:06d}{ending}").write_bytes(medium)
        (folder / f"{i:06d}{side}").write_bytes(text)
        files.append(f"{i:06d}{ending}")
        names |= {f"{i:06d}{ending}"} if good else set()
    return Given(str(folder), count, {number for number, name in enumerate(sorted(files)) if name in names})


WRITERS: dict[str, Callable[[Path, int, random.Random], Given]] = {
    "jsonl": write_jsonl, "arrayrecord": write_arrayrecord, "parquet": write_parquet, "webdataset": write_webdataset,
    "folder": write_folder,
}  # fmt: skip


def write_all(folder: Path, count: int, seed: int) -> list[Given]:
    """All kinds of sources, `count` records together."""
    (folder / "secret.png").write_bytes(MEDIA["PNG"])
    given = []
    for kind, share in SHARES.items():
        (folder / kind).mkdir()
        given.append(WRITERS[kind](folder / kind, int(count * share), random.Random(f"{seed} {kind}")))
    return given


# --------------------------------------------------------------------------------------------------------------- figure
def account(folder: Path, count: int, seed: int, workers: int = 0, report=lambda done, total, bad: None) -> dict:
    """Write the records, build a data set of them, and compare."""
    given = write_all(folder, count, seed)
    reader = Reader(tuple(SourceConfig(source.path) for source in given), DATA, preset("tiny"))
    start = time.monotonic()
    manifest = build(reader, folder / "built", 0, workers, DEADLINE, report)
    seconds = time.monotonic() - start
    bad = [json.loads(line) for line in (folder / "built" / "bad.jsonl").read_text().splitlines()]
    expected = sum(source.records for source in given)
    sources = [open_source(config) for config in reader.sources]
    clean_names = {source.label(i) for source, one in zip(sources, given, strict=True) for i in one.clean}
    lost = clean_names & {entry["name"] for entry in bad}
    readable = len(open_source(SourceConfig(str(folder / "built"))))
    unaccounted = abs(expected - readable - len(bad)) + sum(not entry["reason"] for entry in bad)
    return {
        "given": expected,
        "built": manifest["good"],
        "bad": manifest["bad"],
        "clean": len(clean_names),
        "clean_lost": sorted(lost),
        "unaccounted": unaccounted,
        "records_a_second": expected / seconds,
        "seconds": seconds,
        "forms": {form: row["records"] for form, row in manifest["forms"].items()},
        "unknown": [entry["detail"] for entry in bad if entry["reason"] == "unknown"][:20],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corrupted-") as folder:
        found = account(Path(folder), args.records, args.seed, args.workers)
    figure = found["unaccounted"] + len(found["clean_lost"])
    out = {"name": "corrupted_records", "figure": figure, "bound": 0, "ok": figure == 0, **found}
    if args.json:
        print(json.dumps(out))
        return
    print(f"given {found['given']:,d}: built {found['built']:,d}, bad {sum(found['bad'].values()):,d}")
    for reason, number in found["bad"].items():
        print(f"  {reason:10s} {number:7,d}")
    print(
        f"clean ones {found['clean']:,d}, of which {len(found['clean_lost'])} were lost; built by form {found['forms']}"
    )
    print(f"{found['records_a_second']:.0f} records/s, {found['seconds']:.0f} s; unaccounted {figure} (bound 0)")
    for detail in found["unknown"]:
        print(f"  unknown: {detail}")


if __name__ == "__main__":
    main()
