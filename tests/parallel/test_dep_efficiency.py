"""The benchmark of DEP's efficiency: its projection against clocks chip by chip; its arms in two real processes."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import optax
import pytest
from test_hosts import joined

import runs
from benchmarks.dep_efficiency import REAL, batch_of, costs_of, experiment, image_sizes, projection, vision_ratio
from k25_jax.config import DataConfig, K25Config, MeshConfig, TrainConfig, load_experiment, preset
from k25_jax.models.k25 import abstract_params, vision_features
from k25_jax.preflight.cost import jaxpr_flops
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import init_state
from k25_jax.vision.patchpack import balance, empty_pack

STAGES, CHIPS, MICROBATCHES, PACKS = 2, 8, 4, 16


def minute():
    """A run of the benchmark's form that compiles more quickly."""
    tiny = preset("tiny")
    text = dataclasses.replace(tiny.text, layers=2, dense_layers=0)
    model = dataclasses.replace(tiny, text=text, vision=dataclasses.replace(tiny.vision, layers=1))
    data = DataConfig(batch_size=4, seq_len=48, packs=6, pack_patches=64)
    train, mesh = TrainConfig(remat="none"), MeshConfig(pipe=2, microbatches=2)
    return dataclasses.replace(experiment(), model=model, data=data, train=train, mesh=mesh)


def clocks(backbone: float, costs, packs, rows) -> dict:
    """Efficiencies from what the clock of each chip shows at the end of a step; chip 0, 1, .. are the first stage's."""
    first = CHIPS // STAGES
    spread, on_first, plain = [0.0] * CHIPS, [0.0] * first, [0.0] * CHIPS
    for cost, pack in zip(costs, packs, strict=True):
        spread[pack // (PACKS // CHIPS)] += 4 * cost
        on_first[pack // (PACKS // first)] += 4 * cost
        plain = [clock + 4 * cost for clock in plain]
    ticks = 0.0
    for microbatch in range(MICROBATCHES):
        took = [0.0] * first
        for cost, row in zip(costs, rows, strict=True):
            chip, own = divmod(row, MICROBATCHES)  # one row of each microbatch on each chip
            took[chip] += 4 * cost if own == microbatch else 0.0
        ticks += max(took)
    added = {"dep": max(spread), "stage0": max(on_first), "stage0, rows": ticks, "plain": max(plain)}
    return {name: 4 * backbone / (4 * backbone + vision) for name, vision in added.items()}


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_what_clocks_show(seed):
    config, rng = K25Config(), np.random.default_rng(seed)
    sizes = image_sizes(rng, 4 * 4096, 300, 2048)
    packs, costs = balance(sizes.tolist(), PACKS, 2048, config.vision), costs_of(sizes, config)
    rows = rng.integers(0, CHIPS // STAGES * MICROBATCHES, len(sizes))
    backbone = costs.sum() / CHIPS * rng.uniform(1, 40)
    places = np.asarray(packs) / PACKS, (rows + 0.5) / (CHIPS // STAGES * MICROBATCHES)
    got = projection(backbone, costs, *places, STAGES, CHIPS, MICROBATCHES)
    assert got == pytest.approx(clocks(backbone, costs, packs, rows.tolist()))
    assert got["dep"] > got["stage0"] > got["stage0, rows"] > got["plain"]


def test_equal_images_leave_nothing_to_balance():
    places = (np.arange(16) + 0.5) / 16
    got = projection(10.0, np.ones(16), places, places, STAGES, CHIPS, MICROBATCHES)
    assert got == pytest.approx({"dep": 10 / 12, "stage0": 10 / 14, "stage0, rows": 10 / 14, "plain": 10 / 26})


def test_costs_are_those_of_the_traced_encoder():
    config = K25Config()
    patches, embedding = 1024, 2 * 1024 * config.vision.patch_dim * config.vision.width
    pack = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), empty_pack(1, patches, config.vision))
    traced = jax.make_jaxpr(lambda p, b: vision_features(p, b, config))(abstract_params(config), pack)
    assert costs_of([patches], config)[0] + embedding == pytest.approx(jaxpr_flops(traced).total, rel=1e-3)


def test_the_small_model_keeps_the_ratio_and_the_batches_their_tokens():
    run = experiment()
    assert vision_ratio(run) == pytest.approx(vision_ratio(load_experiment(REAL)), rel=0.02)
    for reader in range(2):
        mixed, words = (batch_of(run, reader, 2, share) for share in (0.25, 0.0))
        assert (mixed.media_BL >= 0).mean() == 0.25 and len(words.vision.patches_PNC) == 0
        assert (mixed.segments_BL == 1).all() and (words.segments_BL == 1).all()
        sizes = [(own == n).sum() for own in mixed.vision.segments_PN for n in range(1, own.max() + 1)]
        assert sum(sizes) == 4 * (mixed.media_BL >= 0).sum() and all(size % 4 == 0 for size in sizes)


def test_sizes_add_up_and_have_a_heavy_tail():
    sizes = np.sort(image_sizes(np.random.default_rng(0), 2**20, 600, 4096))
    assert sizes.sum() == 2**20 and sizes[-1] == 4096 and (sizes % 4 == 0).all()
    assert 500 < np.median(sizes) < 700 and sizes[-len(sizes) // 10 :].sum() > 0.3 * sizes.sum()


@pytest.mark.slow
def test_all_arms_take_the_same_first_step_in_two_processes():
    script = """
        import sys; sys.path[:0] = ["tests", "tests/parallel"]
        import json
        from benchmarks.dep_efficiency import work
        from k25_jax.sharding.processes import joined
        from test_dep_efficiency import minute

        with joined() as index:
            out = work(minute(), 1)
            if index == 0:
                print(json.dumps(out))
    """
    launch = [sys.executable, "launch/local.py", "--processes=2", "--", sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(launch, capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout)
    for share, names in ((0.25, ("dep", "stage0", "plain")), (0.0, ("text",))):
        whole = joined([batch_of(minute(), reader, 2, share) for reader in range(2)])
        grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=2)
        (loss, _), grads = grad_fn(init_state(minute()).params, whole, minute())
        for name in names:
            want = {"loss": loss.item(), "grad_norm": optax.tree.norm(grads).item()}
            assert got["first"][name] == pytest.approx(want, rel=1e-5), name
    balance_of = {name: figures.get("vision_max_over_mean") for name, figures in got["batch"].items()}
    assert balance_of["dep"] < balance_of["stage0"] == pytest.approx(2.0) and balance_of["plain"] is None
