"""How long a command takes until it does something, with an empty cache of compiled programs and with a full one.

`k25 --help` (beside `python -c pass`), the first token of `k25 generate`, `k25 serve` until /health says anything and until a
first answer, `k25 train` of the demo until its first step is logged. Each is a process of its own; every round begins with
an empty cache in a folder of its own (cold), and runs the same again (warm). Bounds: help within 0.3 s of Python alone, warm
first token 4 s, warm first answer of a server 6 s. With --tests also `make test` with an empty cache, and over it again
(half an hour). With --json one JSON line.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
K25 = (sys.executable, "-m", "k25_jax.cli")
PROMPT = "hi"
BOUNDS = {
    "help": 0.3,
    "generate, first token": 4.0,
    "serve, first answer": 6.0,
}  # seconds, warm; help beyond Python's own
LONGEST = 1800.0


@contextlib.contextmanager
def started(command: tuple[str, ...], variables: dict[str, str]) -> Iterator[tuple[subprocess.Popen, float]]:
    """The process and the time at which it began; it is ended on leaving."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables, cwd=ROOT)
    try:
        yield process, began
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close()


def whole(command: tuple[str, ...], variables: dict[str, str]) -> float:
    """Seconds from start to end."""
    began = time.perf_counter()
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=2 * LONGEST)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - began


def generate(variables: dict[str, str], folder: pathlib.Path) -> dict[str, float]:
    """Until the first piece of the answer is on standard output."""
    command = (*K25, "generate", f"--prompt={PROMPT}", "--temperature=0", "--max_tokens=32", "--mode=plain")
    with started(command, variables) as (process, began):
        if not os.read(process.stdout.fileno(), 1):
            raise SystemExit(f"no answer: {process.stderr.read().decode()[-2000:]}")
        return {"generate, first token": time.perf_counter() - began}


def serve(variables: dict[str, str], folder: pathlib.Path) -> dict[str, float]:
    """Until /health says anything, and until the first answer of a request that was sent then."""
    with started((*K25, "serve", "--port=0"), variables) as (process, began):
        line = b""
        while b"listening at " not in line:
            line = process.stderr.readline()
            if not line:
                raise SystemExit("the server ended")
        url = line.split(b"listening at ")[1].split(b";")[0].decode()
        ask(f"{url}/health")
        found = {"serve, /health": time.perf_counter() - began}
        body = {"model": "base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0}
        answer = ask(f"{url}/v1/chat/completions", body)
        assert answer["usage"]["completion_tokens"] >= 1, answer
        return found | {"serve, first answer": time.perf_counter() - began}


def ask(url: str, body: dict | None = None) -> dict:
    """The JSON at an address, errors included."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LONGEST) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return json.load(error)


def train(variables: dict[str, str], folder: pathlib.Path) -> dict[str, float]:
    """Until the first step of the demo stands in metrics.jsonl."""
    run = pathlib.Path(tempfile.mkdtemp(dir=folder))
    with started((*K25, "train", "--config=experiments/pretrain/demo.py", f"--workdir={run}"), variables) as (
        process,
        began,
    ):
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.perf_counter() - began > LONGEST:
                raise SystemExit(f"no step: {process.stderr.read().decode()[-2000:]}")
            time.sleep(0.02)
        return {"train, first step": time.perf_counter() - began}


def tests(variables: dict[str, str], folder: pathlib.Path) -> dict[str, float]:
    """`make test` as from a shell: `make bench` has settings of memory of its own."""
    ours = ("GLIBC_TUNABLES", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return {"make test": whole(("make", "test"), {k: v for k, v in variables.items() if k not in ours})}


def measure(what, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by name, cold and warm."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="k25-startup-") as folder:
            hidden = ("JAX_COMPILATION_CACHE_DIR", "K25_NO_CACHE")
            variables = {k: v for k, v in os.environ.items() if k not in hidden} | {"XDG_CACHE_HOME": f"{folder}/cache"}
            for state in ("cold", "warm"):
                for name, seconds in what(variables, pathlib.Path(folder)).items():
                    found.setdefault(name, {"cold": [], "warm": []})[state].append(seconds)
                    print(f"{name}, {state}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return found


def help_beside_python(rounds: int) -> dict[str, list[float]]:
    """`k25 --help` and `python -c pass`, in turns."""
    commands = {"help": (*K25, "--help"), "python": (sys.executable, "-c", "pass")}
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            found[name].append(whole(command, dict(os.environ)))
    return {name: seconds[1:] for name, seconds in found.items()}  # the first read the files from the disk


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tests", action="store_true", help="also `make test`, twice, in one round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    helped = help_beside_python(max(5, args.rounds))
    more = statistics.median(helped["help"]) - statistics.median(helped["python"])
    found: dict[str, dict[str, list[float]]] = {}
    for what in (generate, serve, train):
        found |= measure(what, args.rounds)
    if args.tests:
        found |= measure(tests, 1)
    warm = {name: statistics.median(seconds["warm"]) for name, seconds in found.items()}
    within = {name: warm[name] <= bound for name, bound in BOUNDS.items() if name in warm} | {
        "help": more <= BOUNDS["help"]
    }
    if args.json:
        print(json.dumps({"help": helped, "help_more": more, "seconds": found, "within": within}))
        return
    print(f"k25 --help takes {more:.2f} s more than python -c pass ({spread(helped['help'])} s)")
    print(f"{'':24s}{'cold, s':>26s}{'warm, s':>26s}{'cold / warm':>14s}{'bound':>8s}")
    for name, seconds in found.items():
        ratio = statistics.median(seconds["cold"]) / warm[name]
        row = f"{name:24s}{spread(seconds['cold']):>26s}{spread(seconds['warm']):>26s}{ratio:14.1f}"
        print(row + (f"{BOUNDS[name]:8.1f}" if name in BOUNDS else ""))
    missed = [name for name, holds in within.items() if not holds]
    print(f"beyond their bounds: {', '.join(missed)}" if missed else "all within their bounds")


def spread(values: list[float]) -> str:
    """Median [smallest, largest]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
