"""Programs scored by execution: right ones pass, and nothing that a hostile one does to its judge makes it pass."""

import contextlib

import pytest

from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.observation import InfrastructureError, Observation
from k25_jax.scoring.execution import RESULTS, Case, CodeTests, program_in, same, same_text

SUMS = CodeTests((Case("1 2\n", "3"), Case("20 22\n", "42")), seconds=5.0)
SORTS = CodeTests((Case([[3, 1, 2]], [1, 2, 3]), Case([["b", "a"]], ["a", "b"])), "order", seconds=5.0)
RIGHT = "print(sum(map(int, input().split())))"

HOSTILE = {
    "prints files that it finds": "import glob,os\nfor p in glob.glob('/tmp/**/*', recursive=True):\n"
    " print(open(p, errors='replace').read() if os.path.isfile(p) else p)",
    "exits early with 0": "import sys; sys.exit(0)",
    "exits hard with 0": "import os; os._exit(0)",
    "overrides print": "import builtins\nbuiltins.print = lambda *a: None\nprint(3)",
    "overrides comparison": "import builtins, json\nclass All(str):\n __eq__ = lambda *_: True\n __hash__ = str.__hash__\n"
    "builtins.str = All\njson.loads = lambda *_: All()\nprint(All('x'))",
    "asserts nothing": "assert True",
    "writes the judge's file": f"import glob\nfor p in ['/tmp/work/{RESULTS}', '../{RESULTS}']:\n"
    " open(p, 'w').write('[[0, \"3\"], [0, \"42\"]]')",
    "writes it when it is over": "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(0.2)\n"
    f" open('/tmp/work/{RESULTS}', 'w').write('[]')\n os._exit(0)",
    "ends the judge": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "all answers at once": "print('3\\n42\\n0')",
    "the right answer and a failure": f"{RIGHT}\nraise SystemExit(1)",
    "more than asked": f"{RIGHT}\nprint('done')",
    "never ends": "while True: pass",
    "prints without end": "while True: print('3' * 1000)",
    "takes all memory": "x = bytearray(10**11)",
    "cannot be read": "print(",
    "null": "print(3)\0",
    "half a character": "print('\ud800')",
    "empty": " \n",
    "too long": "#" * 60_000 + f"\n{RIGHT}",
}


@pytest.fixture(scope="module")
def open_sandbox(pool):
    return pool.sandbox


def test_right_programs_pass_whatever_the_space_at_the_end(open_sandbox):
    assert SUMS.score(RIGHT, open_sandbox) == (1.0, "")
    assert SUMS.score("a, b = map(int, input().split())\nprint(a + b, end=' \\n\\n')", open_sandbox) == (1.0, "")
    assert SORTS.score("def order(items):\n    print('noise')\n    return tuple(sorted(items))", open_sandbox) == (
        1.0,
        "",
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_no_trick_scores(name, open_sandbox):
    tests = CodeTests(SUMS.cases, seconds=0.7) if "end" in name else SUMS
    verdict = tests.score(HOSTILE[name], open_sandbox)
    assert verdict.score == 0.0 and verdict.reason, verdict


def test_wrong_functions_fail_with_a_reason(open_sandbox):
    for program, words in (
        ("def other(items): return items", "status 1"),
        ("def order(items): return items", "returned '[3, 1, 2]'"),
        ("def order(items): return None", "returned 'null'"),
        ("def order(items): return float('nan')", "status 1"),
        ("def order(items):\n class L(list):\n  __eq__ = lambda *_: True\n return L([0])", "returned '[0]'"),
        ("import json\njson.dumps = lambda *a, **k: 'true'\ndef order(items): return 0", "returned 'true'"),
    ):
        verdict = SORTS.score(program, open_sandbox)
        assert verdict.score == 0.0 and words in verdict.reason, verdict


def test_a_program_finds_nothing_of_another_one(open_sandbox):
    leave = "open('/tmp/left', 'w').write('x')\nopen('/dev/shm/left', 'w').write('x')\n" + RIGHT
    assert SUMS.score(leave, open_sandbox).score == 1.0
    look = "import os\nassert not os.path.exists('/tmp/left') and not os.path.exists('/dev/shm/left')\n" + RIGHT
    assert SUMS.score(look, open_sandbox).score == 1.0


def test_the_machines_failures_are_no_score():
    @contextlib.contextmanager
    def broken():
        raise SandboxError("no bubblewrap")
        yield

    with pytest.raises(InfrastructureError, match="no bubblewrap"):
        SUMS.score(RIGHT, broken)


class Forging:
    """A sandbox in which the program has taken over: what comes out is what it wants."""

    def __init__(self, results, status="ok"):
        self._results, self._status = results, status

    def __call__(self):
        return contextlib.nullcontext(self)

    def put(self, name, data, seconds=60.0):
        assert b"42" not in data  # what must come out is not in there

    def run(self, code, seconds=60.0):
        return Observation("", status=self._status)

    def get(self, name, seconds=60.0):
        return self._results


@pytest.mark.parametrize(
    "results",
    [None, b"", b"{", b"[]", b"{}", b"3", b"null", b'"right"', b"[[0]]", b"[[0, 3]]", b"[[0, null]]", b"[[true, \"3\"]]",
     b'[[0, "3"]]', b'[["ok", "3"], ["ok", "42"]]', b"[" * 100_000, b"\xff", b'{"passed": true}',
     b'[[false, "3"], [0, "42"]]', b'[[1, "3"], [1, "42"]]'],
)  # fmt: skip
def test_forged_results_score_nothing(results):
    verdict = SUMS.score(RIGHT, Forging(results))
    assert verdict.score == 0.0 and verdict.reason
    assert SUMS.score(RIGHT, Forging(b'[[0, "3"], [0, "42"]]', "died")).score == 0.0


def test_problems_are_validated(open_sandbox):
    SUMS.validate(RIGHT, open_sandbox)
    SORTS.validate("def order(items):\n    return sorted(items)", open_sandbox)
    with pytest.raises(ValueError, match="the gold program fails: test 1"):
        SUMS.validate("print(0)", open_sandbox)
    with pytest.raises(ValueError, match="solves nothing passes"):
        CodeTests((Case("1", "yes"), Case("2", "yes"))).validate("print('yes')", open_sandbox)
    with pytest.raises(ValueError, match="solves nothing passes"):
        CodeTests((Case("1", "1"), Case("2", "2"))).validate("print(input())", open_sandbox)
    for cases, function in (((Case("1", "1"),), ""), ((Case("1", 1),) * 2, ""), ((Case("1", 1),) * 2, "f"), ((), "")):
        with pytest.raises(ValueError):
            CodeTests(cases, function)
    with pytest.raises(ValueError):
        CodeTests((Case([1], float("nan")),) * 2, "f")


# ------------------------------------------------------------------------------------------------------------ comparison
def test_values_are_the_same_in_type_and_size():
    values = [None, True, False, 0, 1, 1.0, 0.5, "", "1", [], [1], [[1]], {}, {"a": 1}, {"a": [1]}, [True], {"b": 1}]
    for one in values:
        for other in values:
            expected = type(one) is type(other) and one == other and repr(one) == repr(other)
            number = type(one) in (int, float) and type(other) is float and one == other
            assert same(one, other) == (expected or number), (one, other)
    assert same(0.1 + 0.2, 0.3) and not same(0.31, 0.3) and not same(float("nan"), float("nan"))
    assert not same(float("inf"), 1e308) and same((1, [2]), [1, (2,)])


def test_texts_are_the_same_line_by_line():
    assert same_text("1 \n2\n\n", "1\n2") and same_text("", "\n") and same_text("a\r\nb", "a\nb")
    assert not same_text("1 2", "1\n2") and not same_text(" 1", "1") and not same_text("1\n\n2", "1\n2")


@pytest.mark.parametrize(
    "answer, program",
    [
        ("print(1)", "print(1)"),
        ("so:\n```python\nprint(1)\n```\n", "print(1)\n"),
        ("```\nold\n```\nbetter:\n```py\nnew\n```", "new\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\nno end", "```python\nno end"),
        ("`" * 100_000, "`" * 100_000),
    ],
)
def test_the_program_is_the_last_block(answer, program):
    assert program_in(answer) == program
