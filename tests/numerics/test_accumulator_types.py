"""The contract of numbers, read from the traced program of a bfloat16 training step.

Scores of attention, of the router and of the vocabulary come out of their products in float32; long sums, statistics of
norms and the exponentials of a softmax are float32; gradients of weights leave their product in float32, and so are they
added up from turn to turn of a loop. Arrays are told by sizes that nothing else has. What breaks the contract is listed with
its place in the source. The products of Newton-Schulz, whose dtype is an option (optim.muon_dtype), are not looked at.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import source_info_util
from jax.extend.core import Literal

import programs
from k25_jax.config import (
    DataConfig,
    Experiment,
    K25Config,
    MoEConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from k25_jax.data.packing import make_example, pack_examples, with_samples
from k25_jax.models import masters
from k25_jax.models.k25 import abstract_params
from k25_jax.train.stages import loss_of
from k25_jax.train.state import abstract_state
from k25_jax.train.step import make_step
from k25_jax.vision.patchpack import Clip

LONG = 24  # terms of a sum from which on it is a long one
VOCABULARY, EXPERTS, LENGTH, PATCHES = 263, 13, 46, 68
NARROW = jnp.bfloat16
SUMS = {"reduce_sum", "cumsum", "reduce_window_sum", "cumlogsumexp", "reduce_prod"}
STATISTICS = {"log", "rsqrt", "sqrt"}  # of norms and normalisers
SAME = {"convert_element_type", "copy", "reshape", "optimization_barrier"}  # of which a sum stays the sum that it is

MODEL = K25Config(
    text=TextConfig(
        vocab_size=VOCABULARY, d_model=40, layers=3, dense_layers=1, ffn_dim=36, heads=2, q_lora_rank=10,
        kv_lora_rank=14, qk_nope_dim=6, qk_rope_dim=4, v_dim=9, max_length=64,
        moe=MoEConfig(experts=EXPERTS, top_k=3, ffn_dim=28),
    ),
    vision=VisionConfig(layers=2, width=32, heads=2, mlp_dim=44, patch_size=4, pos_height=3, pos_width=3),
    media_pad_id=260, media_begin_id=261, media_end_id=262,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the rules
def violations(jaxpr, weights=()) -> list[str]:
    """What of a program is added up or scored in bfloat16; `weights` are the shapes whose gradients loops add up."""
    found = []
    for eqn, inside in programs.equations(jaxpr):
        fault = _fault(eqn, set(weights))
        if fault:
            where = source_info_util.summarize(eqn.source_info)
            found.append(f"{where}: {fault} (in {' > '.join(inside) or 'the step itself'})")
    return sorted(set(found))


def _fault(eqn, weights) -> str:
    name, out = eqn.primitive.name, [v.aval for v in eqn.outvars]
    if name in ("scan", "while"):
        return _narrow_sums(eqn, weights)
    operand = next((v.aval for v in eqn.invars if hasattr(v.aval, "dtype")), None)
    if operand is None or operand.dtype != NARROW:
        return ""
    if name == "dot_general" and out[0].dtype == NARROW:
        if kind := _kind_of_scores(out[0].shape):
            return f"scores of {kind} {out[0].shape} in bfloat16"
        if out[0].ndim > 1 and out[0].shape in weights:
            return f"a gradient of weights {out[0].shape} leaves its product in bfloat16"
        if eqn.invars[0] is eqn.invars[1] and out[0].ndim < operand.ndim:
            return f"a sum of squares {out[0].shape} in bfloat16"
    if name in SUMS and _terms(eqn, operand) >= LONG:
        return f"{name} of {_terms(eqn, operand)} terms in bfloat16, {operand.shape}"
    if name in ("scatter-add", "scatter_add") and not eqn.params["unique_indices"]:
        return f"{name} in bfloat16, {operand.shape}"
    if name in STATISTICS or name == "exp" and _kind_of_scores(operand.shape):
        return f"{name} in bfloat16, {operand.shape}"
    return ""


def _kind_of_scores(shape) -> str:
    if shape[-1:] == (VOCABULARY,):
        return "the vocabulary"
    if shape[-1:] == (EXPERTS,):
        return "the router"
    return "attention" if len(shape) > 2 and shape[-2:] in ((LENGTH, LENGTH), (PATCHES, PATCHES)) else ""


def _terms(eqn, operand) -> int:
    if "axes" in eqn.params:
        return int(np.prod([operand.shape[axis] for axis in eqn.params["axes"]], dtype=int))
    return operand.shape[eqn.params["axis"]] if "axis" in eqn.params else int(np.prod(eqn.params["window_dimensions"]))


def _narrow_sums(eqn, weights) -> str:
    """Where a loop adds to something in bfloat16 that has the shape of a weight, turn by turn."""
    if eqn.primitive.name == "scan":
        body, first, count = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"], eqn.params["num_carry"]
    else:
        body, first = eqn.params["body_jaxpr"].jaxpr, eqn.params["body_nconsts"]
        count = len(body.outvars)
    made_by = {v: inner for inner in body.eqns for v in inner.outvars}

    def origin(v):
        while v in made_by and made_by[v].primitive.name in SAME:
            v = made_by[v].invars[0]
        return v

    found = []
    for before, after in zip(body.invars[first : first + count], body.outvars[:count], strict=True):
        last = None if isinstance(after, Literal) else made_by.get(origin(after))
        adds = last is not None and last.primitive.name in ("add", "add_any")
        if adds and before.aval.dtype == NARROW and before.aval.shape in weights:
            if any(origin(v) is before for v in last.invars if not isinstance(v, Literal)):
                found.append(before.aval.shape)
    return f"{eqn.primitive.name} adds up gradients of weights in bfloat16, {found}" if found else ""


def shapes_of_weights(params) -> set[tuple[int, ...]]:
    """Those of all matrices, whole and one layer, or one layer and expert, of a stack."""
    whole = {a.shape for a in jax.tree.leaves(params)}
    return {shape[cut:] for shape in whole for cut in range(len(shape) - 1)}


# ------------------------------------------------------------------------------------------------------------- the step
def batch_of(rows: int):
    """Rows of text with an image in each."""
    rng, examples = np.random.default_rng(0), []
    for _ in range(rows):
        clip = Clip(rng.integers(0, 256, (32, MODEL.vision.patch_dim)).astype(np.uint8), (1, 8, 4))
        tokens = [5, MODEL.media_pad_id, *rng.integers(0, 250, 30).tolist()]
        examples.append(make_example(tokens, [1.0] * len(tokens), [clip], MODEL.media_pad_id))
    data = DataConfig(batch_size=rows, seq_len=LENGTH, packs=rows, pack_patches=PATCHES)
    return pack_examples(examples, data, MODEL)


@pytest.mark.parametrize(
    "accumulate, remat, stage", [(1, "none", "pretrain"), (2, "full", "pretrain"), (2, "full", "rl")]
)
def test_a_bfloat16_step_scores_and_adds_up_in_float32(monkeypatch, accumulate, remat, stage):
    monkeypatch.setattr(masters, "platform", lambda: "tpu")  # on a CPU gradients are products of float32 anyway
    train = TrainConfig(compute_dtype="bfloat16", accumulate=accumulate, remat=remat)
    optim = OptimConfig(name="muonclip", muon_dtype="float32")
    experiment = Experiment(model=MODEL, stage=stage, optim=optim, train=train)
    batch = with_samples(batch_of(4)) if stage == "rl" else batch_of(4)
    traced = jax.make_jaxpr(make_step(experiment, loss_of(experiment)))(abstract_state(experiment), batch)
    assert any(eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.dtype == NARROW
               for eqn, _ in programs.equations(traced)), "nothing is computed in bfloat16"  # fmt: skip
    found = violations(traced, shapes_of_weights(abstract_params(MODEL)))
    assert not found, "\n".join(["", *found])


# ----------------------------------------------------------------------------------------------------- that rules find
X, W = jnp.ones((3, LENGTH, 8), NARROW), jnp.ones((8, 16), NARROW)


def carried(x):
    """The gradient of W added up over the rows, in bfloat16."""
    add = lambda dw, row: (dw + row.T @ row[:, :1], None)  # noqa: E731
    return jax.lax.scan(add, jnp.zeros((8, 16), NARROW), x)[0]


FAULTS = {
    "scores of attention": lambda x: jnp.einsum("blk,bsk->bls", x, x),
    "scores of the vocabulary": lambda x: x @ jnp.ones((8, VOCABULARY), NARROW),
    "scores of the router": lambda x: jax.jit(lambda x: x @ jnp.ones((8, EXPERTS), NARROW))(x),
    "a sum of squares": lambda x: jnp.einsum("bld,bld->bl", x, x),
    "reduce_sum of 138 terms": jax.grad(lambda b: (X + b).astype(jnp.float32).sum()),
    "scatter-add": jax.grad(lambda w: jax.checkpoint(lambda w: jnp.sin(w[jnp.zeros(LENGTH, int)]).sum())(w)),
    "rsqrt": lambda x: jax.lax.map(jax.lax.rsqrt, x),
    "exp": lambda x: jax.lax.cond(True, jnp.exp, jnp.sin, jnp.ones((2, LENGTH, LENGTH), NARROW)),
    "scan adds up": carried,
    "while adds up": lambda x: jax.lax.fori_loop(0, jnp.int32(x[0, 0, 0]), lambda i, dw: dw + W, W),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_rule_finds_its_fault_wherever_it_hides(fault):
    argument = {"scatter-add": W, "reduce_sum of 138 terms": X[0, 0], "scan adds up": X}.get(fault, X)
    found = violations(jax.make_jaxpr(FAULTS[fault])(argument), {(8, 16)})
    assert len(found) >= 1 and all(fault in one for one in found), found


def test_rules_leave_products_and_short_sums_alone():
    def fine(x):
        hidden = jax.nn.silu(x @ W)
        scores = jnp.einsum("blk,bsk->bls", x, x, preferred_element_type=jnp.float32)
        return (
            hidden.sum(),
            jax.nn.softmax(scores),
            x[..., :3].sum(axis=-1),
            jnp.zeros((5, 8), NARROW).at[:3].set(x[0, :3]),
        )

    assert violations(jax.make_jaxpr(fine)(X), {(8, 16)}) == []
