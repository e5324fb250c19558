"""Addresses of media: data URLs and files below the root are read, everything else is refused."""

import base64
import os
import pathlib

import pytest

from k25_jax.serving.errors import ApiError
from k25_jax.serving.media import MediaOpener


@pytest.fixture
def root(tmp_path):
    """A folder with files, links and a pipe; what lies outside is "secret"."""
    root = tmp_path / "root"
    (root / "in" / "in").mkdir(parents=True)
    (root / "a b.png").write_bytes(b"one")
    (root / "in" / "in" / "b.png").write_bytes(b"two")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "c").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    return root


def test_files_below_the_root_are_read(root):
    opener = MediaOpener(root, 100)
    for url, data in (
        ("a b.png", b"one"),
        ("in/in/b.png", b"two"),
        ("./in//in/./b.png", b"two"),
        (f"{root}/in/in/b.png", b"two"),
        (f"file://{root}/a%20b.png", b"one"),
        (f"file://localhost{root}/in/in/b.png", b"two"),
    ):
        assert opener.read(url, "here") == data


@pytest.mark.parametrize(
    "url",
    [
        "../secret", "in/../../secret", "..", "/etc/passwd", "{root}/../secret", "{root}-2/c", "file:///etc/passwd",
        "file://{root}/%2e%2e/secret", "file://elsewhere{root}/a%20b.png", "link", "out/secret", "in/../link", "loop", "pipe",
        "in", "in/", "", ".", "{root}", "none.png", "a b.png/x", "nul\0byte", "x" * 5000, "FILE:///etc/passwd",
        "file://{root}/link", "http://127.0.0.1/x", "HTTPS://example.com/x", "ftp://x/y", "//host/share", "gopher:x",
    ],
)  # fmt: skip
def test_no_address_leaves_the_root(root, url):
    with pytest.raises(ApiError) as found:
        MediaOpener(root, 100).read(url.format(root=root), "here")
    assert found.value.param == "here" and found.value.status == 400
    assert "secret" not in str(found.value)


def test_no_descriptor_is_left_open(root):
    count = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    before = count()
    for url in ("a b.png", "link", "in", "pipe", "out/secret", "none", "in/in/b.png"):
        try:
            MediaOpener(root, 2).read(url, "here")
        except ApiError:
            pass
    assert count() == before


def test_the_files_of_a_request_are_bounded_together(root):
    opener = MediaOpener(root, 5)
    opener.read("a b.png", "here")
    with pytest.raises(ApiError, match="5 bytes in all"):
        opener.read("in/in/b.png", "here")


def test_without_a_root_there_are_no_files(root):
    for url in (f"{root}/a b.png", "a b.png", f"file://{root}/a%20b.png"):
        with pytest.raises(ApiError, match="--media_root"):
            MediaOpener(None, 100).read(url, "here")


def test_data_urls():
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    for head in ("data:image/png;base64,", "data:;base64,", "DATA:video/mp4;base64,"):
        assert MediaOpener(None, 0).read(head + text, "here") == data
    assert MediaOpener(None, 0).read("data:image/png;base64," + text.rstrip("="), "here") == data
    for bad in ("data:image/png;base64", "data:image/png;base64," + text[:-3], "data:;base64,@@@@"):
        with pytest.raises(ApiError, match="here: .*data"):
            MediaOpener(None, 0).read(bad, "here")


def test_a_folder_that_is_swapped_for_a_link_meanwhile_is_not_followed(root, monkeypatch):
    """The attack between looking and opening: the link is put in place when the root has been opened already."""
    real, swapped = os.open, []

    def swap(path, flags, *more, **named):
        if path == "in" and not swapped:
            swapped.append((root / "in").rename(root / "was"))
            (root / "in").symlink_to(root.parent)
        return real(path, flags, *more, **named)

    (pathlib.Path(root.parent) / "in").mkdir()
    (root.parent / "in" / "b.png").write_bytes(b"secret")
    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(ApiError, match="cannot be read"):
        MediaOpener(root, 100).read("in/in/b.png", "here")
    assert swapped
