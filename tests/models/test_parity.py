"""Every part of the model against the PyTorch implementation in `transformers`, on odd models drawn at random."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Kimi_K25ForConditionalGeneration
from transformers.utils import logging

import reference
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.checkpoint.huggingface import save_params
from k25_jax.models import decoder, k25, moonvit3d
from k25_jax.models.projector import project
from k25_jax.models.rope import rope_tables
from k25_jax.sampling.sample import SampleConfig, Sampler
from k25_jax.vision.patchpack import pack_clips

TOLERANCE = 1e-4
TIE = 1e-5  # an argmax may differ where the reference's two best are closer than this
CASES = {29: (40, 3), 9: (600, 1), 28: (300, 2), 14: (150, 0), 11: (30, 1), 30: (270, 2)}  # seed: tokens, images
FORWARD = jax.jit(k25.forward, static_argnames="config")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model in both forms, and a prompt with the reference's logits and what went in and out of its layers."""
    seed, (length, images) = request.param, CASES[request.param]
    logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("theirs")
    model = reference.torch_model(reference.draw_config(seed), seed)
    config, params = reference.ours(model, folder)
    rng = np.random.default_rng(seed)
    tokens, clips = reference.draw_prompt(rng, config, length, images)
    layers = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, named, out: layers.append((args[0] if args else named["hidden_states"], out)),
            with_kwargs=True,
        )
        for layer in model.model.language_model.layers
    ]
    inputs = reference.torch_inputs(tokens, clips, config)
    with torch.no_grad():
        logits_LV = model(**inputs).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return types.SimpleNamespace(
        rng=rng, model=model, config=config, params=params, tokens=tokens, clips=clips, inputs=inputs, layers=layers,
        logits_LV=logits_LV,
    )  # fmt: skip


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=TOLERANCE)


def test_the_cases_are_odd_in_every_way():
    seen = set()
    for seed in CASES:
        whole = reference.draw_config(seed)
        text, vision, rope = whole.text_config, whole.vision_config, whole.text_config.rope_parameters
        seen |= {("lora", text.q_lora_rank is None), ("groups", text.n_group > 1), ("norm", text.norm_topk_prob)}
        seen |= {("bias", text.attention_bias), ("tied", whole.tie_word_embeddings), ("shared", text.n_shared_experts)}
        seen |= {("yarn", rope["rope_type"]), ("v", text.v_head_dim % 2)}
        seen |= {("dense", min(text.first_k_dense_replace, 1), text.first_k_dense_replace == text.num_hidden_layers)}
        seen |= {(key, key in rope) for key in ("beta_fast", "mscale", "mscale_all_dim")}
        seen |= {("nope", text.qk_nope_head_dim % 2), ("heads", text.num_attention_heads % 2)}
        seen |= {("patch", vision.patch_size == 14), ("table", vision.pos_emb_height > 4)}
        seen |= {("scale", bool(rope.get("mscale_all_dim")) and rope["factor"] > 1)}
    assert len(seen) == 2 * 16 + 3, sorted(map(str, seen))


def test_vision_tower_and_projector(case):
    """Clips of 1 to 4 frames packed together; the reference sees one at a time."""
    config, grids = case.config, [(1, 4, 10), (3, 2, 6), (2, 6, 4), (4, 4, 4), (1, 2, 2), (1, 18, 14)]
    clips = [reference.draw_clip(case.rng, config, *grid) for grid in grids]
    patches = sum(len(clip.patches) for clip in clips)
    pack, starts = pack_clips(clips, 1, patches, config.vision.merge, config.vision.patch_dim)

    @jax.jit
    def vision(params, pack):
        pack = jax.tree.map(lambda a: a[0], pack)
        patches_NC = moonvit3d.normalise(pack.patches_PNC)
        hidden_NW = moonvit3d.vision_hidden(
            params["vision"], patches_NC, pack.segments_PN, pack.coords_PN5, config.vision
        )
        pooled = moonvit3d.pool(hidden_NW, pack.slots_PN, pack.weights_PN, config.vision)
        return hidden_NW, pooled, project(params["projector"], pooled, config)

    hidden_NW, pooled, features_MD = map(np.asarray, vision(case.params, pack))
    first = 0
    for clip, start in zip(clips, starts, strict=True):
        inputs = reference.torch_pixels([clip], config)
        with torch.no_grad():
            out = case.model.model.vision_tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
            projected = case.model.model.mm_projector(out.pooler_output).squeeze(1)
        tokens = slice(start, start + clip.tokens)
        assert_close(hidden_NW[first : first + len(clip.patches)], out.last_hidden_state)
        assert_close(pooled[tokens], out.pooler_output)
        assert_close(features_MD[tokens], projected)
        first += len(clip.patches)


def test_each_decoder_layer(case):
    config = case.config.text
    positions_BL = jnp.arange(len(case.tokens))[None]
    rope = rope_tables(config.rope, config.qk_rope_dim, positions_BL)
    block = jax.jit(lambda p, x_BLD: decoder.block(p, x_BLD, rope, jnp.ones_like(positions_BL), config)[0])
    layers = decoder.unstack(case.params)["layers"]
    assert len(layers) == len(case.layers)
    for layer, (given, out) in zip(layers, case.layers, strict=True):
        assert_close(block(layer, given.numpy()), out)


def test_logits(case):
    batch = reference.one_row_batch(case.tokens, case.clips, case.config)
    logits_LV = np.asarray(FORWARD(case.params, batch, case.config))[0]
    assert_close(logits_LV, case.logits_LV)
    second, best = np.sort(case.logits_LV, axis=-1)[:, -2:].T
    same = logits_LV.argmax(axis=-1) == case.logits_LV.argmax(axis=-1)
    assert (same | (best - second < TIE)).all()


def test_greedy_generation_token_for_token(case):
    inputs = case.inputs | {"attention_mask": torch.ones_like(case.inputs["input_ids"])}
    with torch.no_grad():
        theirs = case.model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
    expected = theirs[0, len(case.tokens) :].tolist()
    sampling = SampleConfig(max_tokens=32, temperature=0)
    steps = Sampler(case.params, case.config).generate([case.tokens], [case.clips], sampling)
    assert [row[0][0] for row in steps] == expected


def test_what_we_write_is_read_as_the_same_model(case, tmp_path):
    save_params(case.params, case.config, tmp_path / "ours", dtype=np.float32)
    assert read_config(tmp_path / "ours") == case.config
    model = Kimi_K25ForConditionalGeneration.from_pretrained(tmp_path / "ours", experts_implementation="eager")
    state, expected = model.state_dict(), case.model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    with torch.no_grad():
        np.testing.assert_allclose(model(**case.inputs).logits[0].numpy(), case.logits_LV, rtol=0, atol=1e-5)
