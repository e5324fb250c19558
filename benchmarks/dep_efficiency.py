"""What images cost a training step: DEP against the encoder on the first stage, and on every device (row h; K2.5 §3.8).

Two real processes of one core and one CPU device each are the two stages of a pipeline. In every round each arm takes one
step, and one step has text alone: as many tokens, no images. Text-relative efficiency is the time of the text-only step
over that of the other, in the same round; the figure is the median over the rounds. A step is the loop's: features and
pixels find their ways (parallel/hosts.py), then gradients and update. The small model keeps the ratio of vision to backbone
FLOPs of the real one, and images have a heavy-tailed mix of sizes, up to a whole pack.

Then the same is projected to 256 chips and K2.5's real size, from FLOPs alone: all at one speed, no exchange costs
anything. A step computes everything once, again, and twice more for the gradient: 4 forward passes of the backbone, spread
over all chips; stages wait for their turns besides, which makes it backbone / (1 - bubble). To that add
    dep            4 x the vision of the busiest chip, images balanced over all of them
    stage0         4 x that of the busiest chip of the first stage, images balanced over its chips; the others wait
    stage0, rows   as usual without balance: a chip of the first stage encodes the images of its own rows, one microbatch
                   after the other, and in each of these ticks all wait for the busiest: 4 x the sum of these maxima
    plain          4 x all vision: every chip encodes every image
Most of the minutes that this takes go into compiling. With --json one JSON line.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from k25_jax.config import (
    BYTE_IDS,
    DataConfig,
    Experiment,
    K25Config,
    MeshConfig,
    MoEConfig,
    OptimConfig,
    RopeConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
    load_experiment,
)
from k25_jax.data.packing import Batch, make_example, pack_examples
from k25_jax.parallel import hosts
from k25_jax.parallel.pipeline import bubble
from k25_jax.preflight.cost import model_flops
from k25_jax.sharding import processes
from k25_jax.train.layout import mesh_of
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip, balance, clip_flops

ROOT = pathlib.Path(__file__).parent.parent
ARMS, BOUND, SHARE, SAME = ("text", "dep", "stage0", "plain"), 0.90, 0.25, 1e-5
SIGMA = 1.2  # of the logarithm of an image's size
REAL, CHIPS, SHARES = "experiments/pretrain/k25_1t.py", 256, (0.10, 0.25, 0.50)
REAL_MEDIAN, FILLED = 600, 0.9  # patches of an image; of the slots of the packs


# ------------------------------------------------------------------------------------------------------ two processes
def experiment() -> Experiment:
    """A backbone of 12.6M active parameters on a pipeline of two stages, with three rounds and six microbatches."""
    moe = MoEConfig(experts=8, top_k=2, ffn_dim=384, scale=2.0)
    text = TextConfig(
        vocab_size=512, d_model=384, layers=7, ffn_dim=1536, heads=6, q_lora_rank=128, kv_lora_rank=64, qk_nope_dim=64,
        qk_rope_dim=32, v_dim=64, init_std=0.04, max_length=1024, moe=moe, rope=RopeConfig(original_length=1024),
    )  # fmt: skip
    small = VisionConfig(layers=2, width=64, heads=1, mlp_dim=304, pos_height=8, pos_width=8)
    return Experiment(
        model=K25Config(text=text, vision=small, **BYTE_IDS),
        data=DataConfig(batch_size=12, seq_len=192, packs=10, pack_patches=256, max_image_patches=256),
        optim=OptimConfig(peak_lr=1e-4, warmup_steps=1000),
        train=TrainConfig(remat="full"),
        mesh=MeshConfig(pipe=2, repeats=3, microbatches=6),
    )


def vision_ratio(run: Experiment) -> float:
    """FLOPs of vision a vision token, attention over whole packs included, over those of the backbone a token."""
    data = run.data
    backbone = model_flops(dataclasses.replace(run, data=dataclasses.replace(data, packs=0)))
    tokens = data.packs * data.pack_patches / run.model.vision.group
    return (model_flops(run) - backbone) / tokens / (backbone / (data.batch_size * data.seq_len))


def image_sizes(rng, patches: int, median: float, most: int, group: int = 4) -> np.ndarray:
    """Patches of images of a heavy-tailed mix, from four tokens to `most` patches; the last is cut, to add up."""
    drawn = np.exp(rng.normal(np.log(median), SIGMA, patches // group // 4 + 1))
    drawn = np.clip(drawn // group * group, 4 * group, most).astype(int)
    last = np.searchsorted(drawn.cumsum(), patches)
    drawn[last] -= drawn[: last + 1].sum() - patches
    return drawn[: last + 1]


def batch_of(run: Experiment, reader: int, readers: int, share: float) -> Batch:
    """What one of `readers` reads: full rows, of whose tokens `share` belong to images; no pack without images."""
    data, model, rng = run.data, run.model, np.random.default_rng(reader)
    rows = data.batch_size // readers
    tokens = round(rows * data.seq_len * share)
    sizes = image_sizes(rng, tokens * model.vision.group, 48, data.pack_patches) if share else []
    clips, used = [[] for _ in range(rows)], np.zeros(rows, int)
    for size in sorted(sizes, reverse=True):  # to the row with most room
        count = int(size) // model.vision.group
        height = next(n for n in range(int(count**0.5), 0, -1) if count % n == 0)
        patches = rng.integers(0, 256, (size, model.vision.patch_dim)).astype(np.uint8)
        row = int(used.argmin())
        clips[row].append(Clip(patches, (1, 2 * height, 2 * count // height)))
        used[row] += count
    examples = []
    for own, count in zip(clips, used, strict=True):
        words = rng.integers(0, 256, data.seq_len - count).tolist()
        ids = words[:1] + [model.media_pad_id] * len(own) + words[1:]
        examples.append(make_example(ids, [1.0] * len(ids), own, model.media_pad_id))
    own_data = dataclasses.replace(data, batch_size=rows, packs=data.packs // readers)
    return pack_examples(examples, own_data, model)


class Arm:
    """One way to train, "text" without images, on a batch of its own in all processes together."""

    def __init__(self, name: str, run: Experiment, mesh):
        readers = processes.readers(processes.owners_of(mesh))
        share, vision = (0.0, run.train.vision) if name == "text" else (SHARE, name)
        self.run, self.mesh = dataclasses.replace(run, train=dataclasses.replace(run.train, vision=vision)), mesh
        self.batch = batch_of(run, processes.own_reader(readers), len(readers), share)
        self.step = make_step(self.run, loss_fn, mesh)

    def place(self) -> Batch:
        return hosts.place(self.batch, self.mesh, self.run)

    def take(self, state):
        """(the state after a step, {seconds of the step, of placing in it, of this process's core}, metrics)."""
        processes.gathered(None)  # all begin together
        began, core = time.perf_counter(), time.process_time()
        placed = self.place()
        ready = time.perf_counter()
        state, metrics = self.step(state, placed)
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        seconds, core = time.perf_counter() - began, time.process_time() - core
        return state, {"seconds": seconds, "placing": ready - began, "core": core}, metrics


def work(run: Experiment, rounds: int) -> dict:
    """In every process: the first step of each arm, from the same state, then the rounds; what was measured."""
    mesh = mesh_of(run)
    with jax.set_mesh(mesh):
        arms = {name: Arm(name, run, mesh) for name in ARMS}
        first, times = {}, {name: [] for name in ARMS}
        for name, arm in arms.items():
            _, _, metrics = arm.take(init_state(run, mesh))
            first[name] = {key: metrics[key] for key in ("loss", "grad_norm")}
            note(f"{name}: compiled, {first[name]}")
        state = init_state(run, mesh)
        for turn in range(-1, rounds):  # the first is not counted
            order = ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]
            for name in order:
                state, seen, _ = arms[name].take(state)
                times[name] += [seen] if turn >= 0 else []
            note(f"round {turn + 1} of {rounds}")
        of_batch = {name: hosts.planned(arm.batch, mesh, arm.run).metrics
                    for name, arm in arms.items()}  # fmt: skip
    cores = processes.gathered({name: np.median([t["core"] for t in times[name]]) for name in ARMS})
    return {"first": first, "times": times, "batch": of_batch, "cores": cores}


def note(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def pinned(index: int) -> None:
    """This process, and all threads that it starts from now on, on one core of those that it may use."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})


def measured(rounds: int) -> dict:
    """What `work` returns in process 0 of two."""
    command = [sys.executable, "-m", "benchmarks.dep_efficiency", "--worker", f"--rounds={rounds}"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    variables = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags.strip()}
    launcher = [sys.executable, "launch/local.py", "--processes=2", "--", *command]
    done = subprocess.run(launcher, stdout=subprocess.PIPE, text=True, env=variables, cwd=ROOT)
    if done.returncode:
        sys.exit(f"the two processes failed with status {done.returncode}")
    return json.loads(done.stdout)


def efficiencies(times: dict) -> dict:
    """Of each arm the median, lowest and highest efficiency of the rounds, that of the fastest steps, median seconds."""
    text, out = np.array([t["seconds"] for t in times["text"]]), {}
    for name, taken in times.items():
        seconds, placing = (np.array([t[key] for t in taken]) for key in ("seconds", "placing"))
        rates = text / seconds
        out[name] = {"efficiency": float(np.median(rates)), "spread": [float(rates.min()), float(rates.max())]}
        out[name] |= {"fastest": float(text.min() / seconds.min())}
        out[name] |= {"seconds": float(np.median(seconds)), "placing": float(np.median(placing))}
    return out


# --------------------------------------------------------------------------------------------------------- projection
def costs_of(sizes, config: K25Config) -> np.ndarray:
    """Forward FLOPs of encoder and projector for images of so many patches, attention inside each image."""
    wide = config.vision.group * config.vision.width
    tokens = np.asarray(sizes, float) / config.vision.group
    return clip_flops(np.asarray(sizes, float), config.vision) + 2 * tokens * wide * (wide + config.text.d_model)


def projection(backbone: float, costs, placement, rows, stages: int, chips: int, microbatches: int) -> dict:
    """Efficiency of each form, by the formulas above.

    `backbone` is its forward FLOPs of one chip, waiting included. Of image i, costs[i] are the FLOPs, placement[i] in [0, 1)
    says where it lies among the packs, rows[i] in [0, 1) among the rows; rows go to the first stage's chips, one after
    the other, and on each of them to the microbatches.
    """

    def loads(where, parts: int):
        return np.bincount((np.asarray(where) * parts).astype(int), costs, minlength=parts)

    first = chips // stages
    by_row = loads(rows, first * microbatches).reshape(first, microbatches)
    added = {
        "dep": loads(placement, chips).max(),
        "stage0": loads(placement, first).max(),
        "stage0, rows": by_row.max(axis=0).sum(),
        "plain": np.sum(costs),
    }
    return {name: float(backbone / (backbone + vision)) for name, vision in added.items()}


def projected(share: float, seed: int = 0) -> dict:
    """`projection` of one batch of K2.5 on v5p-512, of whose tokens `share` belong to images."""
    run = load_experiment(REAL)
    data, mesh, rng = run.data, run.mesh, np.random.default_rng(seed)
    tokens, group = data.batch_size * data.seq_len, run.model.vision.group
    sizes = image_sizes(rng, round(tokens * share) * group, REAL_MEDIAN, data.pack_patches)
    packs = -(-int(sizes.sum()) // round(FILLED * data.pack_patches * CHIPS)) * CHIPS
    placement = np.asarray(balance(sizes.tolist(), packs, data.pack_patches, run.model.vision)) / packs
    forward = model_flops(dataclasses.replace(run, data=dataclasses.replace(data, packs=0))) / 3
    waiting = 1 - bubble(mesh.pipe, mesh.repeats, mesh.microbatches)
    microbatches = mesh.microbatches * run.train.accumulate
    costs, rows = costs_of(sizes, run.model), rng.random(len(sizes))
    out = projection(forward / CHIPS / waiting, costs, placement, rows, mesh.pipe, CHIPS, microbatches)
    return out | {"vision_over_backbone": float(costs.sum() / forward), "images": len(sizes)}


# ------------------------------------------------------------------------------------------------------------- output
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    parser.add_argument("--rounds", type=int, default=21, help="steps of each arm; default 21")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        pinned(int(os.environ[processes.INDEX]))
        with processes.joined():
            out = work(experiment(), args.rounds)
            if jax.process_index() == 0:
                print(json.dumps(out))
        return
    out = result(measured(args.rounds), args.rounds)
    print(json.dumps(out) if args.json else as_text(out))


def result(seen: dict, rounds: int) -> dict:
    """The JSON line."""
    arms = efficiencies(seen["times"])
    for name in ARMS:
        arms[name]["core_seconds"] = [core[name] for core in seen["cores"]]
    first = seen["first"]
    apart = max(abs(first[a][key] / first["dep"][key] - 1) for a in ARMS[2:] for key in ("loss", "grad_norm"))
    figure, others = arms["dep"]["efficiency"], [arms[name]["efficiency"] for name in ARMS[2:]]
    return {
        "name": "dep_efficiency",
        "figure": figure,
        "bound": BOUND,
        "ok": figure >= BOUND and figure > max(others) and apart <= SAME,
        "rounds": rounds,
        "arms": arms,
        "losses_apart": apart,
        "vision_ratio": vision_ratio(experiment()),
        "real_vision_ratio": vision_ratio(load_experiment(REAL)),
        "batch": seen["batch"]["dep"],
        "load": os.getloadavg()[0],
        "projected": {f"{share:.0%}": projected(share) for share in SHARES},
    }


def as_text(out: dict) -> str:
    """The same for people."""
    batch = out["batch"]
    lines = [
        f"{batch['tokens']} tokens, {batch['media_tokens']} of them of {batch['clips']} images; {out['rounds']} rounds",
        f"vision a token over backbone a token: {out['vision_ratio']:.3f}, of K2.5 {out['real_vision_ratio']:.3f} (FLOPs)",
    ]
    for name, arm in out["arms"].items():
        lowest, highest = arm["spread"]
        cores = ", ".join(f"{seconds:.2f}" for seconds in arm["core_seconds"])
        lines.append(
            f"{name:7s} {arm['seconds']:.3f} s a step, {arm['placing']:.3f} of it placing; core seconds {cores}; "
            f"efficiency {arm['efficiency']:.4f} [{lowest:.3f}, {highest:.3f}], of the fastest steps {arm['fastest']:.4f}"
        )
    lines.append(f"bound: {out['bound']}; losses and norms of gradients {out['losses_apart']:.1e} apart")
    names = ("dep", "stage0", "stage0, rows", "plain")
    lines.append(f"projected, {CHIPS} chips  " + "".join(f"{name:>14s}" for name in names))
    for share, row in out["projected"].items():
        lines.append(f"{share:>4s} vision tokens       " + "".join(f"{row[name]:14.3f}" for name in names))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
