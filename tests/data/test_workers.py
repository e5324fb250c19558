"""Processes that hang, crash, or take too much memory cost the record that they were at, and nothing else."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest

from k25_jax.data.records import DataError
from k25_jax.data.workers import Unit, run


@dataclass(frozen=True)
class Job:
    """Squares each record; some do what decoders do."""

    harm: str = ""
    at: tuple[int, ...] = ()

    def start(self):
        """In the worker."""

        def work(unit, lost, begin):
            out = {}
            for index in range(*unit[1:]):
                begin(index)
                if index in lost:
                    out[index] = lost[index][0]
                elif self.harm and index in self.at:
                    out[index] = self.hurt()
                else:
                    out[index] = index**2
            return out

        return work

    def hurt(self):
        """Do the harm."""
        match self.harm:
            case "hang":
                time.sleep(1000)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "memory":
                try:
                    return np.ones(2**33, np.uint8).sum()
                except MemoryError:
                    return "no memory"
            case "source":
                raise DataError("the disk is gone")
            case "bug":
                raise KeyError("a bug")


UNITS = [Unit(number, 7 * number, min(50, 7 * number + 7)) for number in range(8)]


def squares(job: Job, deadline: float = 60.0) -> dict:
    """All results; each unit came once."""
    found, seen = {}, []
    for unit, result in run(job, UNITS, workers=2, deadline=deadline):
        assert list(result) == list(range(*unit[1:]))
        seen.append(unit)
        found |= result
    assert sorted(seen) == UNITS
    return found


@pytest.mark.parametrize("harm, word", [("", None), ("hang", "deadline"), ("crash", "crash"), ("memory", "no memory")])
def test_only_the_harmful_records_are_lost(harm, word):
    harmful = (0, 8, 9, 49)
    expected = {i: word if harm and i in harmful else i**2 for i in range(50)}
    assert squares(Job(harm, harmful), deadline=0.5 if harm == "hang" else 60.0) == expected


def test_a_source_that_fails_and_a_bug_stop_the_work():
    with pytest.raises(DataError, match="the disk is gone"):
        squares(Job("source", (10,)))
    with pytest.raises(RuntimeError, match="(?s)Traceback.*KeyError: 'a bug'"):
        squares(Job("bug", (10,)))


def test_steps_and_reports():
    heard = []
    units = [Unit(0, 0, 40, 4), Unit(1, 40, 50, 4)]
    results = {unit.number: result for unit, result in run(Job(), units, workers=1, report=heard.append)}
    assert list(results[0]) == list(range(0, 40, 4)) and list(results[1]) == [40, 44, 48]
    assert heard == sorted(heard) and heard[-1] == 13
