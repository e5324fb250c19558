"""The preset 1b's training step: tokens a second, and the share of the card's peak by preflight's count of model FLOPs."""

import dataclasses
import gc
import math

import jax
import numpy as np

from benchmarks.on_gpu.run import Run, peak_flops, seconds
from k25_jax.config import DataConfig, Experiment, K25Config, OptimConfig, TrainConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.preflight.cost import model_flops
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

BOUND = 0.4  # MFU
ROWS, LENGTH, SIDE = 16, 4096, 44  # rows are halved until they fit; an image of SIDE x SIDE patches in each


def run(run: Run) -> None:
    """A line for our choice of kernels, one for the experts in plain XLA: the form that needs no kernel."""
    for form in ("auto",) if run.small else ("auto", "blocked"):
        run.attempt(f"training_step_{form}", measure, run, form, seconds=5 if run.small else 60)


def measure(run: Run, form: str) -> None:
    model, rows, length, side = (minute(), 2, 64, 4) if run.small else (preset("1b"), ROWS, LENGTH, SIDE)
    while True:
        experiment = experiment_of(with_form(model, form), rows, length, "bfloat16", side, "full")
        try:
            taken = step_seconds(experiment, rounds=1 if run.small else 3)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                raise
        gc.collect()  # what the failed try held
        rows //= 2
    flops, peak = model_flops(experiment), peak_flops()
    mfu = flops / taken / peak if peak else None
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    run.line(
        f"training_step_{form}", rows * length / taken, "tokens/s", peer="the card's peak, bfloat16", peer_value=peak,
        ratio=mfu, bound=BOUND, ok=None if mfu is None else mfu >= BOUND, dtype="bfloat16", rows=rows, length=length,
        layers=model.text.layers, seconds=taken, model_tflop=flops / 1e12, peak_bytes=memory,
    )  # fmt: skip


def step_seconds(experiment: Experiment, rounds: int) -> float:
    step, state, batch = make_step(experiment, loss_fn), [init_state(experiment)], make_batch(experiment, 0)
    batch = jax.device_put(batch)

    def one():
        state[0], metrics = step(state[0], batch)
        return metrics["loss"]

    taken = seconds({"step": one}, rounds)["step"]
    if not math.isfinite(float(one())):
        raise FloatingPointError("the loss is not finite")
    return taken


def experiment_of(model: K25Config, rows: int, length: int, dtype: str, side: int, remat: str = "none") -> Experiment:
    """Training on rows with an image of side x side patches each; the optimizer is MuonClip, as for K2.5."""
    packs = max(1, rows // 4)
    patches = dict(packs=packs, pack_patches=-(-rows // packs) * side * side, max_image_patches=side * side)
    data = DataConfig(batch_size=rows, seq_len=length, **patches)
    optim = OptimConfig(name="muonclip", peak_lr=6e-4, warmup_steps=2)
    return Experiment(model=model, data=data, optim=optim, train=TrainConfig(remat=remat, compute_dtype=dtype))


def minute() -> K25Config:
    """The preset tiny, made minute: what compiles quickly."""
    model = preset("tiny")
    ranks = dict(q_lora_rank=8, kv_lora_rank=16, qk_nope_dim=8, qk_rope_dim=8, v_dim=8)
    moe = dataclasses.replace(model.text.moe, experts=4, ffn_dim=16)
    text = dataclasses.replace(model.text, d_model=32, layers=2, ffn_dim=32, heads=2, moe=moe, max_length=128, **ranks)
    vision = dataclasses.replace(model.vision, layers=1, width=16, heads=2, mlp_dim=16)
    return dataclasses.replace(model, text=text, vision=vision)


def with_form(model: K25Config, form: str) -> K25Config:
    """The model with another grouped matmul."""
    moe = dataclasses.replace(model.text.moe, grouped_matmul=form)
    return dataclasses.replace(model, text=dataclasses.replace(model.text, moe=moe))


def make_batch(experiment: Experiment, seed: int):
    """Rows of an image and random text, all of it learned from."""
    config, data, rng = experiment.model, experiment.data, np.random.default_rng(seed)
    side, examples = math.isqrt(data.max_image_patches), []
    for _ in range(data.batch_size):
        clip = Clip(rng.integers(0, 256, (side * side, config.vision.patch_dim)).astype(np.uint8), (1, side, side))
        text = rng.integers(0, 256, data.seq_len - clip.tokens).tolist()
        examples.append(
            make_example([config.media_pad_id, *text], [1.0] * (1 + len(text)), [clip], config.media_pad_id)
        )
    return pack_examples(examples, data, config)
