"""Programs scored by running them on the tests of a problem, in a sandbox (K2.5 §3.5: rule-based outcome).

Only what goes in is in the sandbox. What must come out stays here and is compared here, so that no program finds it there,
and nothing that one does to print, to comparisons, to its exit or to any file can make it right. Whatever a program does
wrong scores 0 with a reason; what raises InfrastructureError is the machine's doing, and is no score.

tests = CodeTests((Case("1 2", "3"), Case("5 5", "10")))
tests.score(program_in(answer), pool.sandbox)           # (1.0, "") or (0.0, "test 2: ..")
"""

import json
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MOST_PROGRAM = 50_000  # characters
MOST_OUTPUT = 2**20  # bytes that a test may print
MOST_SHOWN = 80  # characters of an output in a reason
SPARE = 15.0  # seconds of the whole run that no test has
JOB, RESULTS = "k25_job.json", "k25_results.json"
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)

# Runs in the interpreter of the sandbox: each test is a process of its own, the first one that fails is the last.
HARNESS = f"""
def k25_harness():
    import json, os, pathlib, resource, signal, subprocess, sys, tempfile
    job = json.loads(pathlib.Path({JOB!r}).read_text())
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, ({MOST_OUTPUT}, {MOST_OUTPUT}))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    results = []
    for given in job["given"]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as out:
            pathlib.Path(folder, "program.py").write_text(job["program"], encoding="utf-8")
            command, printed, passed = [sys.executable, "-I", "program.py"], out, ()
            if job["function"]:
                command[2:] = ["-c", job["caller"], job["function"], str(out.fileno())]
                printed, passed = subprocess.DEVNULL, (out.fileno(),)
            process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=printed, pass_fds=passed,
                                       stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=limit)
            try:
                process.communicate(given.encode(), timeout=job["seconds"])
                status = process.returncode
            except subprocess.TimeoutExpired:
                status = "deadline"
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
            out.seek(0)
            results.append([status, out.read({MOST_OUTPUT} + 1).decode("utf-8", "replace")])
        if status != 0:
            break
    pathlib.Path({RESULTS!r}).write_text(json.dumps(results))
k25_harness()
"""
CALLER = """
import json, os, runpy, sys
name, descriptor = sys.argv[1], int(sys.argv[2])
arguments = json.load(sys.stdin)
value = runpy.run_path("program.py")[name](*arguments)
os.write(descriptor, json.dumps(value, allow_nan=False).encode())
"""


class Case(NamedTuple):
    """One test: a text to read and one to print; or a list of arguments, and the value to return, both of JSON's types."""

    given: str | list
    expected: object


class Verdict(NamedTuple):
    """1 or 0, and why not 1."""

    score: float
    reason: str = ""


class Interpreter(Protocol):
    """What is used of `sandbox.sandbox.Sandbox`. What it raises is passed on."""

    def put(self, name: str, data: bytes, seconds: float = ...) -> None:
        """Write a file."""

    def run(self, code: str, seconds: float = ...):
        """Run code; the result's `status` is ok when it came to its end."""

    def get(self, name: str, seconds: float = ...) -> bytes | None:
        """Read a file."""


@dataclass(frozen=True)
class CodeTests:
    """The hidden tests of a problem. With `function` a program defines it; else it reads stdin and prints.

    `seconds` is the deadline of each test. All must pass: a part of them says little about a program, and can be had by
    printing what is printed most.
    """

    cases: tuple[Case, ...]
    function: str = ""
    seconds: float = 2.0

    def __post_init__(self):
        kind = list if self.function else str
        for number, case in enumerate(self.cases, 1):
            if not isinstance(case.given, kind) or not (self.function or isinstance(case.expected, str)):
                raise ValueError(f"test {number} must have {'arguments in a list' if self.function else 'two texts'}")
            json.dumps(case, allow_nan=False)  # ValueError, TypeError: no value of JSON's types
        if len(self.cases) < 2 or not self.seconds > 0 or not (self.function.isidentifier() or not self.function):
            raise ValueError(
                "a problem needs two tests at least, seconds > 0, and a name for a function, if it has one"
            )

    def score(self, program: str, sandbox: Callable[[], AbstractContextManager[Interpreter]]) -> Verdict:
        """1 when every test passes, else 0 and why. `sandbox` opens one that nobody has used, as `KernelPool.sandbox`.

        A program finds nothing of another one there. Raises InfrastructureError.
        """
        if problem := _unfit(program):
            return Verdict(0.0, problem)
        given = [json.dumps(case.given) if self.function else case.given for case in self.cases]
        job = {"program": program, "given": given, "function": self.function, "seconds": self.seconds}
        with sandbox() as interpreter:
            interpreter.put(JOB, json.dumps(job | {"caller": CALLER}).encode())
            ended = interpreter.run(HARNESS, len(self.cases) * self.seconds + SPARE)
            found = interpreter.get(RESULTS) if ended.status == "ok" else None
        if found is None:
            return Verdict(0.0, f"the tests did not come to their end ({ended.status})")
        return self._judge(found)

    def _judge(self, found: bytes) -> Verdict:
        """The verdict on what came out of the sandbox, which is whatever the program made of it."""
        results = _parse(found)
        if not isinstance(results, list):
            return Verdict(0.0, "the results were damaged")
        for number, case in enumerate(self.cases, 1):
            result = results[number - 1] if number <= len(results) else None
            if not (isinstance(result, list) and len(result) == 2 and isinstance(result[1], str)):
                return Verdict(0.0, f"test {number}: no result")
            status, printed = result
            if status == "deadline":
                return Verdict(0.0, f"test {number}: took longer than {self.seconds:g} seconds")
            if type(status) is not int or status != 0:
                return Verdict(0.0, f"test {number}: ended with status {str(status)[:20]}")
            right = same(_parse(printed), case.expected) if self.function else same_text(printed, case.expected)
            if not right:
                verb = "returned" if self.function else "printed"
                return Verdict(0.0, f"test {number}: {verb} {printed[:MOST_SHOWN]!r}")
        return Verdict(1.0)

    def validate(self, gold: str, sandbox: Callable[[], AbstractContextManager[Interpreter]]) -> None:
        """Raise ValueError unless the gold program scores 1, and those that do not look at what is given score 0."""
        verdict = self.score(gold, sandbox)
        if verdict.score != 1.0:
            raise ValueError(f"the gold program fails: {verdict.reason}")
        idle = [""]
        for case in self.cases:
            idle.append(f"import json\ndef {self.function}(*_):\n    return json.loads({json.dumps(case.expected)!r})"
                        if self.function else f"print({case.expected!r})")  # fmt: skip
        idle.append(f"def {self.function}(*a):\n    return a[0]" if self.function else "print(open(0).read())")
        for program in dict.fromkeys(idle):
            if self.score(program, sandbox).score:
                raise ValueError(f"a program that solves nothing passes: {program[:MOST_SHOWN]!r}; add tests")


def program_in(answer: str) -> str:
    """The program in an answer: its last fenced block, or all of it where there is none."""
    blocks = FENCE.findall(answer[-2 * MOST_PROGRAM :])
    return blocks[-1] if blocks else answer


def same_text(printed: str, expected: str) -> bool:
    """Whether two outputs have the same lines, whatever the space at the ends of lines and the empty lines at the end."""
    ours, theirs = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (printed, expected))
    return ours == theirs


def same(value, expected) -> bool:
    """Whether two values of JSON's types are equal: true is not 1; numbers with a fraction may differ by 1e-9 of them."""
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(same(one, other) for one, other in zip(value, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and value.keys() == expected.keys()
            and all(same(value[key], expected[key]) for key in expected)
        )
    if isinstance(expected, float) and type(value) in (int, float):
        return math.isfinite(value) and math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
    return type(value) is type(expected) and value == expected


def _unfit(program: str) -> str:
    """Why a text is run by nobody; "" if it can be."""
    if not program.strip():
        return "there is no program"
    if len(program) > MOST_PROGRAM:
        return f"more than {MOST_PROGRAM} characters"
    try:
        program.encode()
    except UnicodeEncodeError:
        return "halves of characters"
    return ""


_NOTHING = object()


def _parse(text: str | bytes):
    """A JSON value, or what equals none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOTHING
