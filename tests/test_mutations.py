"""The list of mutations fits the source of today, and the harness tells what is caught from what survives."""

import pytest

import mutations
from mutants import MUTATIONS
from mutants.mutation import Mutation

SOURCE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
from package import double, half


def test_double():
    assert double(3) == 6


def test_half():
    assert half(0) == 0
"""


def test_every_mutation_fits_the_source_and_names_tests_that_are_there():
    assert mutations.check(MUTATIONS) == []
    assert len(MUTATIONS) >= 40


@pytest.fixture
def toy(tmp_path):
    """A repository with a package of one file and its tests."""
    (tmp_path / "package.py").write_text(SOURCE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_toy.py").write_text(TESTS)
    return tmp_path


def broken(old: str, new: str, test: str = "tests/test_toy.py", name: str = "") -> Mutation:
    return Mutation(name or f"{old} -> {new}", "package.py", old, new, (test,))


def test_what_is_caught_and_what_survives(toy):
    said = []
    status = mutations.run([broken("2 * x", "3 * x"), broken("x / 2", "x / 4")], toy, 2, said.append)
    assert status == 1, said
    assert said[-2].startswith("2 mutations, 1 caught") and said[-1].startswith("SURVIVED: package.py: x / 2 -> x / 4")
    assert (toy / "package.py").read_text() == SOURCE
    said.clear()
    assert mutations.run([broken("2 * x", "3 * x", "tests/test_toy.py::test_double")], toy, 1, said.append) == 0
    assert said[-1].startswith("1 mutations, 1 caught")


def test_tests_that_fail_or_cannot_run_catch_nothing(toy):
    said = []
    assert mutations.run([broken("def half(x):", "def quarter(x):")], toy, 1, said.append) == 2
    assert said[-1].startswith("BROKEN: package.py: def half(x):")
    (toy / "tests" / "test_toy.py").write_text(TESTS.replace("== 6", "== 7"))
    assert mutations.run([broken("2 * x", "3 * x")], toy, 1, said.append) == 2
    assert "fail without any mutation" in said[-1]


@pytest.mark.parametrize(
    "mutation, words",
    [
        (broken("4 * x", "5 * x"), "there 0 times: '4 . x'; correct it"),
        (broken("return", "yield"), "there 2 times: 'return'"),
        (broken("2 * x", "2 * x"), "changes nothing"),
        (broken("2 * x", "2 * ("), "is no Python"),
        (broken("2 * x", "x", "tests/test_other.py"), "test that is not there: tests/test_other.py"),
        (broken("2 * x", "x", "tests/test_toy.py::test_third"), "not there: tests/test_toy.py::test_third"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(toy, mutation, words):
    said = []
    assert mutations.run([mutation], toy, 1, said.append) == 2
    assert len(said) == 1 and "package.py: " in said[0]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said[0])


def test_two_of_one_name_are_refused(toy):
    same = broken("2 * x", "3 * x")
    assert mutations.check([same, same], toy) == ["two mutations have the name '2 * x -> 3 * x'"]


def test_the_command_lists_and_chooses(capsys):
    assert mutations.main(["--list", "--only", "newton_schulz"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) < len(MUTATIONS) and all("newton_schulz" in line for line in lines)
    assert mutations.main(["--only", "no such thing"]) == 2 and "no such thing" in capsys.readouterr().err
