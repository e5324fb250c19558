"""How processes find each other, and what they say when they cannot."""

import concurrent.futures
import socket
import subprocess
import sys

import pytest

import runs
from k25_jax.config import ConfigError
from k25_jax.sharding.processes import ADDRESS, COUNT, INDEX, read_place, roll_call


def test_no_variables_mean_one_process():
    assert read_place({}) is None and read_place({COUNT: "", INDEX: ""}) is None
    assert read_place({ADDRESS: "[::1]:80", COUNT: "4", INDEX: "3"}) == ("[::1]:80", 4, 3)


@pytest.mark.parametrize(
    "values, message",
    [
        (("a:1", "2", ""), f"{ADDRESS}, {COUNT} set without {INDEX}"),
        (("", "2", "0"), f"without {ADDRESS}"),
        (("a", "2", "0"), f"{ADDRESS}='a' must be HOST:PORT"),
        (("a:b", "2", "0"), "must be HOST:PORT"),
        (("a:1", "two", "0"), f"{COUNT}='two' must be a whole number"),
        (("a:1", "2", "-1"), f"{INDEX}='-1'"),
        (("a:1", "2", "2"), rf"{INDEX}=2 must lie in \[0, {COUNT}=2\)"),
    ],
)
def test_variables_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        read_place(dict(zip((ADDRESS, COUNT, INDEX), values, strict=True)))


def call(*who: tuple[int, int], seconds: float = 20) -> list[str]:
    """The roll call of processes (count, index): what each raises, or ""."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor(len(who)) as pool:
        calls = [pool.submit(roll_call, address, count, index, seconds) for count, index in who]
        return [str(one.exception() or "") for one in calls]


def test_all_come():
    assert call((3, 2), (3, 0), (3, 1)) == ["", "", ""]


def test_nobody_is_there():
    (message,) = call((2, 1), seconds=0.5)
    assert message.startswith("process 1 cannot reach process 0") and "start process 0" in message


def test_somebody_does_not_come():
    messages = call((3, 0), (3, 1), seconds=1)
    assert all("processes [2] did not come" in message for message in messages)


def test_two_are_the_same():
    messages = call((3, 0), (3, 1), (3, 1), seconds=2)
    assert sum("two processes have JAX_PROCESS_ID=1" in message for message in messages) >= 2


def test_they_count_differently():
    messages = call((2, 0), (3, 1))
    assert all("JAX_NUM_PROCESSES is 2 in process 0 and 3 in 1" in message for message in messages)


def test_the_port_is_taken():
    with socket.create_server(("", 0)) as server, pytest.raises(ConfigError, match="cannot listen"):
        roll_call(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, 1)


SUM = """
import jax
from k25_jax.sharding.processes import joined
assert jax.config.jax_compilation_cache_dir
with joined() as index:
    total = jax.jit(lambda: jax.numpy.arange(8.0).sum())().item()
    if index == 0:
        print(total)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_on_the_cpu_neither_keep_programs_nor_load_them(tmp_path, processes):
    """One that loads a program and one that compiles it run its collectives in different orders, and wait for ever."""
    variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "launch/local.py", f"--processes={processes}", "--", sys.executable, "-c", SUM]
    done = subprocess.run(
        command, capture_output=True, text=True, env=runs.environment() | variables, cwd=runs.ROOT, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "28.0\n", done.stderr
    assert bool(list(tmp_path.glob("*-cache"))) == (processes == 1)
