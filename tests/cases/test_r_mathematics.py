"""Mathematics under a deadline: what never ends is ended, others go on, a spare is ready, no process stays."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from k25_jax.scoring.mathcheck import DEADLINE, MathChecker, result_in

SLACK = 1.5  # seconds, for a busy machine
ENDLESS = "\\boxed{9^{9^{9^9}}}"


@pytest.fixture(scope="module")
def checker():
    made = MathChecker()
    assert made.same("\\boxed{\\frac{2}{4}}", "0.5")
    yield made
    made.close()


@pytest.mark.parametrize(
    "answer",
    [
        ENDLESS,
        "\\boxed{(10^{10})!}",
        "\\boxed{\\frac{1}{" * 12 + "2" + "}" * 13,
        "\\boxed{2^{10^{12}} \\bmod 7}",
        "\\boxed{" + "\\sqrt{" * 24 + "2" + "}" * 25,
        "\\boxed{" + "+".join(["x^{99}"] * 90) + "}",
    ],
)
def test_a_comparison_ends_at_its_deadline(checker, answer):
    start = time.monotonic()
    assert not checker.same(answer, "3")
    assert time.monotonic() - start < DEADLINE + SLACK
    assert checker.same("\\boxed{3}", "3")


@pytest.mark.parametrize(
    "answer",
    [" " * 19_000, "\\[" * 9_000, "\\boxed{" + ",".join(map(str, range(4_000))) + "}", "(" * 9_000, "\\boxed{" * 5_000,
     "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}", "{" * 20_000, "\\boxed{" + "x" * 5_000 + "}", "$" * 20_000, "|" * 9_000,
     "\\begin{matrix}" * 2_000, "\\boxed{" + "{" * 3_000, "9" * 20_000, "\x00" * 20_000, "\ud800" * 900, "１" * 19_000],
)  # fmt: skip
def test_what_is_too_large_is_refused_or_cut_at_once(checker, answer):
    start = time.monotonic()
    result_in(answer)
    assert time.monotonic() - start < 0.5
    assert not checker.same(answer, "3") and not checker.same("\\boxed{3}", answer)
    assert time.monotonic() - start < 2 * DEADLINE + SLACK


def test_space_and_length_around_a_result_do_not_hide_it(checker):
    for answer in (
        "\\boxed{" + " " * 19_000 + "3}",
        "\\(x\\) and \\[y\\], so " * 800 + "\\boxed{3}",
        "it is" + " " * 19_000 + "$3$",
        "\\boxed{3.}",
        "\\boxed{３}",
        "\\boxed {3}",
        "\\fbox{3}",
    ):
        assert checker.same(answer, "3"), answer[-60:]
    assert checker.same("\\boxed{1} or $\\boxed{2}$", "1, 2") and not checker.same(
        "\\boxed{1}. No: it is \\boxed{2}", "1"
    )


def test_others_go_on_while_some_never_end(checker):
    """Eight at once, two of which never end: six answers long before the deadline of the two, as one after another."""
    lost, seconds = checker.lost, {}

    def ask(number):
        start = time.monotonic()
        found = checker.same(ENDLESS if number < 2 else f"\\boxed{{\\frac{{{2 * number}}}{{4}}}}", f"{number / 2}")
        seconds[number] = time.monotonic() - start
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [False] * 2 + [True] * 6
    assert checker.lost == lost + 2
    assert max(seconds[number] for number in range(2, 8)) < min(seconds[0], seconds[1])
    assert max(seconds.values()) < DEADLINE + SLACK


def test_after_one_was_ended_the_next_waits_for_no_import(checker):
    process = checker._process.pid
    assert not checker.same(ENDLESS, "3")
    assert _gone(_children(process), 1.0)  # nothing goes on computing
    start = time.monotonic()
    assert checker.same("\\boxed{\\frac{2}{6}}", "\\frac{1}{3}")
    assert time.monotonic() - start < 1.0 and checker._process.pid == process


def test_memory_is_limited(checker):
    """A number of 2**34 bits would take 2 GiB: the pair is lost, or just different, and the machine does not notice."""
    assert not checker.same("\\boxed{2^{17179869184}}", "3")
    assert checker.same("\\boxed{3}", "3")


def _in_a_fork(answer, queue):
    queue.put((answer.same("\\boxed{0.25}", "\\frac{1}{4}"), answer._process.pid))


def test_a_forked_caller_has_a_process_of_its_own(checker):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_fork, args=(checker, queue))
    child.start()
    found, pid = queue.get(timeout=60)
    child.join(30)
    assert found and pid != checker._process.pid
    assert checker.same("\\boxed{0.25}", "\\frac{1}{4}")
    assert _gone([pid])


def _gone(pids, seconds=10.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _children(pid):
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PROGRAM = """
import sys, threading, time
from k25_jax.scoring import mathcheck
checker = mathcheck._checker()
assert mathcheck.same_answer("\\\\boxed{0.5}", "\\\\frac{1}{2}")
threading.Thread(target=mathcheck.same_answer, args=("\\\\boxed{9^{9^{9^9}}}", "3"), daemon=True).start()
time.sleep(0.3)
print(checker._process.pid, "jax" in sys.modules, flush=True)
sys.stdin.read(1)
"""


@pytest.mark.parametrize("ending", ["exit", "SIGKILL"])
def test_no_process_stays(ending):
    """Neither the one that waits nor its child that computes, however the program ends."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid, jax = program.stdout.readline().split()
    pids = [int(pid), *_children(pid)]
    assert len(pids) == 2 and jax == "False"
    if ending == "exit":
        program.stdin.write("x")
        program.stdin.flush()
    else:
        os.kill(program.pid, getattr(signal, ending))
    program.wait(30)
    program.stdin.close()
    program.stdout.close()
    assert _gone(pids)
