"""Paths on this machine and in a bucket: what is one, writing, listing, reading by places, and what is refused."""

import pathlib
import resource

import pytest

from k25_jax.runtime import paths
from k25_jax.runtime.mirror import Mirror
from k25_jax.runtime.paths import PathError, to_path


@pytest.fixture(params=["here", "bucket"])
def root(request, tmp_path, bucket):
    """A folder of each kind; in the bucket one of its own for each test."""
    return tmp_path if request.param == "here" else to_path(f"{bucket}/{request.node.name.partition('[')[0]}")


# ------------------------------------------------------------------------------------------------------- what a path is
@pytest.mark.parametrize(
    "text", ["gs:/bucket/run", "gs://", "GS://bucket/run", "gcs://bucket", "gs://B_/x", "gs:///run", "gs://a/x"]
)
def test_what_only_looks_like_a_bucket_is_refused(text):
    with pytest.raises(PathError, match=f"^--workdir={text}: .*gs://BUCKET/PATH"):
        to_path(text, "--workdir")


def test_a_path_that_lost_its_slashes_is_refused():
    with pytest.raises(PathError, match="^gs:/bucket/run: "):
        to_path(pathlib.Path("gs://bucket/run"))


@pytest.mark.parametrize("text", ["s3://bucket/x", "https://example.org/x.tar", "hf://datasets/x"])
def test_other_addresses_are_refused(text):
    with pytest.raises(PathError, match=f"^train.init_from={text}: is an address, which is not read; download it"):
        to_path(text, "train.init_from")


def test_a_bucket_has_no_folder_above(bucket):
    with pytest.raises(PathError, match=r"has no folder '\.\.'"):
        to_path(f"{bucket}/a/../b")


def test_local_paths_are_what_they_were():
    for text in ("runs/a", "/tmp/x", "a:b", "digits:train:size=28", "gs", "~/x", "."):
        assert to_path(text) == pathlib.Path(text) and isinstance(to_path(text), pathlib.Path)


def test_what_must_be_local_is_refused_in_a_bucket(bucket):
    assert paths.local_only("runs/a", "--output", "") == pathlib.Path("runs/a")
    with pytest.raises(PathError, match=f"^--output={bucket}/x: cannot be in a bucket; gcloud storage cp"):
        paths.local_only(f"{bucket}/x", "--output", "gcloud storage cp")


def test_media_stay_below_their_root(root, tmp_path):
    paths.write(root / "a" / "b.png", b"x")
    assert paths.inside(root, "a/b.png") == paths.absolute(root) / "a" / "b.png"
    assert paths.inside(root, "./a//b.png") == paths.absolute(root) / "a" / "b.png"
    for outside in ("../b.png", "/etc/passwd", "a/../../x"):
        assert paths.inside(root, outside) is None


# ------------------------------------------------------------------------------------------------------ reading, writing
def test_files_are_written_whole_and_listed(root):
    paths.write(root / "a" / "one.txt", "first")
    paths.write(root / "a" / "one.txt", b"second")
    paths.write(root / "two.txt", b"")
    assert (root / "a" / "one.txt").read_text() == "second"
    assert paths.names(root) == ["a", "two.txt"] and paths.names(root / "a") == ["one.txt"]
    assert list(paths.walk(root)) == [(root, ["a"], ["two.txt"]), (root / "a", [], ["one.txt"])]
    assert paths.expand(f"{root}/*.txt") == [root / "two.txt"]
    assert paths.expand(f"{root}/**/*.txt") == [root / "a" / "one.txt", root / "two.txt"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    """A limit on file size stands for the full disk."""
    paths.write(tmp_path / "x", b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError):
            paths.write(tmp_path / "x", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "x").read_bytes() == b"before"


def test_what_changes_when_a_file_is_written_anew(root):
    paths.write(root / "x", b"123")
    size, time = paths.size_and_time(root / "x")
    paths.write(root / "x", b"456")
    assert size == 3 and paths.size_and_time(root / "x")[1] != time


def test_bytes_are_read_by_places(root, monkeypatch):
    data = bytes(range(256)) * 1024
    paths.write(root / "x", data)
    monkeypatch.setattr(paths, "AHEAD", (1000, 5000))
    with paths.Reader(root / "x") as reader:
        assert reader.size == len(data)
        for offset, size in ((0, 10), (10, 990), (995, 10), (1005, 3000), (70_000, 9000), (5, 5), (len(data) - 3, 9)):
            assert reader.read_at(size, offset) == data[offset : offset + size]
        assert reader.read_at(5, len(data) + 5) == b""
    assert paths.read_range(root / "x", 7, 100) == data[100:107] and paths.read_range(root / "x", 0, 3) == b""
    with paths.open_random(root / "x") as file:
        file.seek(5)
        assert file.read(4) == data[5:9]


def test_what_is_missing_is_named(root):
    for read in (paths.size_and_time, lambda path: paths.read_range(path, 5, 0), paths.Reader, paths.open_random):
        with pytest.raises(FileNotFoundError) as error:
            read(root / "missing")
        assert error.value.filename == str(root / "missing") or error.value.filename == root / "missing"


def test_what_another_process_writes_is_seen(bucket):
    """Listings that were remembered would hide it."""
    root = to_path(f"{bucket}/seen")
    paths.write(root / "a", b"")
    assert paths.names(root) == ["a"] and not (root / "b").exists()
    another = type(paths._store())(token="anon", skip_instance_cache=True)
    another.pipe_file(str(root / "b"), b"x")
    assert paths.names(root) == ["a", "b"] and (root / "b").exists()


def test_a_bucket_that_is_not_there_is_named(bucket):
    path = to_path("gs://k25-nowhere/run")
    with pytest.raises(PathError, match="^--workdir=gs://k25-nowhere/run: gs://k25-nowhere cannot be read .*no such"):
        paths.check_reachable(path, "--workdir")
    with pytest.raises(FileNotFoundError, match="no such bucket: 'gs://k25-nowhere/run'"):
        paths.names(path)
    with pytest.raises(FileNotFoundError, match="no such bucket: 'gs://k25-nowhere/run'"):
        paths.write(path, b"x")
    there = to_path(f"{bucket}/probed")
    paths.check_reachable(there, "--workdir", write=True)
    assert not there.exists()  # nothing is left


def test_what_no_library_reads_there_is_copied_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = to_path(f"{bucket}/shards/x.bin")
    paths.write(file, b"one")
    (copy,) = paths.copies([file], "data.sources")
    assert copy.read_bytes() == b"one" and copy.name == "x.bin"
    monkeypatch.setattr(paths, "download", None)
    assert paths.copies([file], "data.sources") == [copy]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths.write(file, b"two!")
    assert paths.copies([file], "data.sources")[0].read_bytes() == b"two!"
    paths.write(file, b"three")
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 8}))
    with pytest.raises(PathError, match="data.sources: .*/shards has 5 bytes to copy .*gcsfuse"):
        paths.copies([file], "data.sources")


# ------------------------------------------------------------------------------------------------------ files that grow
def test_a_file_that_grows_is_there_when_it_is_published(root):
    mirror = Mirror(root, ("log",))
    with open(mirror.folder / "log", "ab", buffering=0) as file:
        file.write(b"one\n")
        mirror.publish()
        assert (root / "log").exists() is (mirror.folder == root)
        mirror.publish(wait=True)
        assert (root / "log").read_bytes() == b"one\n"
        file.write(b"two\n")
    mirror.close()
    again = Mirror(root, ("log", "another"))
    assert (again.folder / "log").read_bytes() == b"one\ntwo\n" and not (again.folder / "another").exists()
    again.close()


def test_it_is_published_now_and_then_in_the_background(bucket, monkeypatch):
    monkeypatch.setattr("k25_jax.runtime.mirror.EVERY", 0.0)
    root = to_path(f"{bucket}/background")
    mirror = Mirror(root)
    (mirror.folder / "log").write_bytes(b"one\n")
    mirror.publish()
    mirror._work.result()
    assert (root / "log").read_bytes() == b"one\n"
    mirror.close()


def test_two_that_write_to_one_object_are_told(bucket):
    root = to_path(f"{bucket}/two")
    paths.write(root / "log", b"one\n")
    mirror = Mirror(root, ("log",))
    paths.write(root / "log", b"of another\n")
    (mirror.folder / "log").write_bytes(b"one\ntwo\n")
    with pytest.raises(PathError, match="two/log: another process has written to it"):
        mirror.close()
    assert (root / "log").read_bytes() == b"of another\n"
