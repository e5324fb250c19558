"""A small run of the stage rl from the embedded base model: its experiment file, and what it leaves behind."""

import json
import pathlib

import runs
from k25_jax.checkpoint.store import newest_step

STEPS, GROUPS, SAMPLES = 8, 2, 4
TIMINGS = (*runs.TIMINGS, "learning_seconds", "waiting_seconds")
EXPERIMENT = """
import ml_collections
from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.config import to_dict

def get_config(arg=""):
    config = ml_collections.ConfigDict()
    config.name, config.stage, config.model = "small", "rl", to_dict(read_config(BASE))
    config.model["text"]["moe"]["bias_rate"] = 0.0
    config.data = dict(batch_size=4, seq_len=192, packs=1, pack_patches=512, max_image_patches=64)
    config.optim = dict(name="muonclip", peak_lr=1e-3, end_lr=1e-3, warmup_steps=0, weight_decay=0.0, muon_dtype="float32")
    config.train = dict(steps={steps}, log_every=1, checkpoint_every={every}, keep=2, init_from="base")
    problems = [dict(path="puzzles:train", records=6), dict(path="shapes:train", records=4, ability="knowledge")]
    config.rl = dict(problems=problems, groups={groups}, samples={samples}, estimate=4, rows=8, pass_low=0.0, pass_high=1.0)
    config.rl["episode"] = dict(tokens=12, turn_tokens=12, context=96)
    return config
"""


def write_experiment(folder: pathlib.Path, steps: int = STEPS, every: int = 3, groups: int = GROUPS) -> pathlib.Path:
    """An experiment file in `folder`."""
    file = folder / "small.py"
    file.write_text(EXPERIMENT.format(steps=steps, every=every, groups=groups, samples=SAMPLES))
    return file


def committed(run: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """What lies in a run's ledger, with the time of its writing: what is committed once never changes either."""
    files = [file for file in (run / "rl").rglob("*") if file.suffix in (".json", ".jsonl", ".npy", ".npz")]
    return {str(file.relative_to(run)): (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(files)}


def events(run: pathlib.Path) -> int:
    """How far a run has come, also while it goes on: what is committed, and the steps that are logged."""
    return sum(1 for _ in (run / "rl").rglob("*.json*")) + runs.step_of(run)


def bits(run: pathlib.Path) -> dict[str, int]:
    """Sums of the bits of all that the last checkpoint has: weights, means, counts."""
    return newest_step(run / "checkpoints")[1]


def untimed(run: pathlib.Path) -> list[dict]:
    """Metrics without what depends on the clock of the learner."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in runs.rows(run)]


def batches(run: pathlib.Path) -> list[dict]:
    """The records of the committed batches."""
    return [json.loads(file.read_text()) for file in sorted((run / "rl" / "batches").glob("*.json"))]
