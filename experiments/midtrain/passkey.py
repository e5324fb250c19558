"""A tiny language model that finds passkeys: pre-trained on documents of 128 tokens, then mid-trained with YaRN to four
and to eight times that (K2.5 §3.3). `benchmarks/passkey.py` runs the three stages and draws what they give back.
"""

import ml_collections

from k25_jax.config import ConfigError, preset, run_local, to_dict

LENGTH = 128  # of pre-training
SHORTEST = 56  # of a document, in every stage
# tokens of a row, and of the longest document -> (steps, rows in a step, rate at its highest, the stage before)
STAGES = {128: (1500, 16, 3e-3, ""), 512: (600, 8, 2e-3, "runs/passkey_128"), 1024: (300, 8, 1e-3, "runs/passkey_512")}


def get_config(arg: str = ""):
    """The stage of `arg` tokens: 128 (pre-training; the default), 512, 1024; `runlocal` shrinks the first."""
    if arg not in ("", "runlocal", *map(str, STAGES)):
        raise ConfigError(f"passkey.py: unknown argument {arg!r}; it can be 128, 512, 1024 or runlocal")
    length = LENGTH if arg in ("", "runlocal") else int(arg)
    steps, rows, rate, before = STAGES[length]
    config = ml_collections.ConfigDict()
    config.name = f"passkey_{length}"
    config.model = to_dict(preset("tiny"))
    config.model.text.update(qk_rope_dim=16, max_length=length)
    config.model.text.moe.update(experts=4)
    factor = length // LENGTH
    config.model.text.rope = dict(theta=1e4, original_length=LENGTH, factor=float(factor), yarn=factor > 1)
    config.data = dict(
        sources=[dict(path=f"passkey:train:length={length},shortest={SHORTEST}", kind="task")],
        batch_size=rows,
        seq_len=length,
        packs=0,
        seed=0,
    )
    config.optim = dict(
        peak_lr=rate, end_lr=rate / 10, warmup_steps=min(50, steps // 4), decay_steps=steps // 4, weight_decay=0.05
    )
    config.train = dict(steps=steps, log_every=10, checkpoint_every=steps // 4, keep=1, seed=0, init_from=before)
    return run_local(config) if arg == "runlocal" else config
