"""One small fault."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which stands once in the file, becomes `new`; the tests are to fail then."""

    name: str
    file: str  # from the root of the repository
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest: files, or single tests, from the root


def of(file: str, *entries: tuple[str, str, str, str]) -> list[Mutation]:
    """Mutations of k25_jax/`file`: (name, old text, new text, tests below tests/ with spaces between them)."""
    return [
        Mutation(name, f"k25_jax/{file}", old, new, tuple(f"tests/{test}" for test in tests.split()))
        for name, old, new, tests in entries
    ]
