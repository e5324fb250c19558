"""A vision-language model with the layout of Moonlight-16B-A3B, the language model that K2.5's encoder is trained
against (K2.5 §3.3). Here all weights are trained, on captions, text and text in images: 1T tokens in batches of 16.8M.
"""

import ml_collections

from k25_jax.config import ConfigError, run_local

SEQ_LEN = 4096
BATCH = 4096
TOKENS = 1e12
SOURCES = (  # path, weight among the tokens of its modality, modality
    ("data/captions/*.array_record", 50.0, "vision"),
    ("data/grounding/*.array_record", 10.0, "vision"),
    ("data/ocr/*.array_record", 20.0, "vision"),
    ("data/video/*.array_record", 10.0, "vision"),
    ("data/text/*.array_record", 10.0, "text"),
)


def get_config(arg: str = ""):
    """The experiment; `runlocal` shrinks it to a laptop."""
    config = ml_collections.ConfigDict()
    config.name = "moonlight_16b"
    config.model = "moonlight_16b"
    config.data = dict(
        sources=[
            dict(path=path, kind="arrayrecord", weight=weight, modality=modality) for path, weight, modality in SOURCES
        ],
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        packs=2048,
        pack_patches=16384,
        max_image_patches=4096,
        max_frame_patches=1024,
        tokenizer="data/tokenizer",
        vision_share=0.9,
        lanes=256,  # as many as two v5p-1024 have hosts; fewer take several each
        seed=0,
    )
    steps = round(TOKENS / (BATCH * SEQ_LEN))
    config.optim = dict(
        name="muonclip", peak_lr=3e-4, end_lr=3e-5, warmup_steps=500, decay_steps=steps // 3, weight_decay=0.1
    )
    config.train = dict(
        steps=steps, log_every=1, checkpoint_every=500, keep=5, remat="full", compute_dtype="bfloat16", seed=0
    )
    if arg not in ("", "runlocal"):
        raise ConfigError(f"moonlight_16b.py: unknown argument {arg!r}; it can be runlocal")
    return run_local(config) if arg else config
