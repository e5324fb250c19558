"""Joint pre-training of Kimi K2.5 at its real size, on text and vision from the first step (K2.5 §3.3).

The schedule is K2's: 15.5T tokens in batches of 67M, of which the last 5.5T see the rate fall. The data are
placeholders: ArrayRecord shards of records in the forms of `k25_jax/data/forms.py`.
"""

import ml_collections

from k25_jax.config import ConfigError, RopeConfig, preset, run_local, to_dict

SEQ_LEN = 4096
BATCH = 16384  # rows: 67M tokens
TOKENS, DECAY_TOKENS = 15.5e12, 5.5e12
SOURCES = (  # path, weight among the tokens of its modality, modality
    ("data/text/*.array_record", 55.0, "text"),
    ("data/code/*.array_record", 25.0, "text"),
    ("data/knowledge/*.array_record", 10.0, "text"),
    ("data/captions/*.array_record", 3.0, "vision"),
    ("data/interleaved/*.array_record", 3.0, "vision"),
    ("data/ocr/*.array_record", 2.0, "vision"),
    ("data/screenshots/*.array_record", 1.0, "vision"),
    ("data/video/*.array_record", 1.0, "vision"),
)


def get_config(arg: str = ""):
    """The experiment; `runlocal` shrinks it to a laptop."""
    config = ml_collections.ConfigDict()
    config.name = "k25_1t"
    config.model = to_dict(preset("k25_1t"))
    config.model.text.max_length = SEQ_LEN  # YaRN comes with the long-context stage
    config.model.text.rope = to_dict(RopeConfig(original_length=SEQ_LEN))
    config.data = dict(
        sources=[
            dict(path=path, kind="arrayrecord", weight=weight, modality=modality) for path, weight, modality in SOURCES
        ],
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        packs=8192,
        pack_patches=4096,
        max_image_patches=4096,
        max_frame_patches=1024,
        tokenizer="data/tokenizer",
        vision_share=0.1,  # 10:90 all the way
        lanes=256,  # as many as two v5p-1024 have hosts; fewer take several each
        seed=0,
        validation=dict(one_in=10_000, batches=2),  # 134M tokens of these sources that are never trained on
    )
    config.optim = dict(
        name="muonclip",
        peak_lr=2e-4,
        end_lr=2e-5,
        warmup_steps=500,
        decay_steps=round(DECAY_TOKENS / (BATCH * SEQ_LEN)),
        weight_decay=0.1,
    )
    config.train = dict(
        steps=round(TOKENS / (BATCH * SEQ_LEN)),
        log_every=1,
        checkpoint_every=500,  # 11.8 hours
        checkpoint_minutes=60.0,
        eval_every=500,
        keep=5,
        remat="full",
        accumulate=16,
        compute_dtype="bfloat16",
        seed=0,
        init_from="checkpoints/kimi-k2",  # public files of Kimi K2 near its end, a language model alone
        init_vision_from="runs/vit_k25_1t",  # encoder and projector of the stage before (experiments/vit/)
    )
    # v5p-512 is 4 x 4 x 16 chips, v5p-1024 4 x 8 x 16. A layer at a time on a stage, with four microbatches of four rows
    # (two on v5p-1024): its experts' matrices are gathered a quarter as often as for sixteen of one row.
    config.mesh = dict(pipe=4, expert=16, repeats=15, microbatches=4)
    config.model.text.moe.chunk = SEQ_LEN  # a row of a device after the other
    if arg not in ("", "runlocal"):
        raise ConfigError(f"k25_1t.py: unknown argument {arg!r}; it can be runlocal")
    return run_local(config) if arg else config
