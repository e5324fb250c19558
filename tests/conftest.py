"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and compile quickly."""

import os
import shutil
import signal
import subprocess
import tempfile
import types

import pytest

from k25_jax.runtime import environment

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell, and its children, ignore Ctrl-C

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's models are minute: its threads only wait for each other
# Most of the time goes into compilation; code that runs for milliseconds needs no optimisation. Where the order of
# additions is what a test is about, it compiles with runs.OPTIMISED. Flags that are set already win: the last one does.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".rstrip()
environment.prepare()  # a second run finds most of what the first has compiled, and so do child processes

PROBE = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "--", "true"]


def pytest_configure(config):
    """A folder that the processes of one session share: pytest-xdist starts the others with this environment."""
    config.addinivalue_line("markers", "slow: takes more than a minute on two CPU cores; left out of `make test`")
    if not hasattr(config, "workerinput"):
        shared = tempfile.TemporaryDirectory(prefix="k25-tests-")
        config.add_cleanup(shared.cleanup)
        os.environ["K25_TESTS_SHARED"] = shared.name


@pytest.fixture(scope="session")
def finished():
    """`file`, an experiment file; `run`, the folder in which `k25 train` took it to its end: tests only read it."""
    import runs

    def train(folder) -> str:
        file = runs.write_experiment(folder)
        result = runs.k25("train", f"--config={file}", f"--workdir={folder / 'run'}", "--json")
        assert result.returncode == 0, result.stderr
        return result.stdout

    folder, stdout = runs.once("finished", train)
    return types.SimpleNamespace(file=folder / "minute.py", run=folder / "run", stdout=stdout)


@pytest.fixture(scope="module")
def bucket():
    """The address, gs://.., of a bucket on loopback; empty at first."""
    import buckets

    with buckets.serving() as root:
        yield root


@pytest.fixture
def k25(capsys):
    """Runs a command in this process: (status, stdout, stderr)."""
    from k25_jax.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def bwrap():
    """Skips where bubblewrap is missing, or may not do what it is for; made without any of our code."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (Debian, Ubuntu: apt install bubblewrap)")
    result = subprocess.run(PROBE, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"bubblewrap does not work on this machine: {result.stderr.strip()}")


@pytest.fixture(scope="module")
def pool(bwrap):
    """Kernels in bubblewrap with small limits, for the tests of a file."""
    from k25_jax.sandbox.kernel import Limits
    from k25_jax.sandbox.pool import KernelPool

    limits = Limits(memory_mb=768, disk_mb=16, processes=40, stop_seconds=60.0, output_chars=2000, images=3)
    with KernelPool(2, limits) as pool:
        yield pool


@pytest.fixture(scope="module")
def sandbox(pool):
    """One sandbox for all tests of a file; its kernels come from the pool."""
    with pool.sandbox() as sandbox:
        yield sandbox
