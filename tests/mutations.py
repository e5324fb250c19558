"""Break the package in one small way at a time and see that a test notices: `make mutate`.

Each mutation of tests/mutants/ is put into a copy of the repository, and the tests that it names run there. One that they
let pass is a survivor: a fault of that kind would go unseen. Exit status 0 where all are caught, 1 where one survives, 2
where a mutation no longer fits the source, or its tests fail without it.
"""

import argparse
import concurrent.futures
import contextlib
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from mutants import MUTATIONS
from mutants.mutation import Mutation

ROOT = pathlib.Path(__file__).parent.parent
LEFT_OUT = ("build", "dist", "runs", "__pycache__")  # of the copy, beside all that is hidden
LONGEST = 900.0  # seconds; a mutation that makes a loop endless is caught by this


class Stale(ValueError):
    """A mutation that does not fit the source as it is."""


def mutated(source: str, mutation: Mutation) -> str:
    """The source with the mutation in it; raises Stale where what it replaces is not there just once, or stays as it is."""
    count = source.count(mutation.old)
    if count != 1:
        raise Stale(
            f"{mutation.file}: {mutation.name!r} replaces text that is there {count} times: {mutation.old!r}; "
            "correct it in tests/mutants"
        )
    out = source.replace(mutation.old, mutation.new)
    if out == source:
        raise Stale(f"{mutation.file}: {mutation.name!r} changes nothing; correct it in tests/mutants")
    try:
        compile(out, mutation.file, "exec")
    except SyntaxError as error:
        raise Stale(f"{mutation.file}: {mutation.name!r} is no Python: {error}; correct it in tests/mutants") from error
    return out


def check(mutations: Sequence[Mutation], root: pathlib.Path = ROOT) -> list[str]:
    """What is wrong with the list: stale texts, names that come twice, tests that do not exist."""
    problems = []
    names = [mutation.name for mutation in mutations]
    problems += [f"two mutations have the name {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    for mutation in mutations:
        try:
            mutated((root / mutation.file).read_text(), mutation)
        except (Stale, OSError) as error:
            problems.append(str(error))
        for node in mutation.tests:
            file, *test = node.split("::")
            text = (root / file).read_text() if (root / file).is_file() else None
            if text is None or test and f"def {test[-1].partition('[')[0]}(" not in text:
                problems.append(f"{mutation.file}: {mutation.name!r} names a test that is not there: {node}")
        if not mutation.tests:
            problems.append(f"{mutation.file}: {mutation.name!r} names no test")
    return problems


# ----------------------------------------------------------------------------------------------------------------- running
@contextlib.contextmanager
def copies(root: pathlib.Path, count: int) -> Iterator[list[pathlib.Path]]:
    """So many copies of the repository, each in a folder of its own, with one cache of compiled programs."""
    with tempfile.TemporaryDirectory(prefix="k25-mutations-") as folder:
        folders = [pathlib.Path(folder, str(number)) for number in range(count)]
        for copy in folders:
            shutil.copytree(root, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", *LEFT_OUT))
        yield folders


def run_tests(copy: pathlib.Path, arguments: Sequence[str], longest: float = LONGEST) -> tuple[int | None, str]:
    """(pytest's exit status, or None where it took too long, and what it printed), in a copy."""
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # a file that changes twice in a second would be read as it was
        "XDG_CACHE_HOME": str(copy.parent / "cache"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(
        command, cwd=copy, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=longest)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        return None, f"not done after {longest:.0f} seconds"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too


def verdict(copy: pathlib.Path, mutation: Mutation) -> tuple[str, str]:
    """("caught", "SURVIVED" or "BROKEN", what pytest printed) of one mutation; the copy is whole again afterwards."""
    file = copy / mutation.file
    source = file.read_text()
    file.write_text(mutated(source, mutation))
    try:
        status, text = run_tests(copy, ["-x", "-p", "no:xdist", *mutation.tests])
    finally:
        file.write_text(source)
    return {0: "SURVIVED", 1: "caught", None: "caught"}.get(status, "BROKEN"), text


def run(mutations: Sequence[Mutation], root: pathlib.Path = ROOT, jobs: int = 2, say=print) -> int:
    """All mutations, `jobs` at a time; says how each went and returns the exit status."""
    problems = check(mutations, root)
    if problems:
        say("\n".join(problems))
        return 2
    began, found = time.monotonic(), {"caught": [], "SURVIVED": [], "BROKEN": []}
    with copies(root, jobs) as folders, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        nodes = sorted({node for mutation in mutations for node in mutation.tests})
        together = [f"--numprocesses={jobs}", "--dist=worksteal"] if jobs > 1 else ["-p", "no:xdist"]
        status, text = run_tests(folders[0], [*together, *nodes], 4 * LONGEST)
        if status:
            say(f"{text}\nthe tests fail without any mutation")
            return 2
        say(f"{len(nodes)} tests or files of tests pass without any mutation ({time.monotonic() - began:.0f} s)")
        free = queue.SimpleQueue()
        for folder in folders:
            free.put(folder)

        def one(mutation: Mutation) -> tuple[Mutation, str, str, float]:
            folder, start = free.get(), time.monotonic()
            try:
                return mutation, *verdict(folder, mutation), time.monotonic() - start
            finally:
                free.put(folder)

        asked = [pool.submit(one, mutation) for mutation in mutations]
        for number, done in enumerate(concurrent.futures.as_completed(asked), 1):
            mutation, how, text, seconds = done.result()
            found[how].append(mutation)
            say(f"[{number:3d}/{len(mutations)}] {how:8s} {seconds:6.1f} s  {mutation.file}: {mutation.name}")
            if how == "BROKEN":
                say(text)
    minutes = (time.monotonic() - began) / 60
    say(f"{len(mutations)} mutations, {len(found['caught'])} caught, {minutes:.0f} minutes")
    for how in ("SURVIVED", "BROKEN"):
        for mutation in found[how]:
            say(f"{how}: {mutation.file}: {mutation.name} ({' '.join(mutation.tests)})")
    return 2 if found["BROKEN"] else int(bool(found["SURVIVED"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="mutations", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="those with PATTERN in their name or file")
    parser.add_argument("--list", action="store_true", help="name them, and run none")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    args = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if args.only in m.name or args.only in m.file]
    if not chosen:
        print(f"no mutation has {args.only!r} in its name or file", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{m.file}: {m.name} ({' '.join(m.tests)})" for m in chosen))
        return 0
    return run(chosen, jobs=args.jobs, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main())
