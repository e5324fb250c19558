"""Second, very short sub-stage of ViT training: the projector alone, against the language model of 1T (K2.5 §3.3).

The encoder comes from the first sub-stage (experiments/vit/moonlight_16b.py). Its projector has another width, so this
one begins fresh. The language model is a checkpoint of Kimi K2 near its end. Neither has an optimizer here. The paper
gives no length: 500 steps of 16.8M tokens, 8.4G in all.
"""

import ml_collections

from k25_jax.config import ConfigError, RopeConfig, preset, run_local, to_dict

SEQ_LEN = 4096
BATCH = 4096  # rows: 16.8M tokens
STEPS = 500
SOURCES = (
    ("data/alt_text/*.array_record", 30.0),
    ("data/captions/*.array_record", 30.0),
    ("data/grounding/*.array_record", 10.0),
    ("data/ocr/*.array_record", 20.0),
    ("data/video/*.array_record", 10.0),
)


def get_config(arg: str = ""):
    """The experiment; `runlocal` shrinks it to a laptop."""
    config = ml_collections.ConfigDict()
    config.name = "vit_k25_1t"
    config.stage = "vit"
    config.model = to_dict(preset("k25_1t"))
    config.model.text.max_length = SEQ_LEN  # YaRN comes with the long-context stage
    config.model.text.rope = to_dict(RopeConfig(original_length=SEQ_LEN))
    config.data = dict(
        sources=[dict(path=path, kind="arrayrecord", weight=weight) for path, weight in SOURCES],
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        packs=8192,
        pack_patches=8192,
        max_image_patches=4096,
        max_frame_patches=1024,
        tokenizer="data/tokenizer",
        lanes=256,  # as experiments/pretrain/k25_1t.py
        seed=0,
    )
    config.optim = dict(
        name="muonclip", peak_lr=1e-3, end_lr=1e-5, warmup_steps=20, decay_steps=STEPS // 2, weight_decay=0.1
    )
    config.train = dict(
        steps=STEPS,
        log_every=1,
        checkpoint_every=250,
        keep=2,
        remat="full",
        accumulate=2,
        compute_dtype="bfloat16",
        seed=0,
        trainable=["projector"],
        init_from="checkpoints/kimi-k2",  # public files of the language model alone
        init_vision_from="runs/vit_moonlight_16b",
    )
    config.mesh = dict(pipe=4, expert=16, repeats=3, microbatches=16)  # as experiments/pretrain/k25_1t.py
    if arg not in ("", "runlocal"):
        raise ConfigError(f"k25_1t.py: unknown argument {arg!r}; it can be runlocal")
    return run_local(config) if arg else config
