"""What JAX is told: where programs are kept and who may, which chips there are; the same bits with the cache and without."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

import runs
from k25_jax.runtime import environment

NAMES = ("JAX_PLATFORMS", "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE")
NAMES += ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", environment.OFF)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment in which nothing of this is set, and a home of its own; JAX as if it were not imported."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    before = dict(os.environ)
    yield tmp_path / "cache" / "k25_jax"
    for name in NAMES:
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in before.items() if name in NAMES})


def folder() -> pathlib.Path:
    return pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


def test_programs_are_kept_in_a_private_and_bounded_folder(bare):
    environment.prepare()
    assert folder().parent == bare and folder().stat().st_mode & 0o077 == 0
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == environment.MOST_BYTES


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_cache_can_be_turned_off_for_all_processes(bare, how, monkeypatch):
    if how == "variable":
        monkeypatch.setenv(environment.OFF, "1")
    environment.prepare(no_cache=how == "flag")
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false" and os.environ[environment.OFF] == "1"


def test_what_the_user_has_set_stays(bare, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    environment.prepare()
    assert str(folder()) == "/elsewhere" and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ


def test_a_folder_that_others_can_write_is_not_used(bare):
    environment.prepare()
    folder().chmod(0o777)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR")
    environment.prepare()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_home_that_cannot_be_written_is_no_error(bare, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    environment.prepare()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_half_an_entry_of_a_killed_process_goes_and_whole_ones_stay(bare):
    environment.prepare()
    for name in ("whole-cache", "whole-atime", "half-cache", "lost-atime"):
        (folder() / name).write_bytes(b"12345678")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR")
    environment.prepare()
    assert {path.name for path in folder().iterdir()} == {"whole-cache", "whole-atime", "used", ".lockfile"}


def test_programs_of_another_processor_are_apart_and_go_when_nobody_uses_them(bare, monkeypatch):
    environment.prepare()
    first = folder()
    os.environ.pop("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(environment, "_processor", lambda: "another")
    environment.prepare()
    assert folder() != first and first.exists()
    old = time.time() - environment.STALE - 1
    os.utime(first / "used", (old, old))
    os.environ.pop("JAX_COMPILATION_CACHE_DIR")
    environment.prepare()
    assert not first.exists() and folder().exists()


@pytest.mark.parametrize(
    ("installed", "tpu", "expected"),
    [((), False, None), (("libtpu",), False, "cpu"), (("libtpu",), True, None)],
)
def test_without_a_tpu_libtpu_is_not_asked(bare, monkeypatch, installed, tpu, expected):
    found = lambda name: name if name in installed else None  # noqa: E731
    monkeypatch.setattr(environment.importlib.util, "find_spec", found)
    monkeypatch.setattr(environment, "_has_tpu", lambda: tpu)
    environment.prepare()
    assert os.environ.get("JAX_PLATFORMS") == expected


GENERATE = ("generate", "--prompt=what is 12 + 30?", "--temperature=0.7", "--max_tokens=12", "--json")
COUNT = "jit__step-*-cache"


def test_the_same_bits_with_and_without_the_cache(tmp_path):
    """Without, with an empty one, with a full one; and the full one is used."""
    variables = runs.environment() | {"XDG_CACHE_HOME": str(tmp_path)}
    for name in NAMES[1:]:
        variables.pop(name, None)

    def answer(*flags: str) -> dict:
        command = [sys.executable, "-m", "k25_jax.cli", *GENERATE, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=runs.ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    without = answer("--no_cache")
    assert not list(tmp_path.rglob("*-cache"))
    empty = answer()
    kept = {path.name for path in tmp_path.rglob(COUNT)}
    full = answer()
    assert without == empty == full
    assert kept and {path.name for path in tmp_path.rglob(COUNT)} == kept


def test_many_processes_share_one_folder(tmp_path):
    """All write and read the same entries at once, under a bound that makes them drop each other's; all are right."""
    script = """
import sys
sys.path.insert(0, {root!r})
from k25_jax.runtime import environment
environment.MOST_BYTES, environment.LEAST_SECONDS = 20_000, 0.0
environment.prepare()
import jax, jax.numpy as jnp
print([float(jax.jit(lambda x, n=n: (jnp.sin(x) @ x + n).sum())(jnp.eye(8) * n)) for n in range(1, 12)])
"""
    variables = runs.environment() | {"XDG_CACHE_HOME": str(tmp_path)}
    for name in NAMES[1:]:
        variables.pop(name, None)
    command = [sys.executable, "-c", script.format(root=str(runs.ROOT))]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables) for _ in range(4)
    ]
    results = [process.communicate() for process in running]
    assert len({out for out, _ in results}) == 1 and all(process.returncode == 0 for process in running), results
    assert all(b"Traceback" not in problem for _, problem in results)
    assert 0 < sum(path.stat().st_size for path in tmp_path.rglob("*-cache")) <= 20_000
