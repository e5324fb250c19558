"""Two processes that train, one of them killed in mid-step (row l of the bounds; K2.5 §3.8).

The figure is the time from SIGKILL to the exit of the other, the longer of two tries: process 1 is killed, and process 0,
through which all find each other. The other must exit with an error that names the cause and the remedy. Then all are
started again, and the final checkpoint is compared, bit for bit, with that of a run that nobody disturbed. The model is a
minute one, in two processes of one CPU device each. With --json one JSON line.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from k25_jax.checkpoint.store import Store
from k25_jax.config import load_experiment
from k25_jax.train.state import abstract_state

ROOT = pathlib.Path(__file__).parent.parent
CONFIG, STEPS, EVERY, KILLED_AT = "experiments/pretrain/k25_1t.py:runlocal", 10, 3, 5
OVERRIDES = (
    f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.remat=none", "optim.name=adamw",
    "model.text.layers=2", "model.vision.layers=1", "data.sources=[{'path': 'shapes:train', 'kind': 'task'}]",
    "data.lanes=2",
)  # fmt: skip
BOUND = 60.0


def start(run: pathlib.Path) -> subprocess.Popen:
    """Both processes, behind the launcher."""
    train = [sys.executable, "-m", "k25_jax.cli", "train", f"--config={CONFIG}", f"--workdir={run}", *OVERRIDES]
    command = [sys.executable, "launch/local.py", "--processes=2", "--", *train]
    flags = "--xla_backend_optimization_level=0"  # quick to compile
    variables = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables, cwd=ROOT
    )


def children(process: subprocess.Popen) -> list[int]:
    """The two processes, in their order."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return sorted(map(int, file.read().split()))


def steps(run: pathlib.Path) -> int:
    """Steps in the metrics of a run."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def finish(run: pathlib.Path) -> None:
    """Train to the end."""
    process = start(run)
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(err)


def kill(run: pathlib.Path, victim: int) -> dict:
    """Kill process `victim` in the step after KILLED_AT: the seconds until the other exits, its status, what it says."""
    process = start(run)
    while steps(run) < KILLED_AT and process.poll() is None:
        time.sleep(0.002)
    pids = children(process)
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    while os.path.exists(f"/proc/{pids[1 - victim]}/stat") and not ended(pids[1 - victim]):
        time.sleep(0.01)
    seconds = time.monotonic() - began
    _, err = process.communicate()
    said = re.search(rf"k25 train: error: process {1 - victim}: (.*)", err)
    return {"killed": victim, "seconds": seconds, "launcher": process.returncode, "said": said.group(1) if said else ""}


def ended(pid: int) -> bool:
    """Whether the process is a zombie: it has exited, and the launcher has not asked for its status yet."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def equal(run: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether the final checkpoints hold the same bits, and the same states of the data."""
    experiment = load_experiment(CONFIG, OVERRIDES)
    leaves = []
    for folder in (run, other):
        store = Store(folder / "checkpoints")
        state, data = store.restore(abstract_state(experiment), STEPS)
        leaves.append([np.asarray(a).tobytes() for a in jax.tree.leaves(state)] + [json.dumps(data, sort_keys=True)])
        store.close()
    return leaves[0] == leaves[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = pathlib.Path(folder, "undisturbed")
        finish(undisturbed)
        tries = []
        for victim in (1, 0):
            run = pathlib.Path(folder, f"killed{victim}")
            tries.append(kill(run, victim))
            finish(run)
            tries[-1] |= {"resumed_exactly": equal(run, undisturbed)}
    figure = max(one["seconds"] for one in tries)
    clear = all("has died" in one["said"] and "Start all processes again" in one["said"] for one in tries)
    ok = figure <= BOUND and clear and all(one["resumed_exactly"] and one["launcher"] for one in tries)
    if args.json:
        print(json.dumps({"name": "peer_death", "figure": figure, "bound": BOUND, "ok": ok, "tries": tries}))
        return
    for one in tries:
        print(
            f"process {one['killed']} killed: the other exits after {one['seconds']:.1f} s (bound {BOUND:.0f}), saying"
        )
        print(f"  {one['said'] or 'nothing'}")
        print(f"  started again, it ends {'with the same bits' if one['resumed_exactly'] else 'DIFFERENTLY'}")


if __name__ == "__main__":
    main()
