"""First sub-stage of ViT training: encoder and projector against a small language model, Moonlight-16B-A3B (K2.5 §3.3).

1T tokens of captions, boxes, text in images and video; only what follows an image is predicted. The language model is
frozen. The paper says only that the ViT is trained; a frozen one keeps what it can do, needs neither gradients of its
weights nor an optimizer, and is left behind when the stage ends. The encoder comes from SigLIP-SO-400M (K2.5 §3.2).
"""

import ml_collections

from k25_jax.config import ConfigError, run_local

SEQ_LEN = 4096
BATCH = 4096  # rows: 16.8M tokens
TOKENS = 1e12
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
    config.name = "vit_moonlight_16b"
    config.stage = "vit"
    config.model = "moonlight_16b"
    config.data = dict(
        sources=[dict(path=path, kind="arrayrecord", weight=weight) for path, weight in SOURCES],
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        packs=4096,
        pack_patches=16384,
        max_image_patches=4096,
        max_frame_patches=1024,
        tokenizer="data/tokenizer",
        lanes=256,  # as experiments/pretrain/moonlight_16b.py
        seed=0,
    )
    steps = round(TOKENS / (BATCH * SEQ_LEN))
    config.optim = dict(
        name="muonclip", peak_lr=2e-4, end_lr=2e-5, warmup_steps=500, decay_steps=steps // 5, weight_decay=0.1
    )
    config.train = dict(
        steps=steps,
        log_every=1,
        checkpoint_every=500,
        keep=5,
        remat="full",
        compute_dtype="bfloat16",
        seed=0,
        trainable=["vision", "projector"],
        siglip_weight=0.0,  # SigLIP's loss beside that of captions; see k25_jax/train/vit.py
        init_from="checkpoints/moonlight-16b-a3b",  # public files of the language model alone
        init_vision_from="checkpoints/siglip-so400m-patch14-384",
    )
    if arg not in ("", "runlocal"):
        raise ConfigError(f"moonlight_16b.py: unknown argument {arg!r}; it can be runlocal")
    return run_local(config) if arg else config
