"""The sampling engine against PyTorch `transformers` and against our own static batches, on this CPU; same weights.

Requests with prompts and answers of mixed lengths, greedy, so many of them at once. The engine takes a new one whenever one
ends; the other two take as many as a batch holds, pad the prompts (`transformers.generate` on the left) and go on to the
longest answer. Tokens that were asked for count, whatever a side computes beside them. The three take turns, round by
round, with the same lengths and other tokens; `transformers` has the faster of its expert implementations. The figure is
the ratio to it with most requests at once. Nothing may be compiled after the engine's warm-up, its cache takes what the
formula says, and log-probabilities are those of the plain forward pass. With --json one JSON line.
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

from benchmarks.on_gpu.asking import ask_engine, draw
from k25_jax.checkpoint.huggingface import save_params
from k25_jax.config import DataConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.models.k25 import forward, init_params
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.latent_cache import cache_bytes
from k25_jax.sampling.requests import EngineConfig
from k25_jax.sampling.sample import SampleConfig, Sampler

BOUND, ERROR_BOUND = 3.0, 1e-4


def batches(asked, at_once: int):
    """The requests in their order, as many as run at once."""
    return [asked[start : start + at_once] for start in range(0, len(asked), at_once)]


def ask_sampler(sampler, asked, at_once: int) -> list[list[int]]:
    """Answers of static batches."""
    answers = []
    for part in batches(asked, at_once):
        rows = [[] for _ in part]
        how = SampleConfig(max(count for _, count in part), 0.0)
        for step in sampler.generate([prompt for prompt, _ in part], (), how):
            for row, drawn in zip(rows, step, strict=True):
                row.append(drawn[0])
        answers += [row[:count] for row, (_, count) in zip(rows, part, strict=True)]
    return answers


def ask_transformers(model, config, asked, at_once: int) -> list[list[int]]:
    """Answers of `generate` over batches padded on the left."""
    answers = []
    for part in batches(asked, at_once):
        width, longest = max(len(prompt) for prompt, _ in part), max(count for _, count in part)
        ids = torch.full((len(part), width), config.pad_id)
        mask = torch.zeros((len(part), width), dtype=torch.int64)
        for row, (prompt, _) in enumerate(part):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, eos_token_id=None,
                pad_token_id=config.pad_id,
            )  # fmt: skip
        answers += [row[width : width + count].tolist() for row, (_, count) in zip(out, part, strict=True)]
    return answers


def worst_logprob(params, config, asked, answers) -> float:
    """The largest difference between the engine's log-probabilities and the plain forward pass over whole rows."""
    width, worst = max(len(prompt) + count for prompt, count in asked), 0.0
    run = jax.jit(lambda batch: jax.nn.log_softmax(forward(params, batch, config)))
    for (prompt, _), answer in zip(asked, answers, strict=True):
        tokens = prompt + [token for token, _ in answer]
        example = make_example(tokens, [1.0] * len(tokens), [], config.media_pad_id)
        logprobs_LV = np.asarray(
            run(pack_examples([example], DataConfig(batch_size=1, seq_len=width, packs=0), config))
        )[0]
        places = np.arange(len(prompt) - 1, len(tokens) - 1)
        want = logprobs_LV[places, [token for token, _ in answer]]
        worst = max(worst, float(np.abs(want - [logprob for _, logprob in answer]).max()))
    return worst


def measure(sides: dict, config, args, at_once: int) -> dict:
    """Tokens per second of each side, the ratios to ours, and how many answers agree; the first turn is not timed."""
    speeds = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        asked, answers = draw(config, args, at_once, turn), {}
        total = sum(count for _, count in asked)
        for name, ask in sides.items():
            began = time.perf_counter()
            answers[name] = ask(asked, at_once)
            speeds[name].append(total / (time.perf_counter() - began))
    ours = [[token for token, _ in answer] for answer in answers.pop("engine")]
    out = {"requests": len(asked), "tokens": total}
    for name in sides:
        out[name] = statistics.median(speeds[name][1:])
        if name != "engine":
            ratios = [a / b for a, b in zip(speeds["engine"][1:], speeds[name][1:], strict=True)]
            out[f"ratio_{name}"] = statistics.median(ratios)
            out[f"ratio_{name}_range"] = [min(ratios), max(ratios)]
            out[f"same_{name}"] = float(np.mean([a == b for a, b in zip(ours, answers[name], strict=True)]))
    return out


def load_peer(config, params, args):
    """The PyTorch model with the expert implementation that is faster at this."""
    with tempfile.TemporaryDirectory() as directory:
        save_params(params, config, directory, "float32")
        model = Kimi_K25ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    asked, seconds = [(p, 8) for p, _ in draw(config, args, args.at_once[-1], 0)[: args.at_once[-1]]], {}
    for experts in ("eager", "grouped_mm"):
        model.model.language_model.set_experts_implementation(experts)
        for _ in range(2):
            began = time.perf_counter()
            ask_transformers(model, config, asked, len(asked))
            seconds[experts] = time.perf_counter() - began
    chosen = min(seconds, key=seconds.get)
    model.model.language_model.set_experts_implementation(chosen)
    return model, chosen


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument("--preset", default="100m", help="the model")
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 8, 32], help="requests at once, rising")
    parser.add_argument("--waves", type=int, default=1, help="requests are so many times as many")
    parser.add_argument("--prompt", type=int, default=192, help="tokens of a prompt, 16 to this")
    parser.add_argument("--answer", type=int, default=160, help="tokens of an answer, 16 to this")
    parser.add_argument("--rounds", type=int, default=3, help="how often the three take turns")
    return parser.parse_args()


def main():
    args = arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = preset(args.preset)
    params = init_params(config, jax.random.key(0))
    model, experts = load_peer(config, params, args)
    pages = args.at_once[-1] * -(-(args.prompt + args.answer) // EngineConfig.page_size)
    settings = EngineConfig(
        rows=tuple(args.at_once), pages=pages, max_length=args.prompt + args.answer, vision_patches=()
    )
    engine, sampler = Engine(params, config, settings), Sampler(params, config)
    began = time.perf_counter()
    engine.warm_up()
    warm, warm_seconds = engine.stats()["compilations"], time.perf_counter() - began
    sides = {
        "engine": functools.partial(ask_engine, engine),
        "transformers": functools.partial(ask_transformers, model, config),
        "static": functools.partial(ask_sampler, sampler),
    }
    rows = {at_once: measure(sides, config, args, at_once) for at_once in args.at_once}
    asked = draw(config, args, args.at_once[-1], 0)[:8]
    error = worst_logprob(params, config, asked, ask_engine(engine, asked, len(asked)))
    stats, formula = engine.stats(), cache_bytes(config.text, pages, settings.page_size)
    later = stats["compilations"] - warm
    figure = rows[args.at_once[-1]]["ratio_transformers"]
    ok = figure >= BOUND and not later and stats["cache_bytes"] == formula and error <= ERROR_BOUND
    out = {
        "name": "engine", "figure": figure, "bound": BOUND, "ok": bool(ok), "experts": experts, "at_once": rows,
        "compiled_in_warm_up": warm, "warm_up_seconds": warm_seconds, "compiled_later": later,
        "cache_bytes": stats["cache_bytes"], "cache_bytes_formula": formula, "logprob_max_abs_error": error,
        "preempted": stats["preempted"],
    }  # fmt: skip
    if args.json:
        print(json.dumps(out))
        return
    for at_once, row in rows.items():
        print(
            f"{at_once:3d} at once: engine {row['engine']:7.1f} tokens/s   transformers ({experts}) "
            f"{row['transformers']:7.1f}, ratio {row['ratio_transformers']:.2f} {row['ratio_transformers_range'][0]:.2f}-"
            f"{row['ratio_transformers_range'][1]:.2f}, same answers {row['same_transformers']:.0%}   static batches "
            f"{row['static']:7.1f}, ratio {row['ratio_static']:.2f}, same {row['same_static']:.0%}"
        )
    print(
        f"{warm} programs compiled in {warm_seconds:.0f} s, {later} later; cache {stats['cache_bytes']} bytes, by formula "
        f"{formula}; log-probabilities off by at most {error:.1e}; ratio {figure:.2f} (bound {BOUND:.0f})"
    )


if __name__ == "__main__":
    main()
