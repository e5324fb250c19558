"""Batches that two real processes read, against the same rows on one device; in processes of their own, on loopback."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_routes import carried

import runs
from k25_jax.config import ConfigError, DataConfig, Experiment, MeshConfig, OptimConfig, TrainConfig, preset
from k25_jax.data.packing import Batch, make_example, pack_examples
from k25_jax.parallel.hosts import Plan, pixel_tables
from k25_jax.parallel.routes import Tables, form_of
from k25_jax.sharding.processes import readers
from k25_jax.train.accumulate import first_part
from k25_jax.train.pretrain import features, inputs, loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

TINY = preset("tiny")
MODEL = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, layers=2, dense_layers=0),
    vision=dataclasses.replace(TINY.vision, layers=1),
)
DATA = DataConfig(batch_size=8, seq_len=40, packs=8, pack_patches=64)


def experiment(mesh=(1, 1, 1, 1), vision="dep") -> Experiment:
    """The run; `mesh` is pipe, fsdp, context, expert."""
    pipe, fsdp, context, expert = mesh
    optim = OptimConfig(peak_lr=1e-1, warmup_steps=1, eps=1.0)  # so large an eps does not blow up what is next to zero
    sizes = MeshConfig(pipe, fsdp, expert, context)
    return Experiment(model=MODEL, data=DATA, optim=optim, train=TrainConfig(steps=3, vision=vision), mesh=sizes)


def batch_of(reader: int, count: int, images: bool = True, samples: bool = False) -> Batch:
    """What reader `reader` of `count` reads: the more images the higher its number, of 1 to 4 x 1 to 4 tokens.

    With `samples` every token was sampled, and its log-probability and advantage go by what it is.
    """
    rng, rows = np.random.default_rng(reader), DATA.batch_size // count
    examples = []
    for row in range(rows):
        clips = []
        for _ in range(min(reader + row % 2, 2) * images):
            height, width = 2 * rng.integers(1, 5, 2)
            patches = rng.integers(0, 256, (height * width, MODEL.vision.patch_dim)).astype(np.uint8)
            clips.append(Clip(patches, (1, int(height), int(width))))
        tokens = [1, *[MODEL.media_pad_id] * len(clips), *rng.integers(0, 256, 7).tolist()]
        examples.append(make_example(tokens, [1.0] * len(tokens), clips, MODEL.media_pad_id))
    data = dataclasses.replace(DATA, batch_size=rows, packs=DATA.packs // count)
    if samples:
        examples = [
            dataclasses.replace(e, old_logprobs=-np.sqrt(e.tokens), advantages=np.sin(e.tokens)) for e in examples
        ]
    return pack_examples(examples, data, MODEL)


def joined(batches: list[Batch]) -> Batch:
    """One batch of the rows of all, on one device."""
    shapes, start, moved = [batch.vision.segments_PN.shape for batch in batches], 0, []
    for batch, (packs, slots) in zip(batches, shapes, strict=True):
        moved.append(batch.replace(media_BL=np.where(batch.media_BL < 0, -1, batch.media_BL + start)))
        start += packs * slots // MODEL.vision.group
    return jax.tree.map(lambda *parts: np.concatenate(parts), *moved)


def read(params, batch: Batch, run: Experiment):
    """A number that depends on what the decoder reads at each place of each document, but not on the order of the rows."""
    x_BLD = inputs(params | {"features": features(params, batch, run)}, first_part(batch), run)
    return jnp.einsum("bld,bld,bl->", x_BLD, x_BLD, jnp.sqrt(1.0 + batch.positions_BL))


def read_samples(batch: Batch):
    """A number that depends on which token has which log-probability and advantage."""
    return jnp.nansum(batch.old_logprobs_BL * batch.advantages_BL * batch.targets_BL)


# ------------------------------------------------------------------------------------------------------ who reads what
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 1, 2), (4, 2, 1, 1), (1, 1, 2, 4), (2, 1, 4, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize("each", [1, 2, 4])
def test_processes_that_hold_the_same_rows_read_the_same(shape, each):
    owners = np.arange(8).reshape(shape) // each
    pipe, fsdp, context, expert = shape
    held = {p: set() for p in range(8 // each)}
    for p, f, c, e in np.ndindex(shape):
        held[owners[p, f, c, e]].add((f * expert + e) * pipe + p)
    found = readers(owners)
    assert sorted(p for reader in found for p in reader.processes) == sorted(held)
    assert sorted(block for reader in found for block in reader.rows) == list(range(pipe * fsdp * expert))
    assert [reader.rows[0] for reader in found] == sorted(reader.rows[0] for reader in found)
    for reader in found:
        assert all(held[p] == set(reader.rows) for p in reader.processes)
        assert [owners.reshape(-1)[d] in reader.processes for d in range(8)] == [d in reader.devices for d in range(8)]


def test_rows_that_are_shared_in_part_are_refused():
    with pytest.raises(ConfigError, match=r"mesh.context=2.*share some of their rows"):
        readers(np.asarray([0, 0, 1, 1, 1, 2, 2, 2]).reshape(1, 1, 2, 4))


def test_pixels_travel_from_where_they_were_read_to_where_they_are_encoded():
    """Patches stand for their own numbers; four devices of two packs of 32 slots, two processes."""
    grids = [(1, 4, 4), (2, 2, 4), (1, 2, 6), (1, 4, 4), (3, 2, 2)]
    read, encoded = np.asarray([0, 16, 32, 64, 100]), np.asarray([128, 160, 192, 208, 0])
    sizes = np.prod(grids, axis=1)
    plan = Plan(8, 32, "uint8", np.asarray(grids), None, read, encoded, None, None)
    parts = [pixel_tables(plan, mine, 4) for mine in ([0, 1], [2, 3])]
    spread, pick, land = (np.concatenate(tables) for tables in zip(*parts, strict=True))
    got = carried(Tables(spread, pick[None], land[None]), form_of(4, 64, 64), 64, 64)
    want = np.full(256, -1)
    for start, end, size in zip(read, encoded, sizes, strict=True):
        want[end : end + size] = np.arange(start, start + size)
    assert got.reshape(-1).tolist() == want.tolist()


# --------------------------------------------------------------------------------------------------- two real processes
TWO = """
import sys; sys.path[:0] = ["tests", "tests/parallel"]
import json, jax, numpy as np
from concurrent.futures import ThreadPoolExecutor
from k25_jax.parallel import hosts
from k25_jax.sharding.processes import gathered, joined, own_reader, owners_of, readers
from k25_jax.train.layout import mesh_of
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import init_state
from k25_jax.train.step import make_step
from test_hosts import MODEL, batch_of, experiment, read, read_samples

def placed(run, images=True, samples=False):
    mesh = mesh_of(run)
    everyone = readers(owners_of(mesh))
    number = own_reader(everyone)
    batch = batch_of(number, len(everyone), images or number == 0, samples)
    with ThreadPoolExecutor(1) as thread:  # as a loop plans, while this thread tells and hears other things
        coming = thread.submit(hosts.planned, batch, mesh, run)
        numbers = [gathered([index, turn, "." * 10**turn]) for turn in range(7)]
        plan = coming.result()
    assert all(each == [0, turn, "." * 10**turn] for turn, (each, _) in enumerate(numbers))
    assert all(each[0] == 1 for _, each in numbers)
    return mesh, hosts.placed(plan), plan.metrics

with joined() as index:
    out = {}
    run = experiment((2, 2, 1, 1))
    mesh, whole, figures = placed(run)
    with jax.set_mesh(mesh):
        step, state, losses = make_step(run, loss_fn, mesh), init_state(run, mesh), []
        for _ in range(2):
            state, metrics = step(state, whole)
            losses.append(metrics["loss"].item())
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.tree.map(np.asarray, jax.jit(lambda p: p, out_shardings=everywhere)(state.params))
    out |= {"losses": losses, "figures": figures, "samples": jax.jit(read_samples)(placed(run, samples=True)[1]).item()}
    for name, axes, vision, images in ARMS:
        run = experiment(axes, vision)
        mesh, whole, _ = placed(run, images)
        with jax.set_mesh(mesh):
            out[name] = jax.jit(read, static_argnums=2)(params, whole, run).item()
    if index == 0:
        np.savez(FILE, *jax.tree.leaves(params))
        print(json.dumps(out))
"""
ARMS = (
    ("one has no image", (1, 4, 1, 1), "dep", False),
    ("both hold the same rows", (1, 1, 4, 1), "dep", True),
    ("stage0", (2, 2, 1, 1), "stage0", True),
    ("plain", (1, 2, 1, 2), "plain", True),
)


@pytest.mark.parametrize("arms", [ARMS[:1], pytest.param(ARMS, marks=pytest.mark.slow)], ids=["one form", "all"])
def test_losses_and_parameters_equal_those_of_one_device(tmp_path, arms):
    script = f"ARMS, FILE = {arms!r}, {str(tmp_path / 'params.npz')!r}\n" + textwrap.dedent(TWO)
    launch = [
        sys.executable,
        "launch/local.py",
        "--processes=2",
        "--devices-each=2",
        "--",
        sys.executable,
        "-c",
        script,
    ]
    done = subprocess.run(launch, capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])

    run, whole = experiment(), joined([batch_of(reader, 2) for reader in range(2)])
    step, state, losses = make_step(run, loss_fn), init_state(run), []
    for _ in range(2):
        state, metrics = step(state, whole)
        losses.append(metrics["loss"].item())
    np.testing.assert_allclose(got["losses"], losses, rtol=1e-5)
    with np.load(tmp_path / "params.npz") as stored:
        theirs = [stored[name] for name in stored.files]
    for (path, ours), b in zip(jax.tree_util.tree_leaves_with_path(state.params), theirs, strict=True):
        error = np.abs(ours - b).max() / max(np.abs(ours).max(), 1e-12)
        assert error <= 1e-5, (jax.tree_util.keystr(path), error)
    samples = joined([batch_of(reader, 2, samples=True) for reader in range(2)])
    assert got["samples"] == pytest.approx(read_samples(samples).item(), rel=1e-5) and abs(got["samples"]) > 100
    assert got["figures"]["clips"] == sum(segments.max() for segments in whole.vision.segments_PN)
    assert got["figures"]["tokens"] == (whole.segments_BL > 0).sum()
    assert got["figures"]["waste_patches"] == pytest.approx((whole.vision.segments_PN == 0).mean())

    mixed = [batch_of(0, 2), batch_of(1, 2, images=False)]
    padding = jax.tree.map(np.zeros_like, mixed[0].vision)
    mixed[1] = mixed[1].replace(vision=padding.replace(coords_PN5=np.ones_like(padding.coords_PN5)))
    wants = {"one has no image": joined(mixed), "both hold the same rows": batch_of(0, 1)}
    for name, *_ in arms:
        assert got[name] == pytest.approx(read(state.params, wants.get(name, whole), run).item(), rel=1e-5), name
