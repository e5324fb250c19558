"""k25_jax against PyTorch `transformers` on this CPU: forward, training step, generation; same weights, same inputs.

The two take turns, round by round, and the ratio is the median over rounds. `transformers` runs each of its expert
implementations first and competes with its fastest. Prints one line a figure; with --json one JSON line.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
from transformers import Kimi_K25ForConditionalGeneration
from transformers.utils import logging

from k25_jax.checkpoint.huggingface import save_params
from k25_jax.config import DataConfig, Experiment, TrainConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.models.k25 import forward, init_params
from k25_jax.sampling.sample import SampleConfig, Sampler
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import TrainState, init_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

NEW_TOKENS = 64


def inputs(config, rows: int, length: int, side: int, seed: int):
    """The same rows for both: an image, then random text. (our Batch, arguments for transformers, prompts, clips)."""
    rng = np.random.default_rng(seed)
    grid = (1, side, side)
    clips, examples = [], []
    for _ in range(rows):
        patches = rng.integers(0, 256, (side * side, config.vision.patch_dim)).astype(np.uint8)
        clip = Clip(patches, grid)
        tokens = [config.media_pad_id, *rng.integers(0, 256, length - clip.tokens).tolist()]
        clips.append(clip)
        examples.append(make_example(tokens, [1.0] * len(tokens), [clip], config.media_pad_id))
    data = DataConfig(batch_size=rows, seq_len=length, packs=1, pack_patches=rows * side * side)
    ids = torch.tensor(np.stack([e.tokens for e in examples]).astype(np.int64))
    size = config.vision.patch_size
    pixels = np.concatenate([c.patches for c in clips]).astype(np.float32).reshape(-1, 3, size, size) / 127.5 - 1
    theirs = {"input_ids": ids, "pixel_values": torch.tensor(pixels), "image_grid_thw": torch.tensor([grid] * rows)}
    return pack_examples(examples, data, config), theirs, [e.tokens.tolist() for e in examples], [[c] for c in clips]


def prompt_length(args) -> int:
    """The prompt of the generation: the image and 64 bytes of text."""
    return args.side * args.side // 4 + 64


def our_functions(config, params, args):
    """forward, step and generate of k25_jax, each a function without arguments that waits for its result."""
    batch, _, _, _ = inputs(config, args.rows, args.length, args.side, 0)
    _, _, prompts, clips = inputs(config, 1, prompt_length(args), args.side, 1)
    experiment = Experiment(model=config, train=TrainConfig(remat=args.remat))
    step_fn = make_step(experiment, loss_fn)
    fresh = init_state(experiment)
    state = [TrainState(fresh.step, jax.tree.map(np.asarray, params), fresh.opt_state, fresh.key)]
    forward_fn = jax.jit(functools.partial(forward, config=config))
    sampler = Sampler(params, config)

    def step():
        state[0], metrics = step_fn(state[0], batch)
        return metrics["loss"].block_until_ready()

    def generate():
        drawn = sampler.generate(prompts, clips, SampleConfig(max_tokens=NEW_TOKENS, temperature=0.0))
        return [row[0][0] for row in drawn]

    return {"forward": lambda: np.asarray(forward_fn(params, batch)), "step": step, "generate": generate}


def their_functions(config, directory: str, experts: str, args):
    """The same of transformers, with one of its expert implementations."""
    model = Kimi_K25ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    model.model.language_model.set_experts_implementation(experts)
    _, batch, _, _ = inputs(config, args.rows, args.length, args.side, 0)
    _, prompt, _, _ = inputs(config, 1, prompt_length(args), args.side, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == config.media_pad_id, -100)

    def run_forward():
        with torch.no_grad():
            return model(**batch).logits.numpy()

    def step():
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def generate():
        with torch.no_grad():
            out = model.generate(
                **prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=config.pad_id
            )
        return out[0, prompt_length(args) :].tolist()

    return {"forward": run_forward, "step": step, "generate": generate}


def seconds(function) -> float:
    """Duration of a call that follows another of its kind, as in a loop.

    The first lets the other side's threads come to rest, and takes back the memory that the system reclaimed meanwhile.
    """
    function()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def fastest(candidates: dict, name: str):
    """The implementation of `name` that is fastest in its second call."""
    return min(candidates, key=lambda implementation: seconds(candidates[implementation][name]))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument("--rounds", type=int, default=5, help="how often the two sides take turns")
    parser.add_argument(
        "--rows", type=int, default=1, help="rows of the batch; this and the next three as in k25_100m.py"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument(
        "--side", type=int, default=32, help="patches along a side of the image that each row begins with"
    )
    parser.add_argument("--remat", default="dots", help="what our step keeps for its backward pass: none, dots, full")
    return parser.parse_args()


def main():
    args = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = preset("100m")
    params = init_params(config, jax.random.key(0))
    ours = our_functions(config, params, args)
    with tempfile.TemporaryDirectory() as directory:
        save_params(params, config, directory + "/model", "float32")
        theirs = {e: their_functions(config, directory + "/model", e, args) for e in ("grouped_mm", "eager")}
    error = float(np.abs(ours["forward"]() - theirs["eager"]["forward"]()).max())
    same = ours["generate"]() == theirs["eager"]["generate"]()
    work = {"forward": args.rows * args.length, "step": args.rows * args.length, "generate": NEW_TOKENS}
    out = {"name": "vs_transformers", "logits_max_abs_error": error, "same_greedy_tokens": same}
    for name, tokens in work.items():
        chosen = fastest(theirs, name)
        pairs = [(seconds(ours[name]), seconds(theirs[chosen][name])) for _ in range(args.rounds)]
        ratios = [b / a for a, b in pairs]
        out[name] = {
            "ours_tokens_per_second": tokens / statistics.median(a for a, _ in pairs),
            "transformers_tokens_per_second": tokens / statistics.median(b for _, b in pairs),
            "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "experts": chosen,
        }  # fmt: skip
    out["figure"] = min(out[name]["ratio"] for name in work)
    out |= {"bound": 1.0, "aim": 2.0, "ok": out["figure"] > 1.0 and error <= 1e-4 and same}
    if args.json:
        print(json.dumps(out))
        return
    for name in work:
        row = out[name]
        print(
            f"{name:9s} ours {row['ours_tokens_per_second']:9.0f} tokens/s   transformers ({row['experts']}) "
            f"{row['transformers_tokens_per_second']:9.0f} tokens/s   ratio {row['ratio']:.2f} "
            f"[{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
        )
    print(
        f"logits differ by at most {error:.1e}; same greedy tokens: {same}; smallest ratio {out['figure']:.2f} (bound 1)"
    )


if __name__ == "__main__":
    main()
