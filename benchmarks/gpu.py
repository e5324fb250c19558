"""One call for a GPU: are the kernels and the model right on it, and how fast is each beside its peer or its limit?

    python -m benchmarks.gpu                        # 8 minutes at most; JAX_PLATFORMS=cuda make bench NAME=gpu is the same
    python -m benchmarks.gpu --parts=kernels,grouped --output=gpu.jsonl

Prints one line of JSON a figure as it comes, and appends it to --output ($OUT/gpu.jsonl where OUT is set). Every part
runs in a process of its own with a deadline: one that fails, or for which no time is left, is a line that says so, and
the rest goes on. Parts stand in the order of their worth. Where JAX sees no GPU sizes are small: what is checked then
is this benchmark. Status 1: the kernels or the model are wrong, or that could not be seen. The first line names what
setup.cfg asks for and is not installed; most of it the parts do not need, and one that does says so.
"""

import argparse
import configparser
import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parent.parent
TOTAL = 480.0  # seconds
LEAST = 10.0  # a part is not begun with less


@dataclass(frozen=True)
class Part:
    """A module of benchmarks/on_gpu, its deadline in seconds, and whether it says what is right, not what is fast."""

    seconds: float
    checks: bool = False


PARTS = {
    "kernels": Part(100, checks=True),
    "model": Part(100, checks=True),
    "grouped": Part(90),
    "attention": Part(70),
    "training": Part(150),
    "engine": Part(110),
}


def arguments(argv=None):
    about, _, _ = __doc__.partition("\n\n")
    out = os.environ.get("OUT")
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help="those to run, in this order")
    parser.add_argument("--budget", default="", help="seconds of a part, over its own: model=60,engine=0")
    parser.add_argument("--output", default=f"{out}/gpu.jsonl" if out else "", help="a file that lines are appended to")
    parser.add_argument("--small", action="store_true", help="small sizes, on a GPU too")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # this process is that part's
    parser.add_argument("--json", action="store_true", help="as it is anyway")
    args = parser.parse_args(argv)
    args.parts = [name for name in args.parts.split(",") if name]
    budget = dict(item.split("=", 1) for item in args.budget.split(",") if item)
    for name in (*args.parts, *budget):
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are {', '.join(PARTS)}")
    args.budget = {name: float(budget.get(name, PARTS[name].seconds)) for name in args.parts}
    return args


class Report:
    """Lines to standard output and to a file; remembers which parts have shown that they are right."""

    def __init__(self, output: str):
        self.output, self.wrong, self.lines = output, set(), 0

    def add(self, part: str, text: str) -> None:
        """Pass on a line of a part; text that is none is not passed on."""
        try:
            line = json.loads(text)
        except ValueError:
            print(text, end="", file=sys.stderr)
            return
        if line.get("ok") is False or "skipped" in line:
            self.wrong.add(part)
        self.lines += 1
        print(json.dumps(line), flush=True)
        if self.output:
            with open(self.output, "a") as file:
                file.write(json.dumps(line) + "\n")

    def say(self, part: str, name: str, **fields) -> None:
        """A line of this process."""
        self.add(part, json.dumps({"name": name, "value": None, "unit": "", "ok": None, "part": part} | fields))


def missing() -> list[str]:
    """Requirements in setup.cfg that are not installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = [re.match(r"[\w.-]+", line).group() for line in config["options"]["install_requires"].split("\n") if line]
    return [name for name in names if not installed(name)]


def installed(name: str) -> str:
    """The version of a distribution; empty where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment() -> dict:
    """Of the parts' processes, which have the card for themselves, one after the other.

    Where JAX is told its platforms, the CPU is one of them, since the checks compare with it.
    """
    variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"} | os.environ
    platforms = variables.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        variables["JAX_PLATFORMS"] = f"{platforms},cpu"
    return variables


def run_part(report: Report, name: str, allowed: float, small: bool) -> None:
    """A part in a process of its own, which is killed with its children when `allowed` seconds are over."""
    command = [sys.executable, "-m", "benchmarks.gpu", f"--part={name}", f"--seconds={allowed}", *["--small"] * small]
    with tempfile.TemporaryFile("w+") as errors:
        began, late = time.monotonic(), threading.Event()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

        def end():
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(allowed, end)
        timer.start()
        try:
            for text in child.stdout:
                report.add(name, text)
            status = child.wait()
        finally:
            timer.cancel()
        errors.seek(0)
        tail = errors.read()[-1500:]
    print(tail, end="", file=sys.stderr)
    if late.is_set():
        report.say(name, name, ok=False, error=f"not done after {allowed:.0f} s: ended")
    elif status:
        report.say(name, name, ok=False, error=f"ended with status {status}: {tail[-600:]}")
    report.say(name, f"{name}_seconds", value=round(time.monotonic() - began, 1), unit="s")


def be_part(args) -> int:
    """What the process of a part does."""
    ends = time.monotonic() + args.seconds
    try:
        import jax

        from benchmarks.on_gpu.run import Run

        run = Run(args.part, args.small or jax.default_backend() != "gpu", ends)
        module = importlib.import_module(f"benchmarks.on_gpu.{args.part}")
    except ModuleNotFoundError as error:
        line = {"name": args.part, "ok": False, "part": args.part, "error": str(error), "lacks": error.name}
        print(json.dumps({"value": None, "unit": ""} | line), flush=True)
        return 0
    module.run(run)
    return 0


def main(argv=None) -> int:
    args = arguments(argv)
    if args.part:
        return be_part(args)
    ends, report, lacking = time.monotonic() + args.seconds, Report(args.output), missing()
    report.say(
        "", "packages", value=len(lacking), unit="missing", missing=lacking, python=platform.python_version(),
        versions={name: installed(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "tokamax")},
    )  # fmt: skip
    for name in args.parts:
        left = ends - time.monotonic()
        allowed = min(args.budget[name], left)
        if allowed < min(LEAST, args.budget[name]) or not args.budget[name]:
            report.say(name, name, skipped=f"{left:.0f} s are left, of its {args.budget[name]:.0f}: not begun")
            continue
        run_part(report, name, allowed, args.small)
    wrong = sorted(name for name in report.wrong if name and PARTS[name].checks)
    report.say("", "verdict", value=len(wrong), unit="parts", ok=not wrong, wrong=wrong, failed=sorted(report.wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
