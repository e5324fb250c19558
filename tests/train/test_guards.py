"""What a step must leave alone: weights under QK-Clip when the step is bad, and the frozen encoder's backward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import programs
from k25_jax.config import DataConfig, Experiment, OptimConfig, TrainConfig, preset
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.models.decoder import Stats
from k25_jax.models.k25 import abstract_params
from k25_jax.optim.muonclip import muonclip
from k25_jax.preflight.aot import abstract_batch
from k25_jax.sharding.mesh import AXES
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import TrainState, init_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

TINY = preset("tiny")
MODEL = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, layers=2, dense_layers=1))


# ----------------------------------------------------------------------------------------------------------- bad steps
@pytest.mark.parametrize("loss, bad", [(1.0, 0), (np.nan, 1)])
def test_qk_clip_leaves_a_bad_step_alone(loss, bad):
    """Logits of 300 in a step whose loss is no number: they are not to be trusted either."""
    experiment = Experiment(model=MODEL, optim=OptimConfig(name="muonclip", peak_lr=1e-30, end_lr=1e-30))
    seen = Stats(jnp.zeros((1, MODEL.text.moe.experts), jnp.int32), jnp.full((2, MODEL.text.heads), 300.0))

    def loss_of(params, batch, experiment):
        value = loss + 0.0 * sum(a.sum() for a in jax.tree.leaves(params["dense"]))
        return value, ({"loss": value}, seen)

    text, rng = MODEL.text, np.random.default_rng(0)
    shapes = {"q_b": (2, 4, text.heads, text.qk_dim), "k_b": (2, 4, text.heads, text.qk_nope_dim)}
    attention = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params = {"dense": {"attention_norm": jnp.ones((2, text.d_model)), "attention": attention}}
    before = np.array(attention["k_b"])
    opt_state = muonclip(experiment.optim, experiment.train.steps).init(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(jax.random.key(0)))
    state, metrics = make_step(experiment, loss_of)(state, None)
    assert metrics["bad"] == bad and metrics["heads_clipped"] == (0 if bad else 2 * MODEL.text.heads)
    ratio = np.asarray(state.params["dense"]["attention"]["k_b"]) / before
    np.testing.assert_allclose(ratio, 1.0 if bad else (1 / 3) ** 0.5, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- the encoder
def image_batch():
    """One row with an image in it."""
    rng = np.random.default_rng(0)
    clip = Clip(rng.integers(0, 256, (16, MODEL.vision.patch_dim)).astype(np.uint8), (1, 4, 4))
    tokens = [5, MODEL.media_pad_id, *rng.integers(0, 250, 20).tolist()]
    example = make_example(tokens, [1.0] * len(tokens), [clip], MODEL.media_pad_id)
    return pack_examples([example], DataConfig(batch_size=1, seq_len=32, packs=1, pack_patches=16), MODEL)


def checkpoints(jaxpr) -> int:
    """How many pieces of a program are computed again in its backward pass; those inside others not counted."""
    return sum(
        eqn.primitive.name in programs.CHECKPOINTS and not set(inside) & programs.CHECKPOINTS
        for eqn, inside in programs.equations(jaxpr)
    )


def test_the_encoder_is_computed_again_where_it_is_trained_and_only_there():
    """Frozen, there is no backward pass to save memory for; trained, its layers must not be held over the backbone's."""
    params, batch, found = abstract_params(MODEL), image_batch(), {}
    for trained, names in (("all", ()), ("text alone", ("embed", "dense", "moe", "final_norm", "head"))):
        experiment = Experiment(model=MODEL, train=TrainConfig(remat="full", trainable=names))
        found[trained] = checkpoints(jax.make_jaxpr(lambda p: loss_fn(p, batch, experiment)[0])(params))  # noqa: B023
    assert found["all"] == found["text alone"] + 1, found


def test_on_a_mesh_too_the_encoder_is_computed_again_where_it_is_trained():
    """As the compiler would be given it for eight devices, of which none is needed."""
    found, mesh = {}, AbstractMesh((1, 8, 1, 1), AXES)
    for trained, names in (("all", ()), ("text alone", ("embed", "dense", "moe", "final_norm", "head"))):
        train = TrainConfig(remat="full", trainable=names)
        data = DataConfig(batch_size=8, seq_len=32, packs=8, pack_patches=16)
        experiment = Experiment(model=MODEL, data=data, train=train)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.make_jaxpr(lambda p, b: loss_fn(p, b, experiment)[0])(  # noqa: B023
                abstract_params(MODEL), abstract_batch(experiment, mesh)
            )
        found[trained] = checkpoints(traced)
    assert found["all"] == found["text alone"] + 1, found


# --------------------------------------------------------------------------------------------------------------- seeds
def test_the_seed_of_a_run_decides_its_weights():
    traced = []
    for seed in (0, 0, 1):
        experiment = Experiment(model=MODEL, train=TrainConfig(seed=seed))
        traced.append(str(jax.make_jaxpr(lambda: init_state(experiment).params)()))  # noqa: B023
    assert traced[0] == traced[1] != traced[2]
