"""Signals: at once while there is nothing to lose, after the step in hand in a run, and at once the second time."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import runs
from k25_jax.train.interrupts import NOTICE, Interrupted, between_steps, raising

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def as_before():
    """Whatever happens in a test, signals do afterwards what they did."""
    before = handlers()
    yield
    assert handlers() == before


# ------------------------------------------------------------------------------------------------- in a library's process
@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_for_the_end_of_the_step(capfd, number):
    done = []
    with pytest.raises(Interrupted) as end, between_steps() as stop:
        stop.arm()
        signal.raise_signal(number)
        done.append("the rest of the step")
        assert stop.number == number
    assert done and end.value.number == number and end.value.status == 128 + number
    assert capfd.readouterr().err == NOTICE.decode()


def test_before_the_first_step_a_press_acts_at_once():
    with pytest.raises(KeyboardInterrupt) as end, between_steps():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the press was only noted")
    assert not isinstance(end.value, Interrupted)


def test_the_second_press_acts_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), between_steps() as stop:
        stop.arm()
        signal.raise_signal(signal.SIGINT)
        done.append("a long step")
        signal.raise_signal(signal.SIGINT)
        done.append("its end")
    assert done == ["a long step"]


def test_sigterm_twice_in_a_second_counts_once():
    """`timeout` sends it to the process and to its group."""
    done = []
    with pytest.raises(Interrupted), between_steps() as stop:
        stop.arm()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        done.append("the rest of the step")
        time.sleep(1.1)
        signal.raise_signal(signal.SIGTERM)
        done.append("later")
    assert done == ["the rest of the step"]


def test_an_error_after_a_press_is_still_the_error():
    with pytest.raises(ValueError, match="broken"), between_steps() as stop:
        stop.arm()
        signal.raise_signal(signal.SIGINT)
        raise ValueError("broken")


def test_who_ignores_a_signal_goes_on_doing_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with between_steps() as stop:
            stop.arm()
            signal.raise_signal(signal.SIGHUP)
            assert not stop.number
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_of_several_processes_is_interrupted_at_once_until_they_can_agree():
    done = []
    with pytest.raises(KeyboardInterrupt) as end, between_steps(alone=False):
        signal.raise_signal(signal.SIGINT)
        done.append("an exchange that nobody else is in any more")
    assert not done and not isinstance(end.value, Interrupted)
    with pytest.raises(Interrupted), between_steps(alone=False) as stop:
        stop.arm()
        signal.raise_signal(signal.SIGTERM)
        done.append("the others hear of it")
    assert done


def test_another_thread_leaves_signals_alone():
    failed = []

    def work():
        try:
            with between_steps() as stop, raising():
                stop.arm()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize("number", SIGNALS)
def test_where_processes_are_to_be_ended_first_a_signal_raises(number):
    with pytest.raises(Interrupted) as end, raising():
        signal.raise_signal(number)
    assert end.value.number == number


# --------------------------------------------------------------------------------------------------- in a command's process
COMMAND = """
    import hashlib, os, signal, sys, time
    from k25_jax.train.interrupts import Interrupted, at_once, between_steps, raising

    def compile():  # as XLA does: in C, without a look at signals, for a minute
        print("compiling", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)

    with at_once("k25 train", "; more"):
        {body}
"""


def start(body: str) -> subprocess.Popen:
    """A process of a command that does this, once it has printed its first line."""
    script = textwrap.dedent(COMMAND).format(body=body)
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "ignore", "-c", script]
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"PYTHONPATH": str(runs.ROOT)}
    )
    while os.read(process.stdout.fileno(), 1) not in (b"\n", b""):
        pass  # readline() would take more than the line, and communicate() would miss it
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_compilation_ends_at_once_and_says_so(number):
    process = start("compile()")
    time.sleep(0.5)  # now it is in C
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 2
    assert process.returncode == 128 + number
    assert err == f"\nk25 train: ended by {number.name}; more\n"


def test_a_second_signal_ends_a_step_that_does_not_end():
    process = start("with between_steps() as stop: stop.arm(); compile()")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n" and "after this step" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and time.monotonic() - began < 2
    process.communicate()


def test_the_first_signal_lets_a_step_end():
    body = "with between_steps() as stop: stop.arm(); print(1, flush=True); time.sleep(1); print('saved', flush=True)"
    process = start(body)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == "saved\n" and err.endswith("Interrupted\n")


def test_a_child_that_was_forked_and_ended_is_not_taken_for_this_process():
    body = "child = os.fork() or time.sleep(60); os.kill(child, signal.SIGTERM); print(os.waitpid(child, 0)[1], flush=True)"
    process = start(f"print(1, flush=True); {body}; time.sleep(1); print('lives')")
    out, err = process.communicate(timeout=60)
    assert (out, err) == (f"{int(signal.SIGTERM)}\nlives\n", "") and process.returncode == 0


def test_output_that_nobody_reads_does_not_hold_it_up():
    process = start("print(1, flush=True); sys.stdout.write('x' * 10**7)")
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143 and time.monotonic() - began < 2
    process.communicate()
