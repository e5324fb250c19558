"""When should vision come in? Early at 10:90, mid-way at 20:80, or late at 50:50, on equal budgets (K2.5 §3.3).

All arms see the same numbers of vision and of text tokens; they differ in when, and how densely. The whole study:

    k25 sweep --config=experiments/ablations/vision_timing.py --workdir=runs/vision_timing --jobs=2

trains three seeds of each arm, asks all the same held-out questions, and writes `vision_timing.png`, `results.md` and
`results.json`. README.md beside this file says what came out.
"""

import json
import math
import pathlib

import ml_collections
import numpy as np

from k25_jax.config import ConfigError, argument, run_local

ARMS = {"early": (0.0, 0.10), "mid": (0.5, 0.20), "late": (0.8, 0.50)}  # vision comes in at, with a share of
SEEDS = (0, 1, 2)
STEPS, ROWS, LENGTH = 3000, 16, 256
FILLED = 0.94  # of all slots, by the budgets; the rest is for padding
PATCHES = 2400  # of a batch that was all vision
SLACK = 64  # tokens that the vision budget may lack: no picture is torn
TOKENS = int(STEPS * ROWS * LENGTH * FILLED)
BUDGETS = {"vision": TOKENS // 10, "text": TOKENS - TOKENS // 10}
VISION = (
    ("emblems:train", 1.0),
    ("scenes:train", 1.0),
    ("digits:train", 0.5),
    ("lines:train", 0.5),
)
TEXT = (
    ("facts:train", 1.0),
    ("puzzles:train", 1.0),
    ("programs:train", 1.0),
)
ASKED = ("emblems:test", "scenes:test", "digits:test", "lines:test", "facts:test", "puzzles:test", "programs:test")
QUESTIONS = 256
# What the paper reports, at its scale.
PAPER = {
    "vision_knowledge": {"early": 25.8, "mid": 25.0, "late": 24.2},
    "vision_reasoning": {"early": 43.8, "mid": 40.7, "late": 39.0},
    "ocr": {"early": 65.7, "mid": 64.1, "late": 61.5},
    "text_knowledge": {"early": 45.5, "mid": 43.9, "late": 43.1},
    "text_reasoning": {"early": 58.5, "mid": 58.6, "late": 57.8},
    "code": {"early": 24.8, "mid": 24.0, "late": 24.0},
}


def get_config(arg: str = ""):
    """One arm; "early,runlocal" shrinks it to four steps."""
    arm, local = argument(arg, tuple(ARMS), "vision_timing.py")
    start, share = ARMS[arm]
    config = ml_collections.ConfigDict()
    config.name = f"vision_timing_{arm}"
    config.model = "tiny"
    config.data = dict(
        sources=[dict(path=path, kind="task", weight=weight) for path, weight in VISION + TEXT],
        vision_share=((0.0, 0.0), (start, share)) if start else share,
        vision_tokens=BUDGETS["vision"],
        text_tokens=BUDGETS["text"],
        batch_size=ROWS,
        seq_len=LENGTH,
        packs=math.ceil(share * PATCHES / 256),  # about what a batch has: packs come full or not at all
        pack_patches=256,
        max_image_patches=64,
        seed=0,
    )
    config.optim = dict(peak_lr=2e-3, end_lr=1e-4, warmup_steps=100, decay_steps=STEPS // 5, weight_decay=0.05)
    config.train = dict(steps=STEPS, log_every=10, checkpoint_every=1000, keep=1, seed=0)
    return run_local(config) if local else config


def get_hyper():
    """Three seeds of each arm; a seed chooses initial weights and the order of the data, alike for all arms."""
    here = "experiments/ablations/vision_timing.py"
    return [
        dict(name=f"{arm}_{seed}", config=f"{here}:{arm}", overrides=(f"train.seed={seed}", f"data.seed={seed}"))
        for seed in SEEDS
        for arm in ARMS
    ]


def report(workdir: pathlib.Path) -> None:
    """Ask all runs, check the budgets, write the figure and the tables."""
    from k25_jax.evals.categories import evaluate_run  # slow to import, and only wanted here
    from k25_jax.evals.summary import by_category
    from k25_jax.report.plots import grouped_points

    check_budgets(workdir)
    scores = {
        f"{arm}_{seed}": by_category(evaluate_run(workdir / f"{arm}_{seed}", ASKED, QUESTIONS))
        for arm in ARMS
        for seed in SEEDS
    }
    found = {
        category: {arm: [100 * scores[f"{arm}_{seed}"][category] for seed in SEEDS] for arm in ARMS}
        for category in PAPER
    }
    (workdir / "results.json").write_text(json.dumps({"budgets": BUDGETS, "found": found, "paper": PAPER}, indent=1))
    (workdir / "results.md").write_text(as_table(found))
    points = {arm: {category.replace("_", " "): found[category][arm] for category in PAPER} for arm in ARMS}
    title = f"Vision early, mid-way or late: equal budgets, {len(SEEDS)} seeds"
    (workdir / "vision_timing.png").write_bytes(grouped_points(points, title, "score, %"))
    print(as_table(found))
    print(f"wrote {workdir / 'vision_timing.png'}, results.md and results.json")


def check_budgets(workdir: pathlib.Path) -> dict[str, dict[str, int]]:
    """Tokens of each modality that each run was trained on; raises ConfigError unless all are those of BUDGETS."""
    from k25_jax.report.metrics import read_metrics

    seen = {}
    for arm in ARMS:
        for seed in SEEDS:
            last = read_metrics(workdir / f"{arm}_{seed}")[-1]
            seen[f"{arm}_{seed}"] = {name: int(last[f"{name}_tokens"]) for name in BUDGETS}
    lacking = {run: {name: BUDGETS[name] - counts[name] for name in BUDGETS} for run, counts in seen.items()}
    wrong = {run: lack for run, lack in lacking.items() if lack["text"] or not 0 <= lack["vision"] <= SLACK}
    if wrong:
        raise ConfigError(f"vision_timing: of the budgets {BUDGETS} these runs lack {wrong}")
    return seen


def as_table(found: dict) -> str:
    """Ours as mean ± standard deviation over the seeds, the paper's beside it, in Markdown."""
    head = ["category", *(f"{arm}" for arm in ARMS), *(f"{arm}, paper" for arm in ARMS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for category, arms in found.items():
        ours = [f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" for values in arms.values()]
        theirs = [f"{PAPER[category][arm]:.1f}" for arm in ARMS]
        lines.append("| " + " | ".join([category.replace("_", " "), *ours, *theirs]) + " |")
    return "\n".join(lines) + "\n"
