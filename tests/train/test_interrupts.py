"""Ctrl-C waits for the end of a step, the second one does not."""

import signal
import threading

import pytest

from k25_jax.train.interrupts import NOTICE, between_steps


def press():
    signal.raise_signal(signal.SIGINT)


def test_the_first_press_waits_for_the_check(capfd):
    done = []
    with pytest.raises(KeyboardInterrupt), between_steps() as check:
        check()
        press()
        done.append("the rest of the step")
        check()
        done.append("the next step")
    assert done == ["the rest of the step"]
    assert capfd.readouterr().err == NOTICE.decode()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_press_acts_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), between_steps():
        press()
        done.append("a long step")
        press()
        done.append("its end")
    assert done == ["a long step"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_press_in_the_last_step_is_not_forgotten():
    done = []
    with pytest.raises(KeyboardInterrupt), between_steps():
        press()
        done.append("all closed in peace")
    assert done == ["all closed in peace"]


def test_an_error_after_a_press_is_still_the_error():
    with pytest.raises(ValueError, match="broken"), between_steps():
        press()
        raise ValueError("broken")


def test_who_ignores_the_signal_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with between_steps() as check:
            press()
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_of_several_processes_is_interrupted_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), between_steps(alone=False):
        press()
        done.append("an exchange that nobody else is in any more")
    assert not done


def test_another_thread_leaves_signals_alone():
    failed = []

    def work():
        try:
            with between_steps() as check:
                check()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGINT) is signal.default_int_handler
