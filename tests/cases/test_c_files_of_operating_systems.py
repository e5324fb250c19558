"""What operating systems add to folders and archives is skipped by one rule in both, and counted."""

import io
import tarfile

import pytest
from PIL import Image

from k25_jax.config import SourceConfig
from k25_jax.data.captions import is_system_file
from k25_jax.data.sources import open_source

SYSTEM = "file of an operating system"


def png():
    file = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(file, "PNG")
    return file.getvalue()


def write(kind, tmp_path, names, prefix=""):
    """Files of these names in a folder or a tar: a picture, or a text of the name."""
    out = tmp_path / ("a.tar" if kind == "tar" else "folder")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            data = png() if name.endswith("cat.png") and "._" not in name else name.encode()
            info = tarfile.TarInfo(prefix + name if kind == "tar" else name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            file = tmp_path / "folder" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return open_source(SourceConfig(str(out)))


ADDED = [
    "._cat.png", "._cat.txt", "._.DS_Store", ".DS_Store", "__MACOSX/._cat.png", "__MACOSX/cat.txt", "__macosx/d/cat.json",
    "Thumbs.db", "thumbs.db", "ehthumbs.db", "desktop.ini", "Desktop.ini", "@eaDir/cat.png/SYNOFILE_THUMB.jpg",
    "d/@eaDir/x.txt", ".hidden.txt", ".git/config.txt", ".ipynb_checkpoints/a.txt", ".Spotlight-V100/x.txt", ".Trashes/a.txt",
    "$RECYCLE.BIN/a.txt", "System Volume Information/a.txt", "lost+found/a.txt", "#recycle/b.txt", ".nfs0001.txt",
    "cat.png@SynoEAStream", "Icon\r", ".directory", ".fseventsd/a.txt", "d/.DS_Store", "d/e/._x.txt",
]  # fmt: skip
KEPT = ["_cat.txt", "cat._txt.txt", "ds_store.txt", "my__macosx.txt", "thumbs.db.txt", "desktop.txt"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_pair_among_what_was_added(tmp_path, kind, prefix):
    source = write(
        kind, tmp_path, ["cat.png", "cat.txt", *ADDED, "zoo.md" if kind == "folder" else "d/zoo.txt"], prefix
    )
    assert [set(source[i].data) for i in range(len(source))] == [{"image", "text"}, {"text"}]
    assert source.left_out == {SYSTEM: len(ADDED)}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_order_does_not_matter_and_nothing_is_double(tmp_path, kind):
    source = write(kind, tmp_path, ["._cat.png", "cat.png", "._cat.txt", "cat.txt"])
    assert len(source) == 1 and source[0].data["text"] == "cat.txt" and source.left_out == {SYSTEM: 2}


@pytest.mark.parametrize("name", ADDED)
def test_one_rule(name):
    assert is_system_file(name) and is_system_file(f"./{name}") and is_system_file(f"a/b/{name}")


@pytest.mark.parametrize(
    "name", ["cat.txt", "./cat.txt", "../cat.txt", "a.b/c.txt", "..", "", "a..txt", *KEPT[:5], "desktop.txt"]
)
def test_other_names_stay(name):
    assert not is_system_file(name)


def test_the_folder_itself_may_be_hidden(tmp_path):
    hidden = tmp_path / ".cache" / "@eaDir"
    hidden.mkdir(parents=True)
    (hidden / "a.txt").write_text("a")
    assert len(open_source(SourceConfig(str(hidden)))) == 1


def test_shards_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("._a.jsonl", ".DS_Store", "._b.tar", ".c.parquet", "._d.array_record"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    source = open_source(SourceConfig(str(tmp_path)))
    assert len(source) == 1 and source[0].data == {"text": "a"} and source.left_out == {SYSTEM: 5}
