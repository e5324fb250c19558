"""Long work says what it is; quick work says nothing."""

import logging
import threading

from k25_jax.runtime.waiting import first_call, waiting


def test_quick_work_is_silent(caplog):
    with caplog.at_level(logging.INFO), waiting("compiling", times=(5.0,)):
        pass
    assert caplog.text == ""


def test_long_work_is_named_again_and_again_until_it_ends(caplog):
    said = threading.Event()
    with caplog.at_level(logging.INFO):
        with waiting("compiling a step", times=(0.01, 0.02), every=0.01):
            for _ in range(1000):
                if len(caplog.records) >= 4 or said.wait(0.01):
                    break
        count = len(caplog.records)
        assert count >= 4 and all("compiling a step" in record.getMessage() for record in caplog.records)
        assert not said.wait(0.05) and len(caplog.records) == count


def test_the_error_of_the_work_comes_through():
    try:
        with waiting("loading"):
            raise ValueError("broken")
    except ValueError as problem:
        assert str(problem) == "broken"


def test_only_the_first_call_is_waited_for(caplog):
    slow = threading.Event()
    call = first_call(lambda seconds: slow.wait(seconds) or seconds, "compiling")
    with caplog.at_level(logging.INFO):
        assert call(0) == 0 and caplog.text == ""
        assert call(0.1) == 0.1 and caplog.text == ""
