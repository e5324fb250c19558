"""Archives and tables that lie about their sizes: what reading them costs goes by their bytes, and the rest is found."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from k25_jax.config import SourceConfig
from k25_jax.data.records import DataError
from k25_jax.data.sources import open_source
from k25_jax.data.tar_headers import Link, Member, read_entries
from k25_jax.runtime.paths import Reader
from tests import runs

HUGE = 2**40


def header(name: str, size=0, kind: bytes = b"0", magic: bytes = b"ustar\00000", **fields: bytes) -> bytes:
    """A header block with the checksum that goes with it; sizes may be bytes."""
    block = bytearray(512)
    block[:100] = name.encode()[:100].ljust(100, b"\0")
    block[100:108], block[148:156], block[156:157] = b"0000644\0", b" " * 8, kind
    block[124:136] = size if isinstance(size, bytes) else binary(size) if not 0 <= size < 8**11 else b"%011o\0" % size
    block[257:265] = magic
    for place, value in fields.items():
        block[int(place[1:]) : int(place[1:]) + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + (number % 256**11).to_bytes(11, "big")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def opened(path, data: bytes):
    path.write_bytes(data)
    return open_source(SourceConfig(str(path)))


# ----------------------------------------------------------------------------------------------- the same as the library
def entries(path):
    """Ours, as (name, offset, size) of files, or (name, target) of links; folders by their names."""
    with Reader(path) as file:
        for entry in read_entries(file):
            if isinstance(entry.what, Member):
                assert entry.what.name == entry.name
                yield tuple(entry.what)
            else:
                yield (entry.name, entry.what.target) if isinstance(entry.what, Link) else entry.name


def theirs(path):
    with tarfile.open(path) as tar:
        for info in tar:
            if info.isreg():
                yield info.name, info.offset_data, info.size
            else:
                yield (info.name, info.linkname) if info.islnk() or info.issym() else info.name


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_good_archives_read_as_the_library_reads_them(tmp_path, form):
    rng = random.Random(form)
    letters = "ab-._ 0é" + ("" if form == tarfile.USTAR_FORMAT else "日\udce9̈")
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for _ in range(300):
            longest = 90 if form == tarfile.USTAR_FORMAT else rng.choice((20, 99, 100, 101, 400))
            words = ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(rng.randint(1, 3))]
            name = "/".join(words)[:45] if form == tarfile.USTAR_FORMAT else "/".join(words)
            if form == tarfile.USTAR_FORMAT and rng.random() < 0.3:
                name = "d" * 100 + "/" + name.encode()[:40].decode(errors="ignore").rstrip("/")
            info = tarfile.TarInfo(name.rstrip("/") or "x")
            info.pax_headers = {"comment": "x" * rng.randrange(2000)} if form == tarfile.PAX_FORMAT else {}
            info.mtime = rng.choice((0, 1.5, 2**33 if form != tarfile.USTAR_FORMAT else 7))
            info.type = rng.choice(
                (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
            )
            info.linkname = "to/" + name[:80] if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = rng.choice((0, 1, 511, 512, 513, 3000)) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    ours = list(entries(tmp_path / "a.tar"))
    assert ours == list(theirs(tmp_path / "a.tar")) and len(ours) == 300


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "pax"])
def test_what_gnu_tar_writes(tmp_path, form):
    (tmp_path / "d" / "e").mkdir(parents=True)
    names = ["a.txt", "é.txt", "d/b.txt"] + ([] if form == "v7" else ["d/e/" + "l" * 91 + ".txt"])
    for name in names:
        (tmp_path / name).write_text(name)
    subprocess.run(["tar", f"--format={form}", "-cf", "x.tar", *names, "d"], cwd=tmp_path, check=True)
    assert list(entries(tmp_path / "x.tar")) == list(theirs(tmp_path / "x.tar"))


def test_archives_one_after_another_are_all_read(tmp_path):
    data = b"".join(member(f"{i}.txt", b"%d" % i) + bytes(1024 * (i + 1)) for i in range(3))
    source = opened(tmp_path / "a.tar", data)
    assert [source[i].data["text"] for i in range(len(source))] == ["0", "1", "2"]


# ------------------------------------------------------------------------------------------------------ headers that lie
LIES = {
    **{f"type {kind.decode()} of {size}": header("x", size, kind)
       for kind in (b"L", b"K", b"x", b"g", b"X") for size in (HUGE, -1, 2**62, 10**7, -HUGE)},
    **{f"type {kind.decode()} of {size}": header("x.bin", size, kind)
       for kind in (b"5", b"S", b"0", b"M", b"Z", b"3", b"D") for size in (-1, -512, -HUGE)},
    "a sparse file beyond the end": header("x.bin", HUGE, b"S"),
    "an endless map of a sparse file": header("x.bin", 0, b"S", _482=b"\1") + bytes(504) + b"\1" + bytes(7),
    "no size": header("x.bin", b"abcdefghijk\0"),
    "a size with signs": header("x.bin", b"+1_0        "),
    "a size in ones": header("x.bin", b"\xff" * 12),
    "digits without end": header("x", 120_000, b"x") + padded(b"1" * 120_000),
    "keywords without end": header("x", 250_000, b"x") + padded(b"5 a=\n" * 50_000),
    "a record of no length": header("x", 40, b"x") + padded(b"0 path=b\n" * 4),
    "a record of a huge length": header("x", 40, b"x") + padded(b"99999999999 path=b\n"),
    "a size in a pax header": header("x", 22, b"x") + padded(b"22 size=1099511627776\n") + header("y.bin", 0),
    "a negative size in a pax header": header("x", 11, b"x") + padded(b"11 size=-5\n") + header("y.bin", 0),
    "a global name": header("x", 15, b"g") + padded(b"15 path=b.txt\n\n"),
    "bytes": b"\xaa" * 1024,
    "a header of zeros": bytes(512) + b"\xaa" * 512,
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_what_lies_is_named_and_what_follows_is_found(tmp_path, lie):
    good = [member(f"{name}.txt", name.encode() * 700) for name in "abcd"]
    source = opened(tmp_path / "a.tar", good[0] + LIES[lie] + good[1] + good[2] + good[3] + bytes(1024))
    records = [source[i] for i in range(len(source))]
    texts = [record.data["text"][0] for record in records if isinstance(record.data, dict)]
    bad = [record for record in records if not isinstance(record.data, dict)]
    assert texts == ["a", "b", "c", "d"]
    assert len(bad) == 1 and bad[0].data.reason in ("archive", "truncated", "file", "unknown medium")
    assert any(word in f"{bad[0].name} {bad[0].data}" for word in ("byte ", "x.bin", "y.bin"))


def test_a_name_that_is_lost_is_not_guessed(tmp_path):
    """The header of a long name cannot be read: what its member's own field has is the beginning of it."""
    name = "n" * 100
    data = (
        member("a.txt", b"a")
        + header("././@LongLink", HUGE, b"L")
        + header(name, 2)
        + padded(b"xx")
        + member("b.txt", b"b")
    )
    source = opened(tmp_path / "a.tar", data)
    found = [source[i].data for i in range(len(source))]
    assert found[0] == {"text": "a"} and found[-1] == {"text": "b"}
    assert [problem.reason for problem in found[1:-1]] == ["archive", "archive"]


def test_hard_links_that_bring_their_bytes_along_or_only_say_so(tmp_path):
    """Some programs write them with data, some with the size of the data alone."""
    link = {"_157": b"a.txt"}
    data = member("a.txt", b"a" * 600) + header("b.txt", 600, b"1", **link) + padded(b"b" * 600)
    data += (
        header("c.txt", 600, b"1", **link) + member("d.txt", b"d") + header("e.txt", 600, b"1", **link) + bytes(1024)
    )
    source = opened(tmp_path / "a.tar", data)
    assert [source[i].data["text"][:1] for i in range(len(source))] == ["a", "b", "a", "d", "a"]


def test_sparse_files_and_volumes_are_named(tmp_path):
    sparse = header("s.png", 512, b"S", _386=b"%011o\0%011o\0" % (0, 512), _483=b"%011o\0" % HUGE) + bytes(512)
    words = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n28 GNU.sparse.name=real.png\n"
    pax = header("x", len(words), b"x") + padded(words) + header("GNUSparseFile.0/real.png", 512) + bytes(512)
    data = sparse + member("s.txt", b"s") + pax + member("real.txt", b"r") + header("v", 0, b"V")
    source = opened(tmp_path / "a.tar", data + header("m.txt", 600, b"M") + bytes(1024) + member("k.png", b"k"))
    assert [source[i].name.rpartition("[")[2] for i in range(len(source))] == ["s]", "real]", "m]", "k]"]
    assert [source[i].data["image"] for i in (0, 1)] == ["png", "png"]
    for i, name in ((0, "s.png"), (1, "real.png")):
        with pytest.raises(ValueError, match=f"{name}: a sparse file"):
            source[i].root["png"]
    assert source[2].data.reason == "file" and "another volume" in str(source[2].data)


# ----------------------------------------------------------------------------------------------------- in a small process
LIMITED = """
    import json, resource, sys, time
    from k25_jax.config import SourceConfig
    from k25_jax.data.records import DataError
    from k25_jax.data.sources import open_source
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        source = open_source(SourceConfig(sys.argv[1]))
        found = [len(source), [str(source[i].data)[:300] for i in {*range(min(4, len(source))), len(source) - 1}]]
    except DataError as problem:
        found = [0, [str(problem)]]
    rose = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"records": found[0], "shown": found[1], "rose": rose * 1024, "seconds": time.monotonic() - start}))
"""


def cost(path) -> dict:
    """What opening a source took, in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(path)]
    done = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"0", b"S"])
def test_a_header_of_6_gb_in_a_file_of_holes(tmp_path, kind):
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(member("a.txt", b"a") + header("big.bin", 6 * 2**30, kind))
        file.truncate(file.tell() + 6 * 2**30)
        file.seek(0, os.SEEK_END)
        file.write(member("b.txt", b"b"))
    found = cost(tmp_path / "a.tar")
    assert found["records"] == 3 and "{'text': 'b'}" in found["shown"]
    assert found["rose"] < 64 * 2**20 and found["seconds"] < 20


def test_thirty_thousand_headers_that_lie(tmp_path):
    """Each is looked at once, though each says that all the rest belongs to it."""
    lies = [header(f"{i}.bin", HUGE, b"xgLKX"[i % 5 : i % 5 + 1]) for i in range(30_000)]
    (tmp_path / "a.tar").write_bytes(b"".join(lies) + member("b.txt", b"b"))
    found = cost(tmp_path / "a.tar")
    assert found["records"] == 30_001 and "{'text': 'b'}" in found["shown"]
    assert found["rose"] < 100 * 2**20 and found["seconds"] < 40


def test_lines_of_nothing_cost_nothing(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n')
        for _ in range(200):
            file.write(b"\n" * 2**20)
        file.write(b'{"text": "b"}')
    found = cost(tmp_path / "a.jsonl")
    assert found["records"] == 2 and found["shown"] == ["{'text': 'a'}", "{'text': 'b'}"]
    assert found["rose"] < 48 * 2**20


# -------------------------------------------------------------------------------------------------------------- parquet
def varint(number: int) -> bytes:
    out, number = bytearray(), (number << 1) ^ (number >> 63)  # zigzag
    number &= 2**64 - 1
    while True:
        out.append(number & 127 | (128 if number > 127 else 0))
        number >>= 7
        if not number:
            return bytes(out)


def patched(path, rows: int, claimed: int, which: str) -> None:
    """Change what the footer says of `rows` rows: of the file, its groups, or everything that has their number."""
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - size], data[-8 - size : -8]
    old, new = b"\x16" + varint(rows), b"\x16" + varint(claimed)  # fields of type i64, by one number after the last
    places = [i for i in range(len(footer)) if footer.startswith(old, i)]
    assert len(places) >= 3
    chosen = {"values": places[:-2], "file": places[:1], "all": places, "groups": places[1:]}[which]
    out, at = b"", 0
    for place in chosen:
        out += footer[at:place] + new
        at = place + len(old)
    footer = out + footer[at:]
    path.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("claimed", [10**9, 10**13, 2**62, -1, -(10**9), 1_000_000])
@pytest.mark.parametrize("which", ["file", "groups", "all"])
def test_more_rows_than_the_file_can_hold(tmp_path, claimed, which):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i} " + "x" * i for i in range(77)]}), path)
    assert len(open_source(SourceConfig(str(path)))) == 77
    patched(path, 77, claimed, which)
    with pytest.raises(DataError, match=r"a\.parquet is no Parquet file, or is damaged \(.*; fetch it again"):
        open_source(SourceConfig(str(path)))


def test_a_few_more_rows_than_there_are_cost_the_group(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(77)]}), path)
    patched(path, 77, 99, "all")
    source = open_source(SourceConfig(str(path)))
    assert len(source) == 99 and {source[i].data.reason for i in range(99)} == {"archive"}


@pytest.mark.parametrize("values", [["same"] * 10**6, [None] * 10**6])
def test_real_tables_that_compress_well_are_read(tmp_path, values):
    pq.write_table(pa.table({"text": pa.array(values, pa.string())}), tmp_path / "a.parquet", compression="none")
    source = open_source(SourceConfig(str(tmp_path / "a.parquet")))
    assert len(source) == 10**6 and source[999_999].data == {"text": values[0]}


def test_nested_and_empty_columns_are_read(tmp_path):
    parts = [[{"text": "a"}, {"text": "b"}], [], None, [{"text": None}]]
    pq.write_table(pa.table({"parts": parts, "id": pa.array([1, None, 3, None])}), tmp_path / "a.parquet")
    source = open_source(SourceConfig(str(tmp_path / "a.parquet")))
    assert [source[i].data["parts"] for i in range(4)] == parts


def test_one_long_value_repeated_is_too_large(tmp_path, monkeypatch):
    """A kilobyte of dictionary and runs that would be a gigabyte of values."""
    monkeypatch.setattr("k25_jax.data.parquet.MAX_GROUP_BYTES", 2**24)
    text = pa.array(["x" * 10**5]).take(pa.array(np.zeros(10**4, np.int32)))
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    source = open_source(SourceConfig(str(tmp_path / "a.parquet")))
    assert source[0].data.reason == "too large" and len(source) == 10**4


def test_a_footer_larger_than_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    for claimed in (2**31 - 1, 2**32 - 1, 100_000):
        pq.write_table(pa.table({"text": ["x"]}), path)
        path.write_bytes(path.read_bytes()[:-8] + claimed.to_bytes(4, "little") + b"PAR1")
        with pytest.raises(DataError, match="a footer of|a.parquet is no Parquet"):
            open_source(SourceConfig(str(path)))


# ----------------------------------------------------------------------------------------------------------------- noise
NOISE = """
    import random, sys
    from k25_jax.config import SourceConfig
    from k25_jax.data.records import DataError, RecordError
    from k25_jax.data.sources import open_source
    good, rng, opened = open(sys.argv[1], "rb").read(), random.Random(5), 0
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data) // 2 if sys.argv[1].endswith("parquet") else 0, len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            at = rng.randrange(len(data))
            del data[at : at + rng.choice((1, 512, 700))]
        with open(sys.argv[1], "wb") as file:
            file.write(data)
        try:
            source = open_source(SourceConfig(sys.argv[1]))
            assert len(source) < 10_000
            for i in range(min(len(source), 60)):
                source[i]
            opened += 1
        except DataError as problem:
            assert sys.argv[1] in str(problem)
    print(opened)
"""


@pytest.mark.parametrize("kind", ["parquet", "tar", "json"])
def test_damaged_bytes_end_no_process(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    records = [{"text": f"t{i}", "parts": [{"text": "a"}]} for i in range(50)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=20)
    elif kind == "json":
        path.write_text(json.dumps(records))
    else:
        links = header("l.txt", 0, b"1", _157=b"0.txt") + header("s.txt", 0, b"2", _157=b"l.txt")
        long = header("././@LongLink", 150, b"L") + padded(b"n" * 150) + member("n" * 100, b"x")
        pax = header("x", 15, b"x") + padded(b"15 path=b.txt\n\n") + member("c.txt", b"c")
        path.write_bytes(b"".join(member(f"{i}.txt", b"%d" % i) for i in range(9)) + links + long + pax + bytes(1024))
    command = [sys.executable, "-c", textwrap.dedent(NOISE), str(path)]
    done = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50
