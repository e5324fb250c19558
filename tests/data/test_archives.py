"""Parquet and tar against the libraries that wrote them, and everything that may be wrong with them."""

import gzip
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.records import DataError, RecordError
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import load_tokenizer
from k25_jax.vision.image import preprocess

MODEL, TOKENIZER = preset("tiny"), load_tokenizer()
DATA = DataConfig(packs=2, pack_patches=64, seq_len=256)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, "PNG")
    return file.getvalue()


def example(record):
    return prepare(record, TOKENIZER, DATA, MODEL)


def reason(record) -> str:
    with pytest.raises(RecordError) as error:
        example(record)
    return error.value.reason


# -------------------------------------------------------------------------------------------------------------- parquet
def test_parquet_rows_against_pyarrow(tmp_path):
    """Two files with small and unequal row groups, read in any order."""
    tables = []
    for number, rows in enumerate((23, 41)):
        tables.append(pa.table({"text": [f"{number} {i} é" for i in range(rows)], "id": list(range(rows))}))
        pq.write_table(tables[-1], tmp_path / f"{number}.parquet", row_group_size=7)
    source = open_source(SourceConfig(str(tmp_path)))
    expected = pa.concat_tables(tables).to_pylist()
    assert len(source) == len(expected) == 64
    for i in np.random.default_rng(0).permutation(64).tolist():
        assert source[i].data == expected[i]
    assert source[23].name == f"{tmp_path / '1.parquet'}[0]"
    assert len(open_source(SourceConfig(str(tmp_path / "*.parquet"), kind="parquet"))) == 64
    with pytest.raises(IndexError):
        source[64]


def test_parquet_media(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c.png").write_bytes(png(2))
    (tmp_path / "secret.png").write_bytes(png(2))
    images = [{"bytes": png(0), "path": "a.png"}, {"bytes": png(1), "path": None}, {"bytes": None, "path": "c.png"}]
    images += [{"bytes": None, "path": "../secret.png"}, {"bytes": None, "path": None}, None]
    pq.write_table(pa.table({"image": images, "caption": ["x"] * 6}), tmp_path / "data" / "a.parquet")
    source = open_source(SourceConfig(str(tmp_path / "data" / "a.parquet")))
    for i in range(3):
        (clip,) = example(source[i]).clips
        assert np.array_equal(clip.patches, preprocess(picture(i), MODEL.vision).patches)
    assert [reason(source[i]) for i in (3, 4, 5)] == ["path", "form", "form"]
    pq.write_table(pa.table({"image": [png(3)], "text": ["x"]}), tmp_path / "b.parquet")
    assert len(example(open_source(SourceConfig(str(tmp_path / "b.parquet")))[0]).clips) == 1
    boxes = pa.table({"image": [png(3)], "boxes": [[{"label": "x", "box": [0.0, 0.0, 30.0, 20.0]}]]})
    pq.write_table(boxes, tmp_path / "c.parquet")
    assert "x<box>0,0,500,500</box>" in TOKENIZER.decode(
        example(open_source(SourceConfig(str(tmp_path / "c.parquet")))[0]).tokens
    )


def test_a_column_that_is_not_utf8_costs_its_row_only(tmp_path):
    raw = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    source = open_source(SourceConfig(str(tmp_path / "a.parquet")))
    assert source[0].data == {"text": "one"} and source[2].data == {"text": "three"}
    assert source[1].data.reason == "utf-8"


def test_damaged_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i} " + "x" * 200 for i in range(100)]})
    pq.write_table(table, file, row_group_size=50, compression="gzip", write_page_checksum=True)
    data = bytearray(file.read_bytes())
    data[60:200] = bytes(140)  # in the first row group
    file.write_bytes(data)
    source = open_source(SourceConfig(str(file)))
    assert {source[i].data.reason for i in range(50)} == {"archive"}
    assert source[50].data == {"text": table["text"][50].as_py()}
    for content in (b"", b"PAR1", b"x" * 500, bytes(data[:-4]), bytes(data[: len(data) // 2])):
        file.write_bytes(content)
        with pytest.raises(DataError, match="a.parquet"):
            open_source(SourceConfig(str(file)))


def test_a_row_group_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("k25_jax.data.parquet.MAX_GROUP_BYTES", 1000)
    pq.write_table(pa.table({"text": ["x" * 2000]}), tmp_path / "a.parquet", use_dictionary=False)
    assert open_source(SourceConfig(str(tmp_path / "a.parquet")))[0].data.reason == "too large"


# ------------------------------------------------------------------------------------------------------------------ tar
def write_tar(path, members, form=tarfile.PAX_FORMAT):
    """The offsets of the members' headers."""
    offsets = []
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            offsets.append(file.tell())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return offsets


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_records(tmp_path, form):
    long = "d/" + "l" * (90 if form == tarfile.USTAR_FORMAT else 180)
    members = [
        ("cat.PNG", png(0)),
        ("cat.txt", b"a cat"),
        ("d/dog.json", b'{"ocr": "DOG"}'),
        ("d/dog.jpg", png(1)),
        ("page.0.png", png(2)),
        ("page.1.png", png(3)),
        ("page.json", b'{"parts": [{"image": "1.png"}, {"text": "mid"}, {"image": "page.0.png"}]}'),
        ("note.json", b'{"parts": [{"text": "only text"}]}'),
        (f"{long}.png", png(4)),
        (f"{long}.txt", b"long"),
    ]
    write_tar(tmp_path / "a.tar", members, form)
    source = open_source(SourceConfig(str(tmp_path / "a.tar")))
    assert [source[i].name for i in range(len(source))] == [
        f"{tmp_path / 'a.tar'}[{stem}]" for stem in ("cat", "d/dog", "page", "note", long)
    ]
    texts = ["a cat", "DOG", "mid", "only text", "long"]
    for i, (text, seeds) in enumerate(zip(texts, ([0], [1], [3, 2], [], [4]), strict=True)):
        found = example(source[i])
        assert text in TOKENIZER.decode(found.tokens)
        for clip, seed in zip(found.clips, seeds, strict=True):
            assert np.array_equal(clip.patches, preprocess(picture(seed), MODEL.vision).patches)


def test_tar_bytes_against_tarfile(tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(3):
        members = [(f"{shard}{i:04d}.txt", rng.integers(97, 123, rng.integers(1, 2000)).astype(np.uint8).tobytes())
                   for i in range(40)]  # fmt: skip
        write_tar(tmp_path / f"{shard}.tar", members)
    source = open_source(SourceConfig(str(tmp_path)))
    expected = []
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar") as tar:
            expected += [tar.extractfile(info).read().decode() for info in tar]
    assert len(source) == 120
    for i in rng.permutation(120).tolist():
        assert source[i].data == {"text": expected[i]}


def test_tar_media_need_a_caption_and_names_stay_inside(tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    members = [
        ("a.png", png()),
        ("b.0.png", png()), ("b.1.png", png()), ("b.txt", b"two"),
        ("c.json", b'{"parts": [{"text": "x"}, {"image": "../secret.png"}]}'),
        ("d.json", b'{"parts": [{"text": "x"}, {"image": "secret.png"}]}'),
        ("../../e.png", png()), ("../../e.txt", b"its name is only a name"),
        ("f.txt", b"\xff"),
        ("g.json", b"{"), ("g.png", png()),
        ("h.png", png()[:60]), ("h.txt", b"x"),
        ("i.csv", b"1,2"),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    source = open_source(SourceConfig(str(tmp_path / "a.tar")))
    found = [None if i == 4 else reason(source[i]) for i in range(len(source))]
    assert found == ["form", "form", "missing", "missing", None, "utf-8", "json", "image", "form"]
    assert len(example(source[4]).clips) == 1


def test_links_out_of_a_tar_and_devices_are_bad_records(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE), ("c.txt", tarfile.CHRTYPE),
                           ("d.txt", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("e.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"ok"))
    source = open_source(SourceConfig(str(tmp_path / "a.tar")))
    assert [reason(source[i]) for i in range(4)] == ["path", "path", "file", "file"]
    assert all(f"{'abcd'[i]}.txt" in str(source[i].data) for i in range(4))
    assert len(source) == 5 and source[4].data == {"text": "ok"} and source.left_out == {}


def test_a_tar_that_is_cut_off(tmp_path):
    offsets = write_tar(tmp_path / "a.tar", [(f"{i}.txt", bytes([97 + i]) * 1000) for i in range(5)])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: offsets[3] + 512 + 400])
    source = open_source(SourceConfig(str(tmp_path / "a.tar")))
    assert [source[i].data["text"] for i in range(3)] == [c * 1000 for c in "abc"]
    assert len(source) == 4 and source[3].data.reason == "truncated"
    (tmp_path / "a.tar").write_bytes(data[: offsets[3] + 200])  # within a header
    source = open_source(SourceConfig(str(tmp_path / "a.tar")))
    assert len(source) == 4 and source[3].data.reason == "archive"


@pytest.mark.parametrize("change", [(148, b"999999"), (0, bytes(512)[:8]), (124, b"\xff" * 12)])
def test_a_damaged_header_costs_its_member_only(tmp_path, change):
    offsets = write_tar(
        tmp_path / "a.tar", [(f"{i}.txt", bytes([97 + i]) * 1000) for i in range(5)], tarfile.GNU_FORMAT
    )
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at, new = offsets[2] + change[0], change[1]
    data[at : at + len(new)] = new
    if change[0] == 124:  # a negative size, with the checksum that goes with it
        header = bytes(data[offsets[2] : offsets[2] + 512])
        total = sum(header[:148]) + 256 + sum(header[156:])
        data[offsets[2] + 148 : offsets[2] + 156] = b"%06o\0 " % total
    (tmp_path / "a.tar").write_bytes(data)
    source = open_source(SourceConfig(str(tmp_path / "a.tar")))
    assert len(source) == 5 and source[2].data.reason == "archive"
    assert str(offsets[2]) in str(source[2].data)
    assert [source[i].data["text"][0] for i in (0, 1, 3, 4)] == ["a", "b", "d", "e"]


def test_compressed_and_other_files_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    data = (tmp_path / "a.tar").read_bytes()
    for name in ("b.tar.gz", "b.tgz", "b.tar"):
        (tmp_path / name).write_bytes(gzip.compress(data))
        with pytest.raises(DataError, match=f"{name} is compressed, .* decompress it to .tar"):
            open_source(SourceConfig(str(tmp_path / name)))
    for content in (b"", b"x" * 5000, bytes(10240)):
        (tmp_path / "c.tar").write_bytes(content)
        with pytest.raises(DataError, match="c.tar is no tar file, or holds no files"):
            open_source(SourceConfig(str(tmp_path / "c.tar")))


def test_a_member_that_is_too_large(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file:  # sparse
        info = tarfile.TarInfo("a.txt")
        info.size = 2**28 + 512
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    source = open_source(SourceConfig(str(tmp_path / "a.tar")))
    assert len(source) == 1 and source[0].data.reason == "too large"
