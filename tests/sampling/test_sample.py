"""Drawing tokens: greedy, top-p, probabilities; batched generation against one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

import reference
from k25_jax.config import preset
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import embed, forward
from k25_jax.sampling.latent_cache import cache_bytes
from k25_jax.sampling.sample import PromptError, SampleConfig, Sampler, keep_top_p, lay_out, sample_token
from k25_jax.vision.patchpack import Clip, pack_clips

CONFIG = preset("tiny")
PARAMS = reference.random_params(CONFIG, std=0.1)
FORWARD = jax.jit(forward, static_argnames="config")
GREEDY = SampleConfig(max_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(PARAMS, CONFIG)


def clip(seed, grid=(1, 2, 4)):
    patches = np.random.default_rng(seed).integers(0, 256, (np.prod(grid), CONFIG.vision.patch_dim))
    return Clip(patches.astype(np.uint8), grid)


def run(sampler, prompts, clips=(), how=GREEDY):
    rows = [[] for _ in prompts]
    for step in sampler.generate(prompts, clips, how):
        for row, drawn in zip(rows, step, strict=True):
            if drawn:
                row.append(drawn)
    return rows


def test_greedy_and_log_probabilities_are_those_of_the_whole_forward_pass(sampler):
    """Decoding from the latent cache equals running everything again, with an image and without."""
    pad = CONFIG.media_pad_id
    for prompt, clips in (([5, 6, 7], []), ([9, pad, pad, 3], [clip(1)])):
        (drawn,) = run(sampler, [prompt], [clips])
        tokens = prompt + [token for token, _ in drawn]
        pack, starts = pack_clips(clips, 1, 64, patch_dim=CONFIG.vision.patch_dim)
        tokens_BL, media_BL = lay_out([tokens], [clips], starts, pad)
        length = tokens_BL.shape[1]
        segments = (np.arange(length) < len(tokens)).astype(np.int32)[None]
        batch = Batch(tokens_BL, tokens_BL, segments, segments, np.arange(length)[None], media_BL, pack)
        logprobs = np.asarray(jax.nn.log_softmax(FORWARD(PARAMS, batch, CONFIG)))[0]
        for i, (token, logprob) in enumerate(drawn):
            place = len(prompt) - 1 + i
            assert token == logprobs[place].argmax()
            assert abs(logprob - logprobs[place, token]) < 1e-4


def test_a_batch_gives_what_each_prompt_gives_alone(sampler):
    pad = CONFIG.media_pad_id
    prompts = [[1, 2, 3], [pad, pad, 8], list(range(40)), [4, pad, pad, pad, pad]]
    clips = [[], [clip(0)], [], [clip(1), clip(2)]]
    together = run(sampler, prompts, clips)
    for prompt, own, batched in zip(prompts, clips, together, strict=True):
        (alone,) = run(sampler, [prompt], [own])
        assert [t for t, _ in alone] == [t for t, _ in batched]
        np.testing.assert_allclose([p for _, p in alone], [p for _, p in batched], atol=1e-4)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(sampler):
    (first,), (second,) = run(sampler, [[1, 2, 3]]), run(sampler, [[200, 4]])
    stop = first[2][0]
    end = [t for t, _ in first].index(stop)
    rows = run(sampler, [[1, 2, 3], [200, 4]], how=SampleConfig(max_tokens=6, temperature=0.0, stop_ids=(stop,)))
    assert [t for t, _ in rows[0]] == [t for t, _ in first][: end + 1]
    if stop not in [t for t, _ in second]:
        assert [t for t, _ in rows[1]] == [t for t, _ in second]


def test_a_drawn_media_pad_reads_as_token_0():
    """It stands for no image; the public implementation reads it so, whatever its number."""
    for pad in (CONFIG.media_pad_id, CONFIG.text.vocab_size + 7):
        read = embed(PARAMS, np.array([3, pad, 0]), dataclasses.replace(CONFIG, media_pad_id=pad))
        np.testing.assert_array_equal(read, np.asarray(PARAMS["embed"])[[3, 0, 0]])


def test_the_seed_decides(sampler):
    how = [SampleConfig(max_tokens=8, temperature=1.0, top_p=1.0, seed=seed) for seed in (0, 0, 1)]
    a, b, c = (run(sampler, [[1, 2, 3]], how=one) for one in how)
    assert a == b and a != c


def test_top_p_keeps_the_smallest_sufficient_set():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20, 12)).astype(np.float32) * 2
    for top_p in (0.05, 0.5, 0.9, 1.0):
        kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), top_p)))
        for row, mask in zip(logits, kept, strict=True):
            p = np.exp(row) / np.exp(row).sum()
            order = np.argsort(-p)
            count = 1
            while count < 12 and p[order[:count]].sum() < top_p - 1e-7:
                count += 1
            assert set(np.flatnonzero(mask)) == set(order[:count])


def test_draws_follow_the_distribution():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal(8), jnp.float32)
    draws, count = 20000, np.zeros(8)
    rows = jnp.broadcast_to(logits, (draws, 8))
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.9)):
        tokens, logprobs = sample_token(jax.random.key(3), rows, temperature, top_p)
        count = np.bincount(np.asarray(tokens), minlength=8)
        p = np.asarray(jax.nn.softmax(keep_top_p(logits[None] / temperature, top_p)), np.float64)[0]
        assert not count[p == 0].any()
        assert chisquare(count[p > 0], draws * p[p > 0] / p.sum()).pvalue > 1e-3
        np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[tokens], rtol=1e-5)  # unmodified


@pytest.mark.parametrize(
    "prompts, clips, words",
    [
        ([], [], "0 prompts"),
        ([[]], [[]], "prompt 0 is empty"),
        ([[1, 9999]], [[]], "9999"),
        ([[1, CONFIG.media_pad_id]], [[]], "1 media_pad"),
        ([[1]], [[clip(0)]], "take 2"),
        ([[1] * 1020], [[]], "exceed the context"),
        ([[1], [2]], [[]], "1 lists of clips"),
    ],
)
def test_prompts_that_cannot_be_taken_are_named(sampler, prompts, clips, words):
    with pytest.raises(PromptError, match=words):
        next(sampler.generate(prompts, clips or [[]] * len(prompts), GREEDY))


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SampleConfig(**bad)


def test_the_cache_takes_what_the_formula_says(sampler):
    text = CONFIG.text
    assert cache_bytes(text, 2, 100) == text.layers * 2 * 100 * (text.kv_lora_rank + text.qk_rope_dim) * 4
