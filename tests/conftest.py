"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, and compile quickly."""

import os
import signal
import types

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell, and its children, ignore Ctrl-C

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's models are minute: its threads only wait for each other
# Most of the time goes into compilation; code that runs for milliseconds needs no optimisation. Where the order of
# additions is what a test is about, it compiles with runs.OPTIMISED. Flags that are set already win: the last one does.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".rstrip()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a minute on two CPU cores; left out of `make test`")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """`file`, an experiment file; `run`, the folder in which `k25 train` took it to its end: tests only read it."""
    import runs

    folder = tmp_path_factory.mktemp("finished")
    file, run = runs.write_experiment(folder), folder / "run"
    result = runs.k25("train", f"--config={file}", f"--workdir={run}", "--json")
    assert result.returncode == 0, result.stderr
    return types.SimpleNamespace(file=file, run=run, stdout=result.stdout, stderr=result.stderr)
