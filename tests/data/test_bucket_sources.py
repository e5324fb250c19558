"""Every kind of source read from a bucket gives what it gives from a disk, with the media that its records name."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

import buckets
from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.media import MediaReader, resolve_media
from k25_jax.data.records import DataError, RecordError
from k25_jax.data.sources import open_source
from k25_jax.runtime.paths import to_path, write
from k25_jax.text.tokenizer import load_tokenizer
from k25_jax.text.tokenizer_json import byte_level_files


@pytest.fixture(scope="module")
def both(tmp_path_factory, bucket):
    """A folder of sources of all kinds, here and in the bucket."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    pictures = {}
    for number in range(3):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (28, 28, 3)).astype(np.uint8)).save(file, "PNG")
        pictures[f"{number}.png"] = file.getvalue()
    records = [{"image": name, "text": f"no. {name}"} for name in pictures] + [{"text": "a text " * 50}]
    for kind in ("lines", "list", "captions", "tars", "tables", "shards", "split"):
        (folder / kind).mkdir()
    for kind in ("lines", "list", "captions", "split"):
        for name, data in pictures.items():
            (folder / kind / name).write_bytes(data)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "lines" / "records.jsonl").write_text(lines)
    (folder / "split" / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{n}", "text": "x"}}\n' for n in pictures)
    )
    (folder / "list" / "records.json").write_text(json.dumps(records))
    for name in pictures:
        (folder / "captions" / name).with_suffix(".txt").write_text(f"caption of {name}")
    with tarfile.open(folder / "tars" / "a.tar", "w") as tar:
        for name, data in pictures.items():
            for member, content in ((name, data), (name.replace("png", "txt"), b"caption")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = pa.table({"image": list(pictures.values()), "text": list(pictures)})
    pa.parquet.write_table(table, folder / "tables" / "t.parquet", row_group_size=2)
    writer = ArrayRecordWriter(str(folder / "shards" / "data.array_record-00000-of-00001"), "group_size:1")
    writer.write(json.dumps({"text": "inside"}).encode())
    writer.close()
    return folder, buckets.copied(folder, f"{bucket}/sources")


@pytest.mark.parametrize(
    "path",
    ["lines", "lines/records.jsonl", "lines/*.jsonl", "list/records.json", "captions", "captions/1.png", "split", "tars",
     "tars/a.tar", "tables", "tables/*.parquet", "shards"],
)  # fmt: skip
def test_a_source_in_a_bucket_gives_what_it_gives_on_a_disk(both, path, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, address = both
    here, there = (open_source(SourceConfig(f"{root}/{path}")) for root in (folder, address))
    assert len(there) == len(here) > 0 and there.left_out == here.left_out
    data = DataConfig(packs=4, pack_patches=64)
    for number in range(len(here)):
        ours, theirs = here[number], there[number]
        assert theirs.name.replace(address, str(folder)) == ours.name
        parts = [resolve_media(record.data, record.root) for record in (ours, theirs)]
        if "image" in parts[0]:
            pixels = [MediaReader("x", data, preset("tiny")).pixels({"image": part["image"]}) for part in parts]
            assert (pixels[0] == pixels[1]).all()
            parts = [{name: value for name, value in part.items() if name != "image"} for part in parts]
        assert parts[0] == parts[1]


def test_media_in_a_bucket_stay_in_their_folder(both):
    root = to_path(f"{both[1]}/lines")
    for path, reason in (("../captions/0.png", "path"), ("/lines/0.png", "path"), ("9.png", "missing")):
        with pytest.raises(RecordError) as error:
            resolve_media({"image": path}, root)
        assert error.value.reason == reason


@pytest.mark.parametrize("path", ["nothing", "nothing.jsonl", "lines/*.parquet"])
def test_a_source_that_is_not_there_is_named(both, path):
    with pytest.raises(DataError, match="data.sources: there is nothing at gs://k25-tests/sources/"):
        open_source(SourceConfig(f"{both[1]}/{path}"))


def test_a_bucket_that_cannot_be_read_is_named(bucket):
    with pytest.raises(DataError, match="^data.sources=gs://k25-nowhere/x.jsonl: gs://k25-nowhere cannot be read"):
        open_source(SourceConfig("gs://k25-nowhere/x.jsonl"))
    with pytest.raises(DataError, match="^data.sources=gs:/x.jsonl: a path in a bucket is written gs://BUCKET/PATH"):
        open_source(SourceConfig("gs:/x.jsonl"))


def test_a_vocabulary_in_a_bucket(bucket):
    folder = to_path(f"{bucket}/vocabulary")
    for name, contents in byte_level_files().items():
        write(folder / name, json.dumps(contents))
    assert load_tokenizer(str(folder)).encode("ab\n") == load_tokenizer().encode("ab\n")
