"""One training step: what a bad one changes, how the router's bias moves, what the update is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import runs
from k25_jax.config import Experiment, OptimConfig, TrainConfig, load_experiment
from k25_jax.data.pipeline import make_pipeline
from k25_jax.models.decoder import Stats
from k25_jax.models.k25 import abstract_params
from k25_jax.optim.muonclip import muonclip
from k25_jax.train.pretrain import loss_fn
from k25_jax.train.state import TrainState
from k25_jax.train.step import make_step

NOTHING_SEEN = Stats(jnp.zeros((0, 1)), jnp.ones((1, 1)))


@dataclasses.dataclass
class Setup:
    """A compiled step of the minute model with a state and three batches."""

    experiment: Experiment
    step: object
    params: dict
    batches: list

    def state(self, params=None) -> TrainState:
        """A state that has taken no step."""
        return fresh(self.experiment, self.params if params is None else params)


def fresh(experiment: Experiment, params) -> TrainState:
    params = jax.tree.map(jnp.array, params)
    opt_state = muonclip(experiment.optim, experiment.train.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(jax.random.key(0)))


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    experiment = load_experiment(str(runs.write_experiment(tmp_path_factory.mktemp("step"))))
    pipeline = make_pipeline(experiment.data, experiment.model, experiment.train.steps)
    batches = [next(pipeline) for _ in range(3)]
    pipeline.close()
    rng = np.random.default_rng(0)
    draw = lambda a: rng.standard_normal(a.shape, np.float32) * 0.1  # noqa: E731
    params = jax.tree.map(draw, abstract_params(experiment.model))
    return Setup(experiment, make_step(experiment, loss_fn), params, batches)


def bits(tree) -> dict[str, bytes]:
    return {
        jax.tree_util.keystr(path): np.asarray(a).tobytes() for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def poisoned(batch, value: float):
    return batch.replace(loss_weights_BL=np.where(batch.loss_weights_BL > 0, np.float32(value), 0))


# ---------------------------------------------------------------------------------------------------------- bad steps
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_bad_step_changes_nothing_but_its_number(setup, value):
    state, metrics = setup.step(setup.state(), setup.batches[0])
    assert metrics["bad"] == 0 and bits(state.params) != bits(setup.params)
    before = bits(state)
    state, metrics = setup.step(state, poisoned(setup.batches[1], value))
    assert metrics["bad"] == 1 and not np.isfinite(metrics["loss"])
    after = bits(state)
    assert after.pop(".step") == np.int32(2).tobytes() and before.pop(".step") == np.int32(1).tobytes()
    assert after == before


def test_after_a_bad_step_training_goes_on_as_if_it_had_not_been(setup):
    disturbed, straight = setup.state(), setup.state()
    for batch in (setup.batches[0], poisoned(setup.batches[1], np.inf), setup.batches[2]):
        disturbed, _ = setup.step(disturbed, batch)
    for batch in (setup.batches[0], setup.batches[2]):
        straight, _ = setup.step(straight, batch)
    assert int(disturbed.step) == 3 and int(straight.step) == 2
    assert bits(disturbed.params) == bits(straight.params) and bits(disturbed.opt_state) == bits(straight.opt_state)


def test_a_weight_that_is_not_finite_makes_every_step_bad(setup):
    params = jax.tree.map(np.copy, setup.params)
    params["final_norm"][0] = np.nan
    state = setup.state(params)
    before = bits(state.params)
    for batch in setup.batches:
        state, metrics = setup.step(state, batch)
        assert metrics["bad"] == 1
    assert bits(state.params) == before


def test_a_gradient_that_is_not_finite_is_bad_though_the_loss_is():
    def loss(params, batch, experiment):
        value = jnp.sqrt(params["w"]).sum()
        return value, ({"loss": value}, NOTHING_SEEN)

    experiment = toy_experiment()
    params = {"w": jnp.array([[0.0, 4.0]])}
    state, metrics = make_step(experiment, loss)(fresh(experiment, params), None)
    assert metrics["loss"] == 2 and metrics["grad_norm"] == np.inf and metrics["bad"] == 1
    assert state.params["w"].tolist() == [[0.0, 4.0]]


# ------------------------------------------------------------------------------------------------------------- router
def test_the_routers_bias_moves_by_one_rate_and_only_so(setup):
    """Of a real step: up, down, or not at all where an expert has just the mean load."""
    rate = setup.experiment.model.text.moe.bias_rate
    before = setup.params["moe"]["moe"]["router_bias"]
    state, metrics = setup.step(setup.state(), setup.batches[0])
    moved = np.asarray(state.params["moe"]["moe"]["router_bias"]) - before
    steps = moved / rate
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    assert set(np.rint(steps).ravel()) <= {-1, 0, 1} and {-1, 1} <= set(np.rint(steps).ravel())
    assert metrics["router_max_over_mean"] > 1


def test_the_sign_rule_raises_experts_below_the_mean_load_and_lowers_those_above():
    load_YE = jnp.array([[1, 2, 3, 2], [8, 0, 0, 0]])

    def loss(params, batch, experiment):
        value = (params["w"] ** 2).sum()
        return value, ({"loss": value}, Stats(load_YE, jnp.ones((1, 1))))

    experiment = toy_experiment()
    bias_YE = jnp.array([[0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 2.0, 3.0]])
    params = {"w": jnp.ones((2, 2)), "moe": {"moe": {"router_bias": bias_YE}}}
    state, metrics = make_step(experiment, loss)(fresh(experiment, params), None)
    rate = experiment.model.text.moe.bias_rate
    expected = bias_YE + rate * jnp.array([[1, 0, -1, 0], [-1, 1, 1, 1]])
    np.testing.assert_array_equal(state.params["moe"]["moe"]["router_bias"], expected)
    assert metrics["router_max_over_mean"] == 4
    assert (state.params["w"] != 1).all()


# ------------------------------------------------------------------------------------------------------------- update
def toy_experiment() -> Experiment:
    optim = OptimConfig(peak_lr=0.1, end_lr=0.01, warmup_steps=2, decay_steps=2, weight_decay=0.3)
    return Experiment(optim=optim, train=TrainConfig(steps=4))


def test_four_steps_are_those_of_optax_adamw():
    """Clipping to norm 1, then optax.adamw under the schedule 0.05, 0.1, 0.1, 0.055; the step is the same in a jit."""
    target = jnp.array([[1.0, -2.0], [0.5, 30.0]])

    def loss(params, batch, experiment):
        value = ((params["w"] - target) ** 2).sum() + (params["norm"] ** 2).sum()
        return value, ({"loss": value}, NOTHING_SEEN)

    experiment = toy_experiment()
    params = {"w": jnp.ones((2, 2)), "norm": jnp.ones(3)}
    step, state = make_step(experiment, loss), fresh(experiment, params)
    schedule = lambda count: jnp.array([0.05, 0.1, 0.1, 0.055])[count]  # noqa: E731
    reference = optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, mask={"w": True, "norm": False})
    opt_state = reference.init(params)
    for _ in range(4):
        grads = jax.grad(lambda p: loss(p, None, None)[0])(params)
        norm = jnp.sqrt(sum((g**2).sum() for g in grads.values()))
        clipped = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)  # noqa: B023
        updates, opt_state = reference.update(clipped, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, None)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
        for name in params:
            np.testing.assert_allclose(state.params[name], params[name], rtol=1e-6)


def muonclip_metrics(setup, threshold: float, steps: int) -> list[dict]:
    optim = dataclasses.replace(setup.experiment.optim, name="muonclip", muon_dtype="float32", peak_lr=2e-2)
    experiment = dataclasses.replace(setup.experiment, optim=dataclasses.replace(optim, qk_clip=threshold))
    step, state, rows = make_step(experiment, loss_fn), fresh(experiment, setup.params), []
    for _ in range(steps):
        state, metrics = step(state, setup.batches[0])
        rows.append({name: value.item() for name, value in metrics.items()})
    return rows


def test_muonclip_lowers_the_loss_and_clips_only_heads_with_logits_too_large(setup):
    free = muonclip_metrics(setup, 1e4, steps=4)
    assert free[-1]["loss"] < free[0]["loss"] - 0.1
    assert all(row["heads_clipped"] == 0 and row["bad"] == 0 for row in free)
    largest = free[0]["max_logit"]
    held = muonclip_metrics(setup, largest / 2, steps=2)
    assert held[0]["max_logit"] == largest and held[0]["heads_clipped"] > 0
    assert held[1]["max_logit"] < free[1]["max_logit"]
