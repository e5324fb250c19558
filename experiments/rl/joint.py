"""Joint RL by ability from the base model: problems in text and in pictures train the same policy (K2.5 §3.5, §3.6).

    k25 train --config=experiments/rl/joint.py --workdir=runs/rl_joint
    k25 report --workdir=runs/rl_joint

"joint.py:toggle" makes answers shorter in every other phase (rl/toggle.py), "rigid" always, "none" never. What was sampled
lies in WORKDIR/rl.
"""

import ml_collections

from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.config import argument, to_dict

PROBLEMS = (  # task, ability
    ("facts:train", "knowledge"),
    ("shapes:train", "knowledge"),
    ("puzzles:train", "reasoning"),
    ("scenes:train", "reasoning"),
)


def get_config(arg: str = ""):
    """None of Toggle unless the argument says so; "toggle,runlocal" shrinks it to four updates on 24 problems."""
    arm, local = argument(arg, ("none", "toggle", "rigid"), "joint.py")
    config = ml_collections.ConfigDict()
    config.name = f"rl_joint_{arm}"
    config.stage = "rl"
    config.model = to_dict(read_config(BASE))
    config.model["text"]["moe"]["bias_rate"] = 0.0
    config.data = dict(batch_size=16, seq_len=512, packs=8, pack_patches=512, max_image_patches=64)
    config.optim = dict(
        name="muonclip", peak_lr=1e-4, end_lr=1e-4, warmup_steps=4, weight_decay=0.0, muon_dtype="float32"
    )
    config.train = dict(steps=100, log_every=1, checkpoint_every=20, keep=2, init_from="base")
    config.rl = dict(
        problems=[dict(path=path, ability=ability, records=128) for path, ability in PROBLEMS],
        groups=8,
        samples=8,
        episode=dict(tokens=64, turn_tokens=64, context=128),
        toggle=dict(arm=arm),
    )
    if local:
        for problems in config.rl.problems:
            problems["records"] = 6
        config.data.update(batch_size=4, packs=4)
        config.rl.update(groups=4, samples=4, estimate=4)
        config.train.update(steps=4, checkpoint_every=2)
    return config
