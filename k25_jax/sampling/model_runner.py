"""The engine's compiled programs: one step over decoding rows and pieces of prompts, and the encoding of images.

A step takes B decoding rows and P pieces of C tokens of prompts from each of Z devices (sampling/layout.py). They are one
list of T = B + P C tokens everywhere but in attention; what is not filled is padding, so that shapes always divide. A
device draws N = B + P tokens: one a row, and one for a piece that ends a prompt. A drawn token stays on the device for
the step after, so that the next step is sent off before this one's tokens are read.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from k25_jax.config import K25Config
from k25_jax.kernels.paged_attention import paged_attention
from k25_jax.models import decoder
from k25_jax.models.k25 import cast, splice, vision_features
from k25_jax.models.rope import softmax_scale
from k25_jax.runtime.waiting import waiting
from k25_jax.sampling.latent_cache import page_pools
from k25_jax.sampling.layout import Layout
from k25_jax.sampling.requests import EngineConfig, EngineError
from k25_jax.sampling.sample import keep_top_p
from k25_jax.sharding.rules import ENGINE_AXES, engine_laid
from k25_jax.vision.patchpack import blank_pack


class Plan(NamedTuple):
    """What a step computes; numpy arrays. A row that is not used has place -1, a piece length 0."""

    slots_ZB: np.ndarray  # which slot's last token a row reads
    positions_ZB: np.ndarray  # the place of that token
    tables_ZBW: np.ndarray  # the pages of each row
    tokens_ZPC: np.ndarray
    media_ZPC: np.ndarray  # row in the buffer of features, -1 where a token is text
    starts_ZP: np.ndarray  # place of a piece's first token
    lengths_ZP: np.ndarray
    tables_ZPW: np.ndarray
    targets_ZN: np.ndarray  # slot that a drawn token is kept for; the number of slots where none is wanted
    seeds_ZN: np.ndarray  # uint32
    samples_ZN: np.ndarray
    temperatures_ZN: np.ndarray
    top_p_ZN: np.ndarray
    alternatives_Z: np.ndarray  # bool: whether any request wants them


class State(NamedTuple):
    """What stays on the devices from step to step."""

    pools: list  # (c_ZQOR, r_ZQOK) a layer
    last_ZX: jax.Array  # the last token of each slot
    features_MD: jax.Array | None  # encoded images, a device some columns of all; None for a model that sees none


class Drawn(NamedTuple):
    """Tokens and log-probabilities, and the likeliest tokens beside them."""

    tokens_ZN: jax.Array
    logprobs_ZN: jax.Array
    likeliest_ZNK: jax.Array
    likeliest_logprobs_ZNK: jax.Array


def empty_plan(share: EngineConfig, devices: int, rows: int, pieces: int, width: int) -> Plan:
    """A plan of this shape, on each device, that computes nothing; tables are `width` pages long."""
    slots, drawn = share.rows[-1], rows + pieces
    ints = lambda *shape: np.zeros((devices, *shape), np.int32)  # noqa: E731
    return Plan(
        slots_ZB=ints(rows), positions_ZB=ints(rows) - 1, tables_ZBW=ints(rows, width),
        tokens_ZPC=ints(pieces, share.piece), media_ZPC=ints(pieces, share.piece) - 1, starts_ZP=ints(pieces),
        lengths_ZP=ints(pieces), tables_ZPW=ints(pieces, width), targets_ZN=ints(drawn) + slots,
        seeds_ZN=ints(drawn).astype(np.uint32), samples_ZN=ints(drawn), temperatures_ZN=ints(drawn).astype(np.float32),
        top_p_ZN=np.ones((devices, drawn), np.float32), alternatives_Z=np.zeros(devices, bool),
    )  # fmt: skip


def fresh_state(config: K25Config, share: EngineConfig, devices: int, sees: bool) -> State:
    """An empty cache and buffer; `sees` says whether there is a vision encoder."""
    dtype, features_MD = jnp.dtype(share.dtype), None
    if sees and share.vision_patches:
        features_MD = jnp.zeros((share.vision_tokens, config.text.d_model), dtype)
    pools = page_pools(config.text, devices, share.pages, share.page_size, dtype)
    return State(pools, jnp.zeros((devices, share.rows[-1]), jnp.int32), features_MD)


def state_layout(state: State, layout: Layout) -> State:
    """The shapes of a state with their layouts: a device has its own pages and slots, and some columns of the features."""
    own, features_MD = layout.abstract(state._replace(features_MD=None), ENGINE_AXES), state.features_MD
    return own if features_MD is None else own._replace(features_MD=layout.abstract(features_MD, None, ENGINE_AXES))


def lower_step(config: K25Config, alternatives: int, layout: Layout, params, state: State, plan: Plan):
    """The program of a step, lowered; `params` and `state` are as they lie, and may be shapes."""
    body = functools.partial(_step, config=config, alternatives=alternatives)
    return _lower(body, layout, params, state, layout.abstract(plan, ENGINE_AXES))


def lower_encode(config: K25Config, dtype, layout: Layout, params, state: State, pack, rows_M):
    """The program that encodes a pack of images, lowered."""
    body = functools.partial(_encode, config=config, dtype=dtype)
    return _lower(body, layout, params, state, *layout.abstract((pack, rows_M)))


def _lower(body, layout: Layout, params, state: State, *arguments):
    results = None if layout.mesh is None else (layout.spread(), jax.tree.map(lambda a: a.sharding, state))
    with contextlib.nullcontext() if layout.mesh is None else jax.set_mesh(layout.mesh):
        return jax.jit(body, donate_argnums=1, out_shardings=results).lower(params, state, *arguments)


class ModelRunner:
    """Weights, cache and the programs over them, each compiled once: ahead of its first use, or in it.

    `share` are the sizes that each device of the layout has.
    """

    def __init__(self, params, config: K25Config, share: EngineConfig, layout: Layout, width: int):
        self.config, self.share, self.layout, self.width = config, share, layout, width
        self.dtype = jnp.dtype(share.dtype)
        self._programs: dict[tuple, Future] = {}
        self._lock = threading.Lock()
        self._kinds = self._kinds_of(params)
        self.params = layout.weights(params, config, self.dtype)
        make = functools.partial(fresh_state, config, share, layout.devices, "vision" in params)
        self._abstract = state_layout(jax.eval_shape(make), layout)
        self._state = jax.jit(make, out_shardings=jax.tree.map(lambda a: a.sharding, self._abstract))()

    @property
    def compilations(self) -> int:
        """Programs that were compiled so far."""
        return sum(program.done() for program in list(self._programs.values()))

    @property
    def sees(self) -> bool:
        """Whether images can be encoded."""
        return self._state.features_MD is not None

    @property
    def cache_bytes(self) -> int:
        """What the cache takes on all devices."""
        return sum(a.nbytes for a in jax.tree.leaves(self._state.pools))

    def prepared(self, params):
        """A copy of other weights of the same model, to take the place of `params`; EngineError for those of another."""
        if self._kinds_of(params) != self._kinds:
            raise EngineError("the new weights are of another model: their names or shapes differ")
        new = self.layout.weights(params, self.config, self.dtype)
        return jax.tree.map(lambda a, old: jax.device_put(a, old.sharding), new, self.params)

    def warm_up(self) -> Iterator[str]:
        """Compile all programs, those first that a first request needs; says what comes next before each.

        Another thread may call this while steps run: a step that needs a program which is being compiled waits for it.
        """
        first, *more = self.share.rows
        shapes = [(first, pieces) for pieces in (*self.share.pieces, 0)]
        for rows, pieces in shapes:
            yield from self._ahead(*self._step_program(self.empty_plan(rows, pieces)))
        for patches in self.share.vision_patches if self.sees else ():
            pack = blank_pack(1, patches, self.config.vision.patch_dim, np.uint8)
            yield from self._ahead(
                *self._encode_program(pack, np.full(patches // self.config.vision.group, -1, np.int32))
            )
        for rows in more:
            for pieces in (0, *self.share.pieces):
                yield from self._ahead(*self._step_program(self.empty_plan(rows, pieces)))

    def empty_plan(self, rows: int, pieces: int) -> Plan:
        """A plan of this shape, on each device, that computes nothing."""
        return empty_plan(self.share, self.layout.devices, rows, pieces, self.width)

    def step(self, plan: Plan) -> Drawn:
        """Run a step; returns at once, the result may still be on its way."""
        drawn, self._state = self._run(*self._step_program(plan))
        return drawn

    def encode(self, pack, rows_M: np.ndarray) -> None:
        """Features of a pack of images into rows rows_M of the buffer; -1 where a token of the pack is not wanted."""
        _, self._state = self._run(*self._encode_program(pack, rows_M))

    def _step_program(self, plan: Plan):
        """(name, how to lower it, arguments) of a step."""
        lower = functools.partial(lower_step, self.config, self.share.alternatives)
        return ("step", plan.positions_ZB.shape[1], plan.lengths_ZP.shape[1]), lower, plan

    def _encode_program(self, pack, rows_M: np.ndarray):
        lower = functools.partial(lower_encode, self.config, self.dtype)
        return ("encode", *pack.patches_PNC.shape[:2], pack.patches_PNC.dtype.str), lower, pack, rows_M

    def _run(self, name, lower, *arguments):
        return self._program(name, lower, *arguments)(self.params, self._state, *arguments)

    def _ahead(self, name, lower, *arguments) -> Iterator[str]:
        if name not in self._programs:
            yield self._title(name)
            self._program(name, lower, *arguments)

    def _program(self, name, lower, *arguments):
        """The compiled program; whoever asks first compiles it, others wait."""
        with self._lock:
            program, mine = self._programs.get(name), name not in self._programs
            if mine:
                program = self._programs[name] = Future()
        if mine:
            try:
                with waiting(f"compiling {self._title(name)}"):
                    program.set_result(lower(self.layout, self.params, self._abstract, *arguments).compile())
            except BaseException as problem:
                del self._programs[name]
                program.set_exception(problem)
                raise
        return program.result()

    def _kinds_of(self, params):
        return jax.eval_shape(lambda p: cast(p, self.dtype), params)

    def _title(self, name: tuple) -> str:
        """What a program does, for whoever waits for it."""
        kind, first, second, *_ = name
        if kind != "step":
            return f"{second} patches of images"
        return f"a step of {first * self.layout.devices} answers and {second * self.layout.devices} pieces of prompts"


def _each(function):
    """`function` of a device's part of arrays with the axis Z, which it sees without that axis, on every device."""

    def body(*arguments):
        out = function(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], out)

    if jax.sharding.get_abstract_mesh().empty:
        return body
    own = PartitionSpec(ENGINE_AXES)
    return jax.shard_map(body, in_specs=own, out_specs=own, check_vma=False)


def _step(params, state: State, plan: Plan, *, config: K25Config, alternatives: int):
    tokens_ZT, media_ZT, positions_ZT = _each(_tokens)(state.last_ZX, plan)
    scale = softmax_scale(config.text)
    by_heads = lambda a_ZTHR: engine_laid(a_ZTHR, "expert", None, "tensor")  # noqa: E731 - as the matrices lie

    def write(pool, new):
        return _each(_write)(pool, new, plan, positions_ZT)

    def attend(q_ZTHR, q_ZTHK, pool):
        q_ZTHR, q_ZTHK = (by_heads(q) for q in (q_ZTHR, q_ZTHK))
        return by_heads(_each(functools.partial(_attend, scale=scale))(q_ZTHR, q_ZTHK, pool, plan, positions_ZT))

    x_ZTD = splice(params, engine_laid(tokens_ZT, "expert"), engine_laid(media_ZT), state.features_MD, config)
    x_ZTD = engine_laid(x_ZTD, ENGINE_AXES)
    x_ZTD, pools = decoder.paged_step(params, x_ZTD, state.pools, positions_ZT, write, attend, config.text)
    x_ZND, places_ZN = _each(_picked)(x_ZTD, plan, positions_ZT)
    logits_ZNV = engine_laid(decoder.logits(params, engine_laid(x_ZND, "expert")), "expert", None, "tensor")
    drawn = _each(functools.partial(draw, alternatives=alternatives))(logits_ZNV, places_ZN, plan)
    put = lambda last_X, targets_N, tokens_N: last_X.at[targets_N].set(tokens_N, mode="drop")  # noqa: E731
    last_ZX = _each(put)(state.last_ZX, plan.targets_ZN, drawn.tokens_ZN)
    return drawn, State(pools, last_ZX, state.features_MD)


# What follows is of one device: arrays of a plan have no axis Z.
def _tokens(last_X, plan: Plan):
    """Its tokens, rows before pieces: (tokens_T, media_T, positions_T)."""
    rows, offsets_C = len(plan.positions_ZB), jnp.arange(plan.tokens_ZPC.shape[1])
    positions_PC = jnp.where(offsets_C < plan.lengths_ZP[:, None], plan.starts_ZP[:, None] + offsets_C, -1)
    return (
        jnp.concatenate([last_X[plan.slots_ZB], plan.tokens_ZPC.reshape(-1)]),
        jnp.concatenate([jnp.full(rows, -1, jnp.int32), plan.media_ZPC.reshape(-1)]),
        jnp.concatenate([plan.positions_ZB, positions_PC.reshape(-1)]),
    )


def _parts(plan: Plan, positions_T):
    """(tables_BW, positions_BL) of its rows and of its pieces."""
    rows = len(plan.positions_ZB)
    positions_PC = positions_T[rows:].reshape(plan.tokens_ZPC.shape)
    return (plan.tables_ZBW, positions_T[:rows, None]), (plan.tables_ZPW, positions_PC)


def _write(pool, new, plan: Plan, positions_T):
    """Latents of the new tokens into their pages; nowhere where there is no token."""
    pages, size = pool[0].shape[:2]
    pages_T = jnp.concatenate([_pages(*part, size, pages).reshape(-1) for part in _parts(plan, positions_T)])
    return tuple(a.at[pages_T, positions_T % size].set(b, mode="drop") for a, b in zip(pool, new, strict=True))


def _pages(tables_BW, positions_BL, size: int, pages: int):
    """The page of each token; the number of pages, which is none of them, where there is no token."""
    pages_BL = jnp.take_along_axis(tables_BW, jnp.maximum(positions_BL, 0) // size, axis=1)
    return jnp.where(positions_BL >= 0, pages_BL, pages)


def _attend(q_THR, q_THK, pool, plan: Plan, positions_T, *, scale: float):
    outs, at = [], 0
    for tables_BW, positions_BL in _parts(plan, positions_T):
        if count := positions_BL.size:
            q = (a[at : at + count].reshape(*positions_BL.shape, *a.shape[1:]) for a in (q_THR, q_THK))
            out_BLHR = paged_attention(*q, *pool, tables_BW, positions_BL, scale)
            outs.append(out_BLHR.reshape(count, *out_BLHR.shape[2:]))
        at += count
    return jnp.concatenate(outs)


def _picked(x_TD, plan: Plan, positions_T):
    """The tokens behind which one is drawn, and the places of those: all rows, and the last token of each piece."""
    rows, (pieces, size) = len(plan.positions_ZB), plan.tokens_ZPC.shape
    ends_P = rows + jnp.arange(pieces) * size + jnp.maximum(plan.lengths_ZP - 1, 0)
    picked_N = jnp.concatenate([jnp.arange(rows), ends_P])
    return x_TD[picked_N], positions_T[picked_N] + 1


def draw(logits_NV, places_N, plan: Plan, alternatives: int) -> Drawn:
    """A token a row by its own temperature, top-p and key; log-probabilities are those of the unmodified distribution."""
    logprobs_NV = jax.nn.log_softmax(logits_NV)
    greedy_N = logits_NV.argmax(axis=-1).astype(jnp.int32)

    def sampled():
        scaled_NV = logits_NV / jnp.where(plan.temperatures_ZN > 0, plan.temperatures_ZN, 1)[:, None]
        kept_NV = keep_top_p(scaled_NV, plan.top_p_ZN[:, None])
        tokens_N = jax.vmap(_categorical)(plan.seeds_ZN, plan.samples_ZN, places_N, kept_NV)
        return jnp.where(plan.temperatures_ZN > 0, tokens_N, greedy_N)

    tokens_N = jax.lax.cond((plan.temperatures_ZN > 0).any(), sampled, lambda: greedy_N)
    none = jnp.zeros((len(greedy_N), alternatives))
    likeliest_NK, numbers_NK = jax.lax.cond(
        plan.alternatives_Z,
        lambda: tuple(jax.lax.top_k(logprobs_NV, alternatives)),
        lambda: (none, none.astype(jnp.int32)),
    )
    chosen_N = jnp.take_along_axis(logprobs_NV, tokens_N[:, None], axis=-1)[:, 0]
    return Drawn(tokens_N, chosen_N, numbers_NK, likeliest_NK)


def _categorical(seed, sample, place, logits_V):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), place)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


def _encode(params, state: State, pack, rows_M, *, config: K25Config, dtype):
    features_MD = vision_features(params, pack, config, dtype=dtype).astype(state.features_MD.dtype)
    rows_M = jnp.where(rows_M < 0, len(state.features_MD), rows_M)
    return None, state._replace(features_MD=state.features_MD.at[rows_M].set(features_MD, mode="drop"))
