"""Parts of the model that are frozen: what moves, what the optimizer holds, what a step computes, on one device and many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    pipeline = make_pipeline(experiment.data, experiment.model)
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
@pytest.mark.parametrize("name", ["adamw", "muonclip"])
@pytest.mark.parametrize("trainable", [("vision", "projector"), ("projector",), ("dense", "head")])
def test_only_what_is_trained_moves_and_has_means(experiment, batches, params, name, trainable):
    """With weight decay, and a bound on logits that all heads exceed; the router's bias is frozen in each case."""
    run = changed(experiment, trainable, name, weight_decay=0.5, qk_clip=1e-3)
    state, step = begun(run, params), make_step(run, loss_fn)
    expected = {path for path in paths(params) if path.split("/")[0] in trainable}
    assert paths(state.opt_state.mu) == paths(state.opt_state.nu) == expected
    for batch in batches[:2]:
        state, metrics = step(state, batch)
        assert metrics["bad"] == 0 and metrics["grad_norm"] > 0
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


def test_the_router_s_bias_moves_where_it_is_trained(experiment, batches, params):
    for trainable, expected in ((("moe/moe/router_bias",), {"moe/moe/router_bias"}), (("moe/moe/router",), set())):
        run = changed(experiment, trainable)
        state, _ = make_step(run, loss_fn)(begun(run, params), batches[0])
        assert {path for path in moved(params, state.params) if path.endswith("bias")} == expected


# ----------------------------------------------------------------------------------------------------- what is computed
def test_what_is_frozen_costs_no_backward_pass(experiment, batches, params):
    """FLOPs of the jaxpr after what nobody uses is left out. The experts are taken as plain products, which can be counted."""
    text = dataclasses.replace(
        experiment.model.text, moe=dataclasses.replace(experiment.model.text.moe, grouped_matmul="ragged")
    )
    plain = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, text=text))

    def flops(trainable, remat="none"):
        run = changed(plain, trainable)
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, remat=remat))
        return jaxpr_flops(used(make_step(run, loss_fn).trace(abstract_state(run), batches[0]).jaxpr)).total

    def forward(keep):
        jaxpr = jax.make_jaxpr(lambda p: keep(loss_fn(p, batches[0], plain)))(params)
        return jaxpr_flops(jaxpr).total

    total = forward(lambda out: out[0])
    text_only = batches[0].replace(vision=jax.tree.map(lambda a: a[:0], batches[0].vision))
    vision = total - jaxpr_flops(jax.make_jaxpr(lambda p: loss_fn(p, text_only, plain)[0])(params)).total
    backbone = total - vision
    everything, encoder, projector = flops(()), flops(("vision", "projector")), flops(("projector",))
    assert everything == pytest.approx(3 * total, rel=0.1)
    assert encoder == pytest.approx(2 * backbone + 3 * vision, rel=0.1)  # no gradients of the backbone's weights
    language = [name for name in params if name not in ("vision", "projector")]
    assert flops(tuple(language)) == pytest.approx(3 * backbone + vision, rel=0.1)
    for remat in ("none", "full"):
        with_encoder, without = flops(("vision", "projector"), remat), flops(("projector",), remat)
        assert with_encoder - without > 1.5 * vision  # its backward pass, and under "full" its second forward pass
    assert vision > 0.2 * total and projector < encoder


def used(closed):
    """The jaxpr without what no result depends on, as the compiler sees it."""
    from jax.interpreters import partial_eval

    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return jaxpr
