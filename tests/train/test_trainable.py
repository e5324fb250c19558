"""Parts of the model that are frozen: what moves, what the optimizer holds, what a step computes, on one device and many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

import runs
from k25_jax.config import ConfigError, load_experiment
from k25_jax.data.pipeline import make_pipeline
from k25_jax.models.k25 import abstract_params
from k25_jax.preflight.cost import jaxpr_flops
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import TrainState, abstract_state, init_state
from k25_jax.train.step import make_step
from k25_jax.train.trainable import merged, split


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return load_experiment(str(runs.write_experiment(tmp_path_factory.mktemp("trainable"))))


@pytest.fixture(scope="module")
def batches(experiment):
    pipeline = make_pipeline(experiment.data, experiment.model, steps=3)
    out = [next(pipeline) for _ in range(3)]
    pipeline.close()
    assert all(len(batch.vision.patches_PNC) for batch in out)
    return out


@pytest.fixture(scope="module")
def params(experiment):
    rng = np.random.default_rng(0)
    draw = lambda a: rng.standard_normal(a.shape, np.float32) * 0.1  # noqa: E731
    return jax.tree.map(draw, abstract_params(experiment.model))


def changed(experiment, trainable=(), name="adamw", accumulate=1, **optim):
    optim = dataclasses.replace(experiment.optim, name=name, muon_dtype="float32", **optim)
    train = dataclasses.replace(experiment.train, trainable=trainable, accumulate=accumulate)
    return dataclasses.replace(experiment, optim=optim, train=train)


def begun(experiment, params) -> TrainState:
    return init_state(experiment).replace(params=jax.tree.map(jnp.array, params))


def paths(tree) -> set[str]:
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def moved(before, after) -> set[str]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        "/".join(key.key for key in path)
        for (path, a), b in pairs
        if np.asarray(a).tobytes() != np.asarray(b).tobytes()
    }


# ---------------------------------------------------------------------------------------------------------- the two trees
def test_the_split_is_by_parts_and_paths_and_is_undone(params):
    trained, frozen = split(params, ("vision", "moe/attention", "head"))
    assert paths(trained) | paths(frozen) == paths(params) and not paths(trained) & paths(frozen)
    assert paths(trained) == {p for p in paths(params) if p.startswith(("vision/", "moe/attention/")) or p == "head"}
    assert jax.tree.structure(merged(trained, frozen)) == jax.tree.structure(params)
    assert moved(params, merged(trained, frozen)) == set()
    everything, nothing = split(params, ())
    assert paths(everything) == paths(params) and nothing == {}


@pytest.mark.parametrize("name, like", [
    ("visoin", "vision"), ("projecter", "projector"), ("moe/atention", "moe/attention"), ("vision/block", "vision/blocks"),
])  # fmt: skip
def test_a_name_of_nothing_is_refused_with_the_nearest(experiment, name, like):
    wrong = changed(experiment, ("vision", name))
    with pytest.raises(ConfigError, match=f"train.trainable: .*'{name}'; did you mean '{like}'.*projector, vision"):
        abstract_state(wrong)


# ------------------------------------------------------------------------------------------------------------ what moves
@pytest.mark.parametrize("name, trainable", [
    ("muonclip", ("vision", "projector")), ("adamw", ("projector",)), ("muonclip", ("dense", "head", "moe/moe/router_bias")),
])  # fmt: skip
def test_only_what_is_trained_moves_and_has_means(experiment, batches, params, name, trainable):
    """With weight decay, experts of unequal load, and a bound on logits that all heads exceed."""
    run = changed(experiment, trainable, name, weight_decay=0.5, qk_clip=1e-3)
    state, step = begun(run, params), make_step(run, loss_fn)
    expected = {path for path in paths(params) if path.startswith(trainable)}
    assert paths(state.opt_state.mu) == paths(state.opt_state.nu) == expected
    for batch in batches[:2]:
        state, metrics = step(state, batch)
        assert metrics["bad"] == 0 and metrics["grad_norm"] > 0 and metrics["router_max_over_mean"] > 1
        assert ("heads_clipped" in metrics) == (name == "muonclip" and "dense" in trainable)
    assert moved(params, state.params) == expected
    assert paths(state.opt_state.mu) == expected


def test_gradients_and_updates_are_those_of_optax_on_the_trained_part(experiment, batches, params):
    """The whole gradient by jax.grad, cut to the part; clipped by the part's own norm; then optax.adamw."""
    names = ("projector", "moe/attention", "embed")
    run = changed(experiment, names, weight_decay=0.3)
    state, step = begun(run, params), make_step(run, loss_fn)
    rate = lambda count: jnp.array([0.5e-2, 1e-2, 1e-2])[count]  # noqa: E731  # warm-up of two steps
    reference = optax.adamw(
        rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3,
        mask=lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: not any(word in path[-1].key for word in ("norm", "bias", "scale")), tree
        ),
    )  # fmt: skip
    whole_gradient = jax.jit(jax.grad(lambda p, batch: loss_fn(p, batch, experiment)[0]))
    ours, opt_state = params, reference.init(split(params, names)[0])
    for batch in batches:
        part, rest = split(ours, names)
        grads, _ = split(whole_gradient(ours, batch), names)
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)  # noqa: B023
        updates, opt_state = reference.update(grads, opt_state, part)
        ours = merged(optax.apply_updates(part, updates), rest)
        state, metrics = step(state, batch)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5, err_msg=str(path))


# ----------------------------------------------------------------------------------------------------- what is computed
def test_what_is_frozen_costs_no_backward_pass(experiment, batches, params):
    """FLOPs of the jaxpr without what no result needs; the experts as plain products, which can be counted."""
    moe = dataclasses.replace(experiment.model.text.moe, grouped_matmul="ragged")
    model = dataclasses.replace(experiment.model, text=dataclasses.replace(experiment.model.text, moe=moe))
    plain, batch = dataclasses.replace(experiment, model=model), batches[0]
    text_only = batch.replace(vision=jax.tree.map(lambda a: a[:0], batch.vision))

    def flops(*trainable, remat="none"):
        run = changed(plain, trainable)
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, remat=remat))
        return jaxpr_flops(used(make_step(run, loss_fn).trace(abstract_state(run), batch).jaxpr)).total

    backbone, total = (
        jaxpr_flops(jax.make_jaxpr(lambda p, b=b: loss_fn(p, b, plain)[0])(params)).total for b in (text_only, batch)
    )
    vision, slots = total - backbone, batch.vision.segments_PN.size // model.vision.group
    grouped = model.vision.width * model.vision.group
    projector = 2 * slots * grouped * (grouped + model.text.d_model)
    assert vision > 0.2 * total
    assert flops() == pytest.approx(3 * total, rel=0.1)
    assert flops("vision", "projector") == pytest.approx(
        2 * backbone + 3 * vision, rel=0.1
    )  # no gradient of its weights
    language = [name for name in params if name not in ("vision", "projector")]
    assert flops(*language) == pytest.approx(3 * backbone + vision, rel=0.1)
    for remat, encoder in (("none", vision - projector), ("full", 2 * (vision - projector))):  # full: once more forward
        only = flops("projector", remat=remat)
        assert only - flops("embed", remat=remat) == pytest.approx(2 * projector, rel=0.05)
        assert flops("vision", "projector", remat=remat) - only > encoder


def used(closed):
    """The jaxpr without what no result depends on, which the compiler leaves out too."""
    keep = [True] * len(closed.jaxpr.outvars)
    return partial_eval.dce_jaxpr(closed.jaxpr, keep, instantiate=True)[0]


# ---------------------------------------------------------------------------------------------------------- on a mesh
ON_A_MESH = """
import pathlib, shutil
import jax, numpy as np
from k25_jax.checkpoint.store import Store
from k25_jax.config import load_experiment
from k25_jax.data.pipeline import make_pipeline
from k25_jax.train.layout import mesh_of
from k25_jax.train.loop import train
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import abstract_state, init_state
from k25_jax.train.step import make_step
from k25_jax.train.trainable import split

folder, names = pathlib.Path({folder!r}), ("vision", "projector", "moe/attention")
changes = ["data.batch_size=16", "data.packs=8", "model.text.layers=3", "optim.name=muonclip", "optim.muon_dtype=float32"]
changes += ["train.steps=4", "train.checkpoint_every=2", "optim.qk_clip=0.01", f"train.trainable={{list(names)}}"]
mesh = ["mesh.pipe=2", "mesh.expert=2", "train.accumulate=2", "train.remat=full"]
alone, together = (load_experiment({experiment!r}, changes + more) for more in ([], mesh))

def run(name):
    losses = []
    train(together, folder / name, lambda step, metrics: losses.append(metrics["loss"]))
    store = Store(folder / name / "checkpoints")
    state, _ = store.restore(abstract_state(together, mesh_of(together)))
    store.close()
    return losses, jax.tree.map(np.asarray, state)

losses, state = run("whole")
shutil.copytree(folder / "whole" / "checkpoints" / "2", folder / "resumed" / "checkpoints" / "2")
resumed, state_again = run("resumed")
assert resumed == losses[2:]
jax.tree.map(np.testing.assert_array_equal, state_again, state)
first = init_state(alone)
start = jax.tree.map(np.asarray, first.params)
jax.tree.map(np.testing.assert_array_equal, split(state.params, names)[1], split(start, names)[1])
assert jax.tree.structure(state.opt_state.mu) == jax.tree.structure(split(start, names)[0])
pipeline, step, want = make_pipeline(alone.data, alone.model, alone.train.steps), make_step(alone, loss_fn), first
for loss in losses:
    want, metrics = step(want, next(pipeline))
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-4)
pipeline.close()
for a, b, c in zip(*(jax.tree.leaves(split(p, names)[0]) for p in (want.params, state.params, start)), strict=True):
    moved = np.abs(a - c).max()
    assert moved > 0 and np.abs(a - b).max() < 0.05 * moved, (np.abs(a - b).max(), moved)
print("equal")
"""


@pytest.mark.slow
def test_on_a_mesh_the_frozen_stay_and_the_trained_move_as_on_one_device(tmp_path):
    """Pipeline, experts shared out, DEP, two parts of a batch, a run that is resumed from its checkpoint bit for bit."""
    experiment = str(runs.write_experiment(tmp_path))
    assert runs.on_eight_devices(ON_A_MESH.format(folder=str(tmp_path), experiment=experiment)).endswith("equal\n")
