"""The base model: all stages of pre-training, one after the other, small enough for two CPU cores (K2.5 §3.3).

    make base        # k25 sweep --config=experiments/base/base.py --workdir=runs/base

| run | trains | on | from |
|---|---|---|---|
| small | a language model of half the width | text | nothing |
| vit | encoder and projector, against `small` | captions: questions about images and video with their answers | small |
| llm | the language model | text | nothing |
| projector | the projector alone, against `llm` | as vit | llm, vit |
| joint | everything | text and vision | projector |
| long | everything, context 256 to 1024 by YaRN | the same, passkeys, long lists and conversations, calls of tools | joint |

Vision has half of the tokens in `joint`, not a tenth as in the paper: this language model is no near-end checkpoint of
15T tokens, and its users want it to see. Then `joint` and `long` are asked the held-out questions of every category, and
the last model is written in the public format: `long` is the default of `k25 generate`, `chat` and `eval`.
"""

import json
import pathlib

import ml_collections

from k25_jax.config import argument, preset, run_local, to_dict

LENGTH = 256  # of pre-training; `long` ends with four times that
QUESTIONS = 256
VISION = (
    ("photographs:train", 1.0),
    ("emblems:train", 1.0),
    ("shapes:train", 0.5),
    ("scenes:train", 1.0),
    ("digits:train", 0.5),
    ("words:train", 1.0),
    ("lines:train", 1.0),
    ("charts:train", 1.0),
    ("documents:train", 1.0),
    ("screens:train", 1.0),
    ("boxes:train", 0.7),
    ("points:train", 0.7),
    ("polygons:train", 0.7),
    ("motion:train", 1.0),
    ("turns:train", 4.0),
)
TEXT = (
    ("facts:train", 1.0),
    ("puzzles:train", 1.0),
    ("programs:train", 1.0),
    ("library:train", 0.5),
    ("recall:train:most=1", 1.0),  # copying is learnt from short lists first
    ("recall:train:most=3", 1.0),
    ("recall:train", 0.5),
)
LONG = (
    ("passkey:train:length=512", 1.0),
    ("passkey:train:length=1024", 1.0),
    ("recall:train:most=40", 1.0),
    ("turns:train:most=8", 2.0),
    ("lookups:train", 10.0),
)
# name -> (steps, rows, highest rate, sources, share of vision, trainable)
STAGES = {
    "small": (800, 8, 3e-3, TEXT, None, ()),
    "vit": (1500, 8, 2e-3, VISION, None, ("vision", "projector")),
    "llm": (2500, 8, 3e-3, TEXT, None, ()),
    "projector": (200, 8, 1e-3, VISION, None, ("projector",)),
    "joint": (6000, 8, 2e-3, VISION + TEXT, 0.5, ()),
    "long": (1500, 4, 7e-4, VISION + TEXT + LONG, 0.4, ()),
}
BEFORE = {"vit": "small", "projector": "llm", "joint": "projector", "long": "joint"}  # train.init_from
ENCODER = {"projector": "vit"}  # train.init_vision_from


def get_config(arg: str = ""):
    """One stage; "joint,runlocal" shrinks it to four steps."""
    stage, local = argument(arg, tuple(STAGES), "base.py")
    steps, rows, rate, sources, share, trainable = STAGES[stage]
    length = 4 * LENGTH if stage == "long" else LENGTH
    config = ml_collections.ConfigDict()
    config.name = f"base_{stage}"
    config.stage = "vit" if stage in ("vit", "projector") else "pretrain"
    config.model = to_dict(preset("tiny"))
    config.model.text.max_length = 4 * LENGTH
    config.model.text.rope = dict(theta=1e4, original_length=LENGTH, factor=length / LENGTH, yarn=length > LENGTH)
    if stage in ("small", "vit"):
        config.model.text.update(d_model=64, layers=2)
    vision = sources is not TEXT
    config.data = dict(
        sources=[dict(path=path, kind="task", weight=weight) for path, weight in sources],
        vision_share=share,
        batch_size=rows,
        seq_len=length,
        packs=(6 if stage in ("vit", "projector") else 3) if vision else 0,
        pack_patches=256,
        max_image_patches=64,
        seed=0,
    )
    config.optim = dict(
        peak_lr=rate, end_lr=rate / 20, warmup_steps=min(100, steps // 4), decay_steps=steps // 3, weight_decay=0.05
    )
    config.train = dict(steps=steps, log_every=10, checkpoint_every=500, keep=1, seed=0, trainable=trainable)
    return run_local(config) if local else config


def get_hyper():
    """The stages, each from the runs before it."""
    runs = []
    for stage in STAGES:
        fields = (("train.init_from", BEFORE), ("train.init_vision_from", ENCODER))
        overrides = tuple(f"{field}={{workdir}}/{of[stage]}" for field, of in fields if stage in of)
        runs.append(dict(name=stage, config=f"experiments/base/base.py:{stage}", overrides=overrides))
    return runs


def report(workdir: pathlib.Path) -> None:
    """Ask the models of the last two stages, draw scores and losses, write the last one in the public format."""
    from k25_jax.checkpoint.huggingface import save_params  # slow to import, and only wanted here
    from k25_jax.checkpoint.load import load_model
    from k25_jax.evals.categories import evaluate_run
    from k25_jax.evals.summary import by_category, write_scores
    from k25_jax.report.metrics import read_metrics
    from k25_jax.report.plots import bar_chart, loss_curves

    asked = {stage: evaluate_run(workdir / stage, None, QUESTIONS) for stage in ("joint", "long")}
    series = {stage: by_category(scores) for stage, scores in asked.items()}
    series["commonest answer"] = by_category(asked["long"], "guessing")
    chart = bar_chart(series, "The base model: held-out questions by category", "mean score", top=1.0)
    (workdir / "categories.png").write_bytes(chart)
    curves = {}
    for stage in STAGES:
        rows = read_metrics(workdir / stage)
        curves[stage] = ([row["step"] for row in rows], [float(row["loss"]) for row in rows])
    (workdir / "losses.png").write_bytes(loss_curves(curves, "The base model: loss of each stage"))
    public, model = workdir / "public", load_model(workdir / "long")
    save_params(model.params, model.config, public, "float32")
    write_scores(public / "evals.json", asked["long"], {"run": "long", "questions": QUESTIONS})
    origin = {stage: json.loads((workdir / stage / "experiment.json").read_text()) for stage in STAGES}
    run = json.loads((workdir / "long" / "run.json").read_text())
    origin = {"command": "make base", "revision": run["revision"], "versions": run["versions"], "stages": origin}
    text = json.dumps(origin, indent=1).replace(f"{workdir}/", "runs/base/")  # wherever it was made
    (public / "origin.json").write_text(text + "\n")
    print(f"wrote {public} (the model), {workdir / 'categories.png'} and {workdir / 'losses.png'}")
