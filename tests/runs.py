"""A minute K2.5 that is trained by `k25 train` in a process of its own: its data, its experiment file, its commands."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
STEPS, EVERY = 240, 20  # a step takes some 10 ms
OPTIMISED = {"xla_backend_optimization_level": 3}  # as outside of tests: compiler_options for jax.jit
TIMINGS = ("tokens_per_second", "step_seconds", "data_seconds", "data_share")
EXPERIMENT = """
import ml_collections

def get_config(arg=""):
    config = ml_collections.ConfigDict()
    config.name = "minute"
    text = dict(vocab_size=288, d_model=24, layers=2, ffn_dim=32, heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_dim=8,
                qk_rope_dim=4, v_dim=8, init_std=0.1, max_length=128)
    text |= dict(moe=dict(experts=4, top_k=2, ffn_dim=16), rope=dict(original_length=128))
    vision = dict(layers=1, width=16, heads=2, mlp_dim=16, pos_height=4, pos_width=4)
    ids = dict(media_begin_id=261, media_end_id=263, media_pad_id=264, bos_id=256, eos_ids=(258,), pad_id=276)
    config.model = dict(text=text, vision=vision, **ids)
    config.data = dict(sources=[dict(path={path!r})], batch_size=2, seq_len=64, packs=1, pack_patches=64)
    config.optim = dict(peak_lr=1e-2, end_lr=1e-3, warmup_steps=2, decay_steps=20)
    config.train = dict(steps={steps}, log_every=1, checkpoint_every={every}, keep=3)
    return config
"""


def on_eight_devices(script: str) -> str:
    """What `script` prints, run in a process of its own with eight forced CPU devices."""
    variables = environment()
    variables["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """A JSONL file of texts, documents with an image, and questions about an image; the images beside it."""
    rng, lines = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        rows, columns = 28 * rng.integers(1, 3, 2)
        Image.fromarray(rng.integers(0, 256, (rows, columns, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        lines.append({"text": f"a line of text, number {i}"})
        lines.append({"parts": [{"text": "see "}, {"image": f"{i}.png"}, {"text": f" picture {i}"}]})
        question = [{"image": f"{i}.png"}, {"text": "which?"}]
        lines.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"no. {i}"}]}
        )
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "records.jsonl"


def write_experiment(folder: pathlib.Path) -> pathlib.Path:
    """The data and an experiment file that reads them."""
    file = folder / "minute.py"
    file.write_text(EXPERIMENT.format(path=str(write_data(folder / "data")), steps=STEPS, every=EVERY))
    return file


def shared(name: str) -> pathlib.Path:
    """A folder of this name for all processes of one test session."""
    folder = pathlib.Path(os.environ["K25_TESTS_SHARED"], name)
    folder.mkdir(exist_ok=True)
    return folder


def once(name: str, make: Callable[[pathlib.Path], str]) -> tuple[pathlib.Path, str]:
    """A folder that `make` has filled for all processes of one test session, and what it returned; the first makes it."""
    folder = shared(name)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes meanwhile waits
        if not (folder / "made").exists():
            (folder / "made").write_text(make(folder))
    return folder, (folder / "made").read_text()


def environment() -> dict[str, str]:
    """That of a child process: on the CPU, quick to compile by the XLA_FLAGS of conftest.py."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def start(*arguments: str, module: str = "k25_jax.cli") -> subprocess.Popen:
    """Start `k25 ARGUMENTS`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=ROOT)


def k25(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Run `k25 ARGUMENTS` to its end."""
    process = start(*arguments)
    out, err = process.communicate(stdin, timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(process: subprocess.Popen, condition, seconds: float = 300) -> bool:
    """Wait until `condition()`; False when the process ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"nothing happened in {seconds} seconds"
        time.sleep(0.002)
    return True


def step_of(run: pathlib.Path) -> int:
    """The last step in a run's metrics, also while it is being trained."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def rows(run: pathlib.Path) -> list[dict]:
    """The complete lines of a run's metrics, also while it is being trained."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []


def untimed(run: pathlib.Path) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows(run)]
