"""The life of a kernel without a pool, and what surrounds it."""

import logging
import os
import tempfile

import numpy as np
import psutil
import pytest

from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.kernel import Limits
from k25_jax.sandbox.observation import Excerpt, InfrastructureError
from k25_jax.sandbox.sandbox import Sandbox

RED = np.full((6, 8, 3), (200, 0, 10), np.uint8)


def test_closing_leaves_nothing_behind(bwrap, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    with Sandbox() as sandbox:
        sandbox.run("import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)")
        first = psutil.Process(sandbox._kernel._process.pid)
        inside = [first, *first.children(recursive=True)]
        assert {"bwrap", "sleep"} < {process.name() for process in inside}
    assert not any(process.is_running() for process in inside)
    assert os.listdir(tmp_path) == [] and len(os.listdir("/proc/self/fd")) <= descriptors
    sandbox.close()  # again
    with pytest.raises(SandboxError, match="was closed"):
        sandbox.run("1")


def test_without_bubblewrap_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SandboxError, match=r"bubblewrap \(bwrap\) is not there.*apt install bubblewrap.*unconfined=True"
    ):
        Sandbox()


def test_bubblewrap_that_does_not_work_is_infrastructure(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InfrastructureError, match="bubblewrap did not start: no namespaces here"):
        Sandbox()


@pytest.fixture
def short_path():
    """A folder to be $TMPDIR: the paths of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder


def test_unconfined_warns_and_cleans_up(caplog, monkeypatch, short_path):
    monkeypatch.setattr(tempfile, "tempdir", short_path)
    monkeypatch.setenv("K25_SECRET", "hunter2")
    with caplog.at_level(logging.WARNING), Sandbox(unconfined=True) as sandbox:
        sandbox.put("red.png", RED)
        code = "import os, subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        code += "print(os.listdir(), 'K25_SECRET' in os.environ, child.pid)"
        text = sandbox.run(code).text
        assert text.startswith("['red.png'] False") and sandbox.get("red.png")[:4] == b"\x89PNG"
        child = int(text.split()[-1])
    assert any("UNCONFINED" in record.message and record.levelname == "WARNING" for record in caplog.records)
    assert os.listdir(short_path) == []
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("name", ["memory_mb", "processes", "stop_seconds", "images"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"Limits.{name}=0 must be positive"):
        Limits(**{name: 0})


@pytest.mark.parametrize("most", [1, 2, 7, 10])
@pytest.mark.parametrize("cuts", [[30], [1] * 30, [3, 0, 20, 7], [9], []])
def test_excerpts_keep_both_ends(most, cuts):
    text = "".join(chr(97 + i % 26) for i in range(sum(cuts)))
    excerpt, start = Excerpt(most), 0
    for cut in cuts:
        excerpt.add(text[start : start + cut])
        start += cut
    head, tail = most - most // 2, most // 2
    left_out = f"\n[.. {len(text) - most} characters left out ..]\n"
    shown = text if len(text) <= most else text[:head] + left_out + text[len(text) - tail :]
    assert str(excerpt) == shown
