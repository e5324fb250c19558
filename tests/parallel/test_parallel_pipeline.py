"""The pipeline on eight devices against one device, in a process of its own; its schedule; what is refused."""

import contextlib
import dataclasses
import types

import numpy as np
import pytest

import runs
from chips import V5P, Chip
from k25_jax.config import ConfigError, DataConfig, Experiment, MeshConfig, TrainConfig, preset
from k25_jax.parallel.pipeline import bubble, exchange_tables
from k25_jax.sharding.mesh import AXES
from k25_jax.train.layout import check_mesh

EQUAL = """
    from benchmarks.parallel import BOUND, compare, make_batch, worst_of

    batch, one_device = make_batch(), {{}}
    row = compare({name!r}, batch, one_device)
    assert worst_of(row) <= BOUND, row
    print("equal")
"""


@pytest.mark.parametrize("name", ["all, in two parts", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_gradients_statistics_and_steps_equal_those_of_one_device(name):
    assert runs.on_eight_devices(EQUAL.format(name=name)) == "equal\n"


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("repeats", [1, 2, 3, 5, 8])
def test_every_block_reaches_the_stage_that_runs_it(stages, repeats):
    sent_SSC, kept_SR = exchange_tables(stages, repeats)
    held_SR = np.arange(stages * repeats).reshape(stages, repeats)
    outgoing_SSC = np.stack([held_SR[s][sent_SSC[s]] for s in range(stages)])
    received_SN = outgoing_SSC.swapaxes(0, 1).reshape(stages, -1)
    for s in range(stages):
        np.testing.assert_array_equal(received_SN[s][kept_SR[s]], np.arange(repeats) * stages + s)
    assert sent_SSC.shape[-1] == np.ceil(repeats / stages)
    running_SR, (sent_SSC, kept_SR) = held_SR.reshape(repeats, stages).T, exchange_tables(stages, repeats, back=True)
    outgoing_SSC = np.stack([running_SR[s][sent_SSC[s]] for s in range(stages)])
    received_SN = outgoing_SSC.swapaxes(0, 1).reshape(stages, -1)
    np.testing.assert_array_equal(np.take_along_axis(received_SN, kept_SR, axis=1), held_SR)


def test_the_bubble_counts_the_ticks_of_a_simulated_schedule():
    """One stage's work needs its own item before and the same item of the stage before it."""
    for stages, repeats, microbatches in ((2, 1, 2), (4, 3, 8), (4, 1, 16)):
        items = microbatches * repeats
        done = np.zeros((stages, items), int)
        for item in range(items):
            for stage in range(stages):
                before = done[stage - 1, item] if stage else 0
                done[stage, item] = max(before, done[stage, item - 1] if item else 0) + 1
        assert bubble(stages, repeats, microbatches) == pytest.approx(1 - items / done.max())


@pytest.mark.parametrize(
    "mesh, rows, words",
    [
        (dict(pipe=4, fsdp=1), 8, "text.layers less text.dense_layers=2 must be a multiple of 4"),
        (dict(pipe=2, fsdp=1, repeats=2), 8, "must be a multiple of 4 .mesh.pipe x mesh.repeats.; take fewer devices"),
        (
            dict(pipe=2, fsdp=2, microbatches=4),
            12,
            "data.batch_size=12 must be a multiple of 8 .mesh.fsdp",
        ),
        (dict(pipe=2, fsdp=1), 3, "data.batch_size=3"),
        (dict(fsdp=1, context=3), 3, "data.seq_len=512 must be a multiple of 3 .mesh.context."),
        (dict(fsdp=1, expert=16), 16, "moe.experts=8 must be a multiple of 16 .mesh.expert."),
        (dict(fsdp=1, expert=8), 8, "data.packs=4 must be a multiple of 8 .the devices that encode"),
    ],
)
def test_what_does_not_divide_is_refused(mesh, rows, words):
    packs = 4 if "packs" in words else 16 * 3
    data = DataConfig(batch_size=rows, packs=packs)
    experiment = Experiment(model=preset("tiny"), data=data, mesh=MeshConfig(**mesh))
    with pytest.raises(ConfigError, match=words):
        check_mesh(experiment, of_one_process(tuple(mesh.get(axis, 1) for axis in AXES)))


def of_one_process(sizes):
    """A mesh of chips that are not there."""
    devices = np.empty(sizes, object)
    devices.flat = [Chip(V5P, [number, 0, 0], 0) for number in range(devices.size)]
    return types.SimpleNamespace(shape=dict(zip(AXES, sizes, strict=True)), devices=devices, size=devices.size)


def test_chunks_of_tokens_divide_a_microbatch():
    """Two devices with eight rows of 512 tokens in two parts: 1024 tokens each."""
    tiny = preset("tiny")
    for chunk, right in ((0, True), (512, True), (2048, True), (1000, False)):
        moe = dataclasses.replace(tiny.text.moe, chunk=chunk)
        model = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, moe=moe))
        data = DataConfig(batch_size=8, packs=2)
        run = Experiment(model=model, data=data, train=TrainConfig(accumulate=2), mesh=MeshConfig(fsdp=2))
        words = "tokens of a device in a microbatch=1024 must be a multiple of 1000 .moe.chunk."
        with contextlib.nullcontext() if right else pytest.raises(ConfigError, match=words):
            check_mesh(run, of_one_process((1, 2, 1, 1)))


def test_microbatches_are_a_multiple_of_the_stages():
    with pytest.raises(ConfigError, match="mesh.microbatches=3 must be a multiple of mesh.pipe=2"):
        MeshConfig(pipe=2, microbatches=3)
    assert dataclasses.asdict(MeshConfig())["microbatches"] == 0
