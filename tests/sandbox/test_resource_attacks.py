"""Programs that try to take this machine's memory, and that of the process which runs them (as benchmarks/sandbox_limits).

The benchmark measures what the machine has left, which is only right on a machine that does nothing else. Here it is what
the processes of the sandbox have filled.
"""

import contextlib
import threading

import psutil
import pytest

from benchmarks import sandbox_limits
from k25_jax.sandbox.kernel import Limits
from k25_jax.sandbox.sandbox import Sandbox
from k25_jax.sandbox.usage import Usage

QUICK = {
    "pages of 8 children",
    "copies of pages, 8 children",
    "a process whose first thread has ended",
    "between two calls",
    "a message in many parts",
    "a flood of control",
    "output while no call runs",
    "thousands of images",
    "displays by the million",
}
SECONDS = 2.0
BUSY = 4.0  # more seconds than are due, for a machine that runs other tests, too
WATCHING_MB = (
    50  # more memory of whoever watches, which gets it in huge pages late in a long run of tests; alone it is 10
)
BUSY_MB = 300  # more memory than is due, filled while whoever watches waits for a processor; unwatched it is 2 GB


@contextlib.contextmanager
def filled():
    """The most megabytes that all children of this process have filled together.

    One that has not begun its own program yet has this one's memory, gigabytes of it in a long run of tests.
    """
    most, done, own = [0], threading.Event(), psutil.Process().cmdline()

    def look():
        while not done.wait(0.02):
            total = 0
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    if child.cmdline() not in ([], own):
                        total += child.memory_full_info().pss
            most[0] = max(most[0], total // 2**20)

    thread = threading.Thread(target=look)
    thread.start()
    yield most
    done.set()
    thread.join()


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sandbox_limits.ATTACKS]
)
def test_attacks_are_held(name):
    with filled() as most:
        seen = sandbox_limits.attack(name, SECONDS)
    assert (
        most[0] < sandbox_limits.MACHINE + BUSY_MB and seen["supervisor_mb"] < sandbox_limits.SUPERVISOR + WATCHING_MB
    ), (
        most,
        seen,
    )
    assert seen["clean"] and seen["seconds"] < SECONDS + sandbox_limits.LATE + BUSY, seen


def test_what_processes_share_is_counted_once(bwrap):
    """A large parent with children that change nothing is no larger than itself, and they are not kept from running."""
    with Sandbox(Limits(memory_mb=600)) as sandbox:
        code = "import os, time\nx = bytearray(b'x') * 200_000_000\nchildren = []\nfor _ in range(6):\n"
        code += "    child = os.fork()\n    if not child: time.sleep(2); os._exit(7)\n    children.append(child)\n"
        seen = sandbox.run(code + "print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])")
        assert (seen.status, seen.text) == ("ok", str([7] * 6))


def test_the_looks_come_closer_together_near_the_limit(bwrap):
    with Sandbox(Limits(memory_mb=600)) as sandbox:
        sandbox.run("import os, signal, time\nstopped = os.fork()\nif not stopped: time.sleep(600)")
        sandbox.run("os.kill(stopped, signal.SIGSTOP); x = bytearray(b'x') * 300_000_000")
        usage = Usage(sandbox._kernel._root, 600 * 2**20)
        try:
            used = usage.look(600 * 2**20)
            assert 300 * 2**20 < used < 500 * 2**20 and abs(usage.look(0) - used) < 60 * 2**20
            pauses = [usage.pause(limit * 2**20) for limit in (0, 500, 590, 600, 10_000)]
            assert pauses == sorted(pauses, reverse=True) and pauses[0] <= 0.2 and pauses[-1] == pauses[-2] > 0
        finally:
            usage.close()
        state = "print(open(f'/proc/{stopped}/stat').read().split()[2], len(x))"
        assert sandbox.run(state).text == "T 300000000"  # who was stopped by another stays so


def test_why_it_ended_between_two_calls_is_told(bwrap):
    with Sandbox(Limits(memory_mb=400)) as sandbox:
        code = "import os, time\nfor _ in range(4):\n    if not os.fork():\n"
        sandbox.run(f"{code}        time.sleep(0.5); x = bytearray(b'x') * 180_000_000; time.sleep(600)")
        sandbox._kernel._process.wait(60)
        seen = sandbox.run("1")
        assert seen.status == "died" and "(its processes together took more than 400 MB of memory)" in seen.text
