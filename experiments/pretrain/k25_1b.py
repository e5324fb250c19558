"""A K2.5 of 1B parameters, for a TPU slice of a few chips: 42G tokens of text and vision, 2.1M a batch (K2.5 §3.3)."""

import ml_collections

from k25_jax.config import ConfigError, run_local

SEQ_LEN = 4096
BATCH = 512
SOURCES = (  # path, weight among the tokens of its modality, modality
    ("data/text/*.array_record", 70.0, "text"),
    ("data/code/*.array_record", 20.0, "text"),
    ("data/captions/*.array_record", 6.0, "vision"),
    ("data/ocr/*.array_record", 4.0, "vision"),
)


def get_config(arg: str = ""):
    """The experiment; `runlocal` shrinks it to a laptop."""
    config = ml_collections.ConfigDict()
    config.name = "k25_1b"
    config.model = "1b"
    config.data = dict(
        sources=[
            dict(path=path, kind="arrayrecord", weight=weight, modality=modality) for path, weight, modality in SOURCES
        ],
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        packs=128,
        pack_patches=8192,
        max_image_patches=4096,
        max_frame_patches=1024,
        tokenizer="data/tokenizer",
        vision_share=0.1,
        lanes=64,
        seed=0,
    )
    config.optim = dict(peak_lr=6e-4, end_lr=6e-5, warmup_steps=500, decay_steps=6000, weight_decay=0.1)
    config.train = dict(
        steps=20000, log_every=10, checkpoint_every=500, keep=3, remat="full", compute_dtype="bfloat16", seed=0
    )
    if arg not in ("", "runlocal"):
        raise ConfigError(f"k25_1b.py: unknown argument {arg!r}; it can be runlocal")
    return run_local(config) if arg else config
