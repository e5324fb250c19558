"""DEP: the tables against a simulation in numpy; gradients and losses on eight devices against one, in their own process."""

import itertools

import chex
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import runs
from k25_jax.config import DataConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.parallel.dep import balance_metrics, routed, small_together, striped
from k25_jax.sharding.mesh import AXES
from k25_jax.vision.patchpack import Clip, clip_flops

MODEL = preset("tiny")


def mixed_batch(rows, packs, seed=0):
    """Rows with 0 to 2 images of 1 to 4 x 1 to 4 tokens."""
    rng, examples = np.random.default_rng(seed), []
    for _ in range(rows):
        clips = []
        for _ in range(rng.integers(0, 3)):
            height, width = 2 * rng.integers(1, 5, 2)
            patches = rng.integers(0, 256, (height * width, MODEL.vision.patch_dim)).astype(np.uint8)
            clips.append(Clip(patches, (1, int(height), int(width))))
        tokens = [1] + [MODEL.media_pad_id] * len(clips) + [2] * 8
        examples.append(make_example(tokens, [1.0] * len(tokens), clips, MODEL.media_pad_id))
    return pack_examples(examples, DataConfig(batch_size=rows, seq_len=42, packs=packs, pack_patches=128), MODEL)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 1, 2), (4, 2, 1, 3), (2, 2, 3, 2), (1, 1, 1, 2)])
@pytest.mark.parametrize("vision", ["dep", "stage0"])
def test_every_token_gets_its_feature(shape, vision):
    """Features stand for their own numbers; devices are numbered pipe, fsdp, context, expert; rows lie fsdp, expert, pipe."""
    pipe, fsdp, context, expert = shape
    devices, senders = int(np.prod(shape)), int(np.prod(shape[1:])) * (pipe if vision == "dep" else 1)
    batch = mixed_batch(rows=2 * devices, packs=2 * devices)
    out = routed(batch, dict(zip(AXES, shape, strict=True)), MODEL.vision, vision)
    send_XJZU, land_ZJXU = out.routes
    features = np.full((devices, 2 * devices * 32 // senders), -1)
    features[:senders] = np.arange(2 * devices * 32).reshape(senders, -1)
    high, wide = 2 * context, 42 // context
    for row, (f, e, p) in enumerate(itertools.product(range(fsdp), range(expert), range(pipe))):
        for c in range(context):
            home = ((p * fsdp + f) * context + c) * expert + e
            got = np.full(high * wide, -1)
            for x in range(devices):
                land, sent = land_ZJXU[home, :, x].reshape(-1), features[x][send_XJZU[x, :, home].reshape(-1)]
                assert len(set(land[land < got.size])) == (land < got.size).sum() and land.min() >= 0
                got[land[land < got.size]] = sent[land < got.size]
            own = batch.media_BL[row * high : (row + 1) * high, c * wide : (c + 1) * wide]
            assert got.tolist() == own.reshape(-1).tolist()
    assert (batch.media_BL >= 0).sum() > 2 * devices


def test_small_leaves_travel_as_one():
    weights = {"bias": np.arange(3.0), "norm": np.ones((2, 2)), "matrix": np.ones((512, 512))}
    large, small, joined = small_together(weights)
    assert [leaf.size for leaf in large.values()] == [2**18] and small.shape == (7,)
    chex.assert_trees_all_equal(
        joined(large, 2 * small), weights | {"bias": 2 * weights["bias"], "norm": 2 * weights["norm"]}
    )


def test_stripes():
    batch = mixed_batch(rows=2, packs=2)
    out = striped(batch, 3)
    assert out.tokens_BL[:, 14:28].tolist() == batch.tokens_BL[:, 1::3].tolist() and out.vision is batch.vision
    np.testing.assert_array_equal(striped(striped(batch, 3), 14).media_BL, batch.media_BL)


def test_rounds_serve_the_most_between_two_devices_up_to_a_power_of_two():
    for seed in range(10):
        batch = mixed_batch(rows=16, packs=8, seed=seed)
        out = routed(batch, dict(zip(AXES, (1, 8, 1, 1), strict=True)), MODEL.vision)
        pairs = [(i // 32, row // 2) for row in range(16) for i in batch.media_BL[row] if i >= 0]
        most, (_, rounds, _, width) = max(pairs.count(pair) for pair in pairs), out.routes[0].shape
        assert width == 32 // 8 and rounds & (rounds - 1) == 0
        assert most <= rounds * width and (rounds == 1 or most > rounds * width // 2)


def test_the_metric_is_the_busiest_device_over_the_mean_of_all():
    batch, mesh = mixed_batch(rows=8, packs=16), AbstractMesh((2, 2, 1, 2), AXES)
    loads = [0] * 16
    for pack, segments in enumerate(batch.vision.segments_PN):
        loads[pack] = sum(clip_flops(int((segments == s).sum()), MODEL.vision) for s in range(1, segments.max() + 1))
    for vision, shares in (("dep", 8), ("stage0", 4)):
        busiest = max(sum(loads[i : i + 16 // shares]) for i in range(0, 16, 16 // shares))
        got = balance_metrics(batch, mesh, MODEL.vision, vision)["vision_max_over_mean"]
        assert got == pytest.approx(busiest / (sum(loads) / 8)) and got > 1
    assert balance_metrics(batch, mesh, MODEL.vision, "plain") == {}


EQUAL = """
import dataclasses
import jax, numpy as np
from k25_jax.config import Experiment, TrainConfig
from k25_jax.models.k25 import init_params
from k25_jax.parallel import dep
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train.pretrain import loss_fn
import sys; sys.path[:0] = ["tests", "tests/parallel"]
from test_dep import MODEL, mixed_batch

text, vision = MODEL.text, dataclasses.replace(MODEL.vision, layers=1)
model = dataclasses.replace(MODEL, text=dataclasses.replace(text, layers=2, dense_layers=0), vision=vision)
params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
mixed = mixed_batch(rows=8, packs=16)
words = dataclasses.replace(mixed, media_BL=np.full_like(mixed.media_BL, -1),
                            vision=jax.tree.map(lambda a: a[:0], mixed.vision))
grads_of = jax.jit(jax.value_and_grad(lambda *a: loss_fn(*a)[0]), static_argnums=2)

def run(batch, arm="dep", axes=None):
    experiment = Experiment(model=model, train=TrainConfig(vision=arm))
    if axes is None:
        return jax.tree.map(np.asarray, grads_of(params, batch, experiment))
    mesh = make_mesh(*axes)
    with jax.set_mesh(mesh):
        placed = dep.place(batch, mesh, vision, arm)
        if placed.routes is not None:
            held = placed.vision.patches_PNC.addressable_shards[0].data.shape[0]
            assert held == 16 // dep.encoders(mesh, arm), held
        return jax.tree.map(np.asarray, grads_of(params, placed, experiment))

def same(batch, arm, axes):
    want, got = run(batch), run(batch, arm, axes)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want[1]), jax.tree.leaves(got[1]), strict=True):
        error = np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)
        assert error <= 1e-5, (arm, axes, jax.tree_util.keystr(path), error)
    return want[1]

assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(same(mixed, "dep", (2, 2, 2))["vision"]))
for arm, axes in MORE:
    same(mixed, arm, axes)
assert not any(np.abs(a).max() > 0 for a in jax.tree.leaves(same(words, "dep", (2, 2, 2))["vision"]))
mesh = make_mesh(2, 2, 2)
with jax.set_mesh(mesh):
    placed = dep.place(mixed, mesh, vision)
    forward = jax.jit(lambda p, b: dep.vision_at_tokens(p, b, model)).lower(params, placed).compile()
    assert forward.as_text().count(" all-to-all(") == 1
print("equal")
"""


MORE = [("dep", (1, 8, 1)), ("stage0", (2, 2, 2)), ("plain", (2, 2, 2))]


@pytest.mark.parametrize("more", [MORE[1:2], pytest.param(MORE, marks=pytest.mark.slow)], ids=["two forms", "all"])
def test_gradients_and_losses_equal_those_of_one_device(more):
    assert runs.on_eight_devices(f"MORE = {more}\n{EQUAL}") == "equal\n"
