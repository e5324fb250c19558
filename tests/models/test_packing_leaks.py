"""Changing one document or image of a pack changes no other's numbers, bit for bit (K2.5 §3.2)."""

import dataclasses

import jax
import numpy as np
import pytest

import reference
import runs
from k25_jax.config import DataConfig, K25Config, MoEConfig, TextConfig, VisionConfig
from k25_jax.data.packing import Batch, Example, pack_examples
from k25_jax.models import decoder, k25

TEXT = TextConfig(
    vocab_size=67, d_model=34, layers=2, ffn_dim=21, heads=3, q_lora_rank=11, kv_lora_rank=13, qk_nope_dim=5,
    qk_rope_dim=6, v_dim=7, max_length=512, moe=MoEConfig(experts=6, top_k=2, ffn_dim=27, scale=2.0),
)  # fmt: skip
CONFIG = K25Config(
    text=TEXT,
    vision=VisionConfig(layers=2, width=24, heads=2, mlp_dim=19, patch_size=5, pos_height=5, pos_width=5),
    **dict(media_pad_id=60, media_begin_id=61, media_end_id=62, bos_id=0, eos_ids=(1,), pad_id=2),
)
FEW_GROUPS = MoEConfig(experts=4, top_k=1, ffn_dim=33, shared_experts=0, groups=2, normalise=False)
WIDE = dataclasses.replace(
    CONFIG, text=dataclasses.replace(TEXT, d_model=65, heads=1, layers=3, dense_layers=0, moe=FEW_GROUPS)
)


def draw_example(rng, config, length: int, images: int) -> Example:
    tokens, clips = reference.draw_prompt(rng, config, length, images, largest=4)
    if images > 1:  # one of them is a video chunk
        _, rows, columns = clips[0].grid
        clips[0] = reference.draw_clip(rng, config, reference.between(rng, 2, 4), rows, columns)
    return Example(np.array(tokens, np.int32), np.ones(len(tokens), np.float32), clips)


def with_other_words(rng, config, example: Example) -> Example:
    is_text = example.tokens != config.media_pad_id
    words = reference.draw_words(rng, config, len(example))
    return dataclasses.replace(example, tokens=np.where(is_text, words, example.tokens).astype(np.int32))


def with_another_image(rng, config, example: Example) -> Example:
    clips = [reference.draw_clip(rng, config, *example.clips[0].grid), *example.clips[1:]]
    return dataclasses.replace(example, clips=clips)


def hidden_states(params, batch, config):
    x_BLD = k25.embedded(params, batch, config)
    return decoder.decode(params, x_BLD, batch.segments_BL, batch.positions_BL, config.text)


def owners(examples, data, config) -> Batch:
    """The batch of these examples, every token being the number of its example."""
    numbered = [
        dataclasses.replace(example, tokens=np.full(len(example), i, np.int32), clips=[])
        for i, example in enumerate(examples)
    ]
    return pack_examples(numbered, data, dataclasses.replace(config, pad_id=-1))


@pytest.mark.parametrize("config, length, seed", [(CONFIG, 300, 0), (WIDE, 180, 1), (CONFIG, 60, 2)])
def test_nothing_leaks_out_of_a_document_or_an_image(config, length, seed):
    rng = np.random.default_rng(seed)
    data = DataConfig(batch_size=3, seq_len=length, packs=2, pack_patches=288)
    sizes = [(length * 5 // 6, 2), (length * 2 // 3, 1), (length // 2, 0), (length // 3, 1), (length // 8, 1), (7, 0)]
    examples = [draw_example(rng, config, *size) for size in sizes]
    before = pack_examples(examples, data, config)
    owner_BL = owners(examples, data, config).tokens_BL
    params = reference.random_params(config, seed)
    forward = jax.jit(
        lambda p, b: (k25.vision_features(p, b.vision, config), *hidden_states(p, b, config)),
        compiler_options=runs.OPTIMISED,
    )
    features_MD, x_BLD, stats = jax.tree.map(np.asarray, forward(params, before))
    rows_moved = 0
    for i, example in enumerate(examples):
        changes = [with_other_words(rng, config, example)]
        changes += [with_another_image(rng, config, changes[0])] if example.clips else []
        for changed in changes:
            after = pack_examples([*examples[:i], changed, *examples[i + 1 :]], data, config)
            new_features_MD, new_x_BLD, new_stats = jax.tree.map(np.asarray, forward(params, after))
            rows_moved += np.abs(new_stats.load_YE - stats.load_YE).sum()
            differ_BL = (new_x_BLD != x_BLD).any(axis=-1)
            np.testing.assert_array_equal(np.unique(owner_BL[differ_BL]), [i], err_msg="other documents changed")
            same_image_M = tokens_of_equal_images(before.vision, after.vision)
            differ_M = (new_features_MD != features_MD).any(axis=-1)
            assert not (differ_M & same_image_M).any(), "other images changed"
            assert differ_M.any() == (changed.clips != example.clips)
    assert rows_moved > 20  # the experts' rows did move


def tokens_of_equal_images(before, after) -> np.ndarray:
    """Flattened [P * M]: whether a vision token belongs to a clip (or padding) with the same patches in both packs."""
    packs, patches = before.segments_PN.shape
    same_PM = np.ones((packs, patches // 4), bool)
    for pack in range(packs):
        differ_N = (before.patches_PNC[pack] != after.patches_PNC[pack]).any(axis=-1)
        for segment in np.unique(before.segments_PN[pack][differ_N]):
            same_PM[pack, before.slots_PN[pack][before.segments_PN[pack] == segment] // 4] = False
    return same_PM.reshape(-1)
