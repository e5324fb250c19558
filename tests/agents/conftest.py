"""Sandboxes, where this machine can make them."""

import shutil
import subprocess

import pytest

from k25_jax.agents.kernel import Limits
from k25_jax.agents.kernel_pool import KernelPool

PROBE = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "--", "true"]
QUICK = Limits(memory_mb=768, disk_mb=16, processes=40, stop_seconds=60.0, output_chars=2000, images=3)


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
    with KernelPool(2, QUICK) as pool:
        yield pool


@pytest.fixture(scope="module")
def sandbox(pool):
    """One sandbox for all tests of a file; its kernels come from the pool."""
    with pool.sandbox() as sandbox:
        yield sandbox
