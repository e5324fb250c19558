"""Sandboxes, where this machine can make them."""

import pytest

from k25_jax.agents.kernel import Limits
from k25_jax.agents.kernel_pool import KernelPool

QUICK = Limits(memory_mb=768, disk_mb=16, processes=40, stop_seconds=60.0, output_chars=2000, images=3)


@pytest.fixture(scope="module")
def pool(bwrap):
    with KernelPool(2, QUICK) as pool:
        yield pool


@pytest.fixture(scope="module")
def sandbox(pool):
    """One sandbox for all tests of a file; its kernels come from the pool."""
    with pool.sandbox() as sandbox:
        yield sandbox
