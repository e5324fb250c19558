"""A K2.5 of 100M parameters that reads bytes, for one accelerator: 5G bytes of text and vision (K2.5 §3.3)."""

import ml_collections

from k25_jax.config import ConfigError, run_local

SOURCES = (  # path, weight among the tokens of its modality, modality
    ("data/text/*.array_record", 1.0, "text"),
    ("data/captions/*.array_record", 1.0, "vision"),
    ("data/ocr/*.array_record", 1.0, "vision"),
)


def get_config(arg: str = ""):
    """The experiment; `runlocal` shrinks it to a laptop."""
    config = ml_collections.ConfigDict()
    config.name = "k25_100m"
    config.model = "100m"
    config.data = dict(
        sources=[
            dict(path=path, kind="arrayrecord", weight=weight, modality=modality) for path, weight, modality in SOURCES
        ],
        batch_size=128,
        seq_len=2048,
        packs=64,
        pack_patches=4096,
        max_image_patches=1024,
        max_frame_patches=256,
        vision_share=0.2,
        lanes=16,
        seed=0,
        # files of their own, never trained on; weights as above
        validation=dict(
            sources=[
                dict(
                    path=path.replace("data/", "data/validation/"), kind="arrayrecord", weight=weight, modality=modality
                )
                for path, weight, modality in SOURCES
            ],
        ),
    )
    config.optim = dict(peak_lr=1e-3, end_lr=1e-4, warmup_steps=500, decay_steps=6000, weight_decay=0.1)
    config.train = dict(
        steps=20000,
        log_every=10,
        checkpoint_every=500,
        eval_every=1000,
        keep=3,
        remat="dots",
        compute_dtype="bfloat16",
        seed=0,
    )
    config.profile = dict(start=100, steps=3)
    if arg not in ("", "runlocal"):
        raise ConfigError(f"k25_100m.py: unknown argument {arg!r}; it can be runlocal")
    return run_local(config) if arg else config
