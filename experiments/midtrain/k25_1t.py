"""Long-context mid-training of Kimi K2.5 at its real size: 32768 tokens, then up to 262144, by YaRN (K2.5 §3.3).

One stage a length, each from the checkpoint of the one before, with a fresh optimizer and a schedule of its own. The paper
gives 500B tokens for the first and 200B for the last; those between are on the line. All take batches of 67M tokens.
The layout is for v5p-1024 (4 x 8 x 16 chips): `context` shares out a row so that a chip holds 32768 of its tokens.
"""

import ml_collections

from k25_jax.config import argument, preset, run_local, to_dict

ORIGINAL = 4096  # tokens of a row in joint pre-training
BATCH_TOKENS = 2**26
# tokens of a row -> tokens in all
STAGES = {32768: 500e9, 65536: 400e9, 131072: 300e9, 262144: 200e9}
SOURCES = (
    ("data/long_text/*.array_record", 40.0),
    ("data/long_cot/*.array_record", 20.0),
    ("data/reasoning/*.array_record", 10.0),
    ("data/text/*.array_record", 20.0),
    ("data/interleaved/*.array_record", 5.0),
    ("data/long_video/*.array_record", 5.0),
)
LOCAL_ORIGINAL = 16  # the same on a laptop: rows of 128 to 1024 tokens, the same factors


def get_config(arg: str = ""):
    """`arg` is the length, 32768 unless given, and `runlocal` to shrink it to a laptop: "65536", "65536,runlocal"."""
    length, local = argument(arg, tuple(map(str, STAGES)), "k25_1t.py")
    config = _stage(int(length))
    return _on_a_laptop(config) if local else config


def _stage(length: int):
    steps, share, earlier = round(STAGES[length] / BATCH_TOKENS), length // 32768, length // 2
    config = ml_collections.ConfigDict()
    config.name = f"midtrain_k25_1t_{length}"
    config.model = to_dict(preset("k25_1t"))
    config.model.text.max_length = length
    config.model.text.rope.update(factor=length / ORIGINAL, original_length=ORIGINAL)
    config.data = dict(
        sources=[dict(path=path, kind="arrayrecord", weight=weight) for path, weight in SOURCES],
        batch_size=BATCH_TOKENS // length,
        seq_len=length,
        packs=8192,
        pack_patches=4096,
        max_image_patches=4096,
        max_frame_patches=1024,
        tokenizer="data/tokenizer",
        lanes=BATCH_TOKENS // length // 16,  # as many as read on a v5p-1024, where hosts share rows that are long
        seed=0,
    )
    config.optim = dict(
        name="muonclip", peak_lr=2e-5, end_lr=7e-6, warmup_steps=100, decay_steps=steps // 2, weight_decay=0.1
    )
    config.train = dict(
        steps=steps,
        log_every=1,
        checkpoint_every=250,
        keep=5,
        remat="full",
        accumulate=4,
        compute_dtype="bfloat16",
        seed=0,
        init_from=f"runs/midtrain_k25_1t_{earlier}" if earlier in STAGES else "runs/k25_1t",
    )
    config.mesh = dict(pipe=4, expert=16, context=share, repeats=3, microbatches=4)
    return config


def _on_a_laptop(config):
    """The tiny model with the factor of the stage, and rows as many times its original length."""
    factor = config.model.text.rope.factor
    local = run_local(config)
    with local.ignore_type():  # the name of a preset becomes its fields
        local.model = to_dict(preset("tiny"))
    local.model.text.rope.update(yarn=True, factor=factor, original_length=LOCAL_ORIGINAL, beta_fast=1.0)
    local.data.seq_len = local.model.text.max_length = round(factor * LOCAL_ORIGINAL)
    return local
