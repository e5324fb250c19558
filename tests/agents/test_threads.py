"""Calls in threads: what they return and raise, and that one that hangs holds up nobody, nor the end of the program."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest

import runs
from k25_jax.agents import threads
from k25_jax.agents.threads import Late, in_thread
from k25_jax.sandbox.observation import InfrastructureError


def test_results_and_exceptions_come_back():
    def fail(error):
        raise error

    async def work():
        assert await in_thread(lambda a, b: a + b, 1, 2) == 3
        for error in (TimeoutError("own"), KeyboardInterrupt(), ValueError("x")):
            with pytest.raises(type(error)):
                await in_thread(fail, error)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await in_thread(fail, StopIteration(3))

    asyncio.run(work())


def test_a_call_that_is_late_or_given_up_is_left_behind(monkeypatch):
    come_back, done = threading.Event(), []
    monkeypatch.setattr(threads, "MOST_LEFT", 2)

    async def work():
        with pytest.raises(Late):
            await in_thread(come_back.wait, seconds=0.01)
        waiting = asyncio.ensure_future(in_thread(lambda: come_back.wait() and done.append(1)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(InfrastructureError, match="2 calls have not come back"):
            await in_thread(print)
        come_back.set()
        while threads._left:
            threads._left.difference_update([thread for thread in threads._left if not thread.is_alive()])
            await asyncio.sleep(0.01)
        assert await in_thread(lambda: "again") == "again" and done == [1]

    asyncio.run(work())


def test_the_program_ends_while_a_call_hangs():
    program = """
import asyncio, threading
from k25_jax.agents.threads import Late, in_thread
async def work():
    try:
        await in_thread(threading.Event().wait, seconds=0.05)
    except Late:
        print("late")
asyncio.run(work())
"""
    where = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=where)
    assert (result.returncode, result.stdout, result.stderr) == (0, "late\n", "")
