"""DEP: the tables against a simulation in numpy; gradients and losses on eight devices against one, in their own process."""

import itertools

import chex
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from test_routes import carried

import runs
from k25_jax.config import ConfigError, DataConfig, Experiment, TrainConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.parallel import routes
from k25_jax.parallel.dep import balance_metrics, clips_in, exchange_of, routes_of, small_together, striped
from k25_jax.parallel.routes import RouteError
from k25_jax.sharding.mesh import AXES
from k25_jax.vision.patchpack import Clip, clip_flops

MODEL = preset("tiny")


def mixed_batch(rows, packs, seed=0, few=0, many=2):
    """Rows with `few` to `many` images of 1 to 4 x 1 to 4 tokens."""
    rng, examples = np.random.default_rng(seed), []
    for _ in range(rows):
        clips = []
        for _ in range(rng.integers(few, many + 1)):
            height, width = 2 * rng.integers(1, 5, 2)
            patches = rng.integers(0, 256, (height * width, MODEL.vision.patch_dim)).astype(np.uint8)
            clips.append(Clip(patches, (1, int(height), int(width))))
        tokens = [1] + [MODEL.media_pad_id] * len(clips) + [2] * 8
        examples.append(make_example(tokens, [1.0] * len(tokens), clips, MODEL.media_pad_id))
    return pack_examples(examples, data_of(rows, packs), MODEL)


def data_of(rows, packs):
    return DataConfig(batch_size=rows, seq_len=42, packs=packs, pack_patches=128)


def run_of(rows, packs, vision="dep", parts=1, rounds=0):
    """The run whose batches are those of `mixed_batch`."""
    train = TrainConfig(vision=vision, accumulate=parts, vision_rounds=rounds)
    return Experiment(model=MODEL, data=data_of(rows, packs), train=train)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 1, 2), (4, 2, 1, 3), (2, 2, 3, 2), (1, 1, 1, 2)])
@pytest.mark.parametrize("vision", ["dep", "stage0"])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_token_gets_its_feature(shape, vision, parts):
    """Features stand for their own numbers; devices are numbered pipe, fsdp, context, expert; rows lie fsdp, expert, pipe."""
    pipe, fsdp, context, expert = shape
    devices, rows, packs = int(np.prod(shape)), 4 * int(np.prod(shape)), 2 * int(np.prod(shape))
    batch = mixed_batch(rows, packs)
    exchange = exchange_of(run_of(rows, packs, vision, parts), AbstractMesh(shape, AXES))
    found = routes_of(clips_in(batch.media_BL), exchange, range(devices))
    got = carried(found, exchange.form, exchange.sent, exchange.tokens)
    assert exchange.sent == packs * 32 // (devices // (pipe if vision == "stage0" else 1))
    high, wide = 4 * context, 42 // context
    for block, (f, e, p) in enumerate(itertools.product(range(fsdp), range(expert), range(pipe))):
        own = striped(batch, context).media_BL[block * high : (block + 1) * high].reshape(parts, high // parts, 42)
        for c in range(context):
            home = ((p * fsdp + f) * context + c) * expert + e
            want = own[..., c * wide : (c + 1) * wide].reshape(parts, -1)
            assert got[:, home].tolist() == want.tolist()  # the encoders are the first devices, so numbers are the same
    assert (batch.media_BL >= 0).sum() > 2 * devices


def test_clips_of_a_batch_follow_each_other_with_their_features():
    batch = mixed_batch(rows=16, packs=8)
    clips, out = clips_in(batch.media_BL), np.full_like(batch.media_BL, -1)
    for row, column, count, feature in zip(*clips, strict=True):
        out[row, column : column + count] = np.arange(feature, feature + count)
    assert out.tolist() == batch.media_BL.tolist() and len(clips.row) < clips.count.sum() / 3
    assert not len(clips_in(np.full((2, 3), -1)).row)


def test_features_of_two_encoders_may_follow_each_other_in_a_row():
    media_BL = np.full((8, 42), -1)
    media_BL[3, 1:41] = np.arange(20, 60)  # a device has 32 features
    exchange = exchange_of(run_of(8, 8), AbstractMesh((1, 8, 1, 1), AXES))
    found = routes_of(clips_in(media_BL), exchange, range(8))
    assert carried(found, exchange.form, 32, 42)[0].tolist() == media_BL.tolist()


def test_too_few_rounds_for_a_batch_name_the_field(monkeypatch):
    monkeypatch.setattr(routes, "ROUND", 8)
    mesh, batch = AbstractMesh((1, 8, 1, 1), AXES), mixed_batch(rows=16, packs=8)
    one = exchange_of(run_of(16, 8, rounds=1), mesh)
    with pytest.raises(RouteError, match=r"1 rounds are too few: \d+; set train.vision_rounds"):
        routes_of(clips_in(batch.media_BL), one, range(8))
    assert exchange_of(run_of(16, 8), mesh).form.rounds > 5
    with pytest.raises(ConfigError, match="train.vision_rounds=-1"):
        run_of(16, 8, rounds=-1)


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
from k25_jax.config import TrainConfig
from k25_jax.models.k25 import init_params
from k25_jax.parallel import dep, hosts
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train.pretrain import loss_fn
import sys; sys.path[:0] = ["tests", "tests/parallel"]
from test_dep import MODEL, mixed_batch, run_of

text, vision = MODEL.text, dataclasses.replace(MODEL.vision, layers=1)
model = dataclasses.replace(MODEL, text=dataclasses.replace(text, layers=2, dense_layers=0), vision=vision)
params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
mixed = mixed_batch(rows=16, packs=16)
words = dataclasses.replace(mixed, media_BL=np.full_like(mixed.media_BL, -1),
                            vision=jax.tree.map(lambda a: a[:0], mixed.vision))
grads_of = jax.jit(jax.value_and_grad(lambda *a: loss_fn(*a)[0]), static_argnums=2)

def run(batch, arm="dep", axes=None, parts=1):
    experiment = dataclasses.replace(run_of(16, 16, arm, parts), model=model)
    if axes is None:
        return jax.tree.map(np.asarray, grads_of(params, batch, experiment))
    mesh = make_mesh(*axes)
    with jax.set_mesh(mesh):
        placed = hosts.place(batch, mesh, experiment)
        if placed.routes is not None:
            held = placed.vision.patches_PNC.addressable_shards[0].data.shape[0]
            assert held == 16 // dep.encoders(mesh, arm), held
        return jax.tree.map(np.asarray, grads_of(params, placed, experiment))

def same(batch, arm, axes, parts):
    want, got = run(batch), run(batch, arm, axes, parts)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want[1]), jax.tree.leaves(got[1]), strict=True):
        error = np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)
        assert error <= 1e-5, (arm, axes, parts, jax.tree_util.keystr(path), error)
    return want[1]

assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(same(mixed, "dep", (2, 2, 2), 2)["vision"]))
before = grads_of._cache_size()
for few, many in ((0, 1), (2, 2), (1, 1)):  # batches that travel by other ways, in the same program
    run(mixed_batch(rows=16, packs=16, seed=many, few=few, many=many), "dep", (2, 2, 2), 2)
assert grads_of._cache_size() == before
for arm, axes, parts in MORE:
    same(mixed, arm, axes, parts)
assert not any(np.abs(a).max() > 0 for a in jax.tree.leaves(same(words, "dep", (2, 2, 2), 2)["vision"]))
print("equal")
"""


MORE = [("dep", (1, 4, 2), 1), ("stage0", (2, 2, 2), 1), ("stage0", (2, 2, 1, 2), 2), ("plain", (2, 2, 2), 2)]


@pytest.mark.parametrize("more", [MORE[2:3], pytest.param(MORE, marks=pytest.mark.slow)], ids=["two forms", "all"])
def test_gradients_and_losses_equal_those_of_one_device(more):
    assert runs.on_eight_devices(f"MORE = {more}\n{EQUAL}") == "equal\n"
