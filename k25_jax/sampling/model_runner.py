"""The engine's compiled programs: one step over decoding rows and pieces of prompts, and the encoding of images.

A step takes B decoding rows and P pieces of C tokens of prompts. They are one list of T = B + P C tokens everywhere but in
attention. It draws N = B + P tokens: one a row, and one for a piece that ends a prompt. A drawn token stays on the device
for the step after, so that the next step is sent off before this one's tokens are read.
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
from jax.sharding import NamedSharding, PartitionSpec

from k25_jax.config import K25Config
from k25_jax.kernels.paged_attention import paged_attention
from k25_jax.models import decoder
from k25_jax.models.k25 import cast, splice, vision_features
from k25_jax.models.rope import softmax_scale
from k25_jax.runtime.waiting import waiting
from k25_jax.sampling.latent_cache import page_pools
from k25_jax.sampling.requests import EngineConfig, EngineError
from k25_jax.sampling.sample import keep_top_p
from k25_jax.vision.patchpack import blank_pack


class Plan(NamedTuple):
    """What a step computes; numpy arrays. A row that is not used has place -1, a piece length 0."""

    slots_B: np.ndarray  # which slot's last token a row reads
    positions_B: np.ndarray  # the place of that token
    tables_BW: np.ndarray  # the pages of each row
    tokens_PC: np.ndarray
    media_PC: np.ndarray  # row in the buffer of features, -1 where a token is text
    starts_P: np.ndarray  # place of a piece's first token
    lengths_P: np.ndarray
    tables_PW: np.ndarray
    targets_N: np.ndarray  # slot that a drawn token is kept for; the number of slots where none is wanted
    seeds_N: np.ndarray  # uint32
    samples_N: np.ndarray
    temperatures_N: np.ndarray
    top_p_N: np.ndarray
    alternatives: np.ndarray  # bool: whether any request wants them


class State(NamedTuple):
    """What stays on the device from step to step."""

    pools: list  # (c_QOR, r_QOK) a layer
    last_X: jax.Array  # the last token of each slot
    features_MD: jax.Array | None  # encoded images; None for a model that sees none


class Drawn(NamedTuple):
    """Tokens and log-probabilities, and the likeliest tokens beside them."""

    tokens_N: jax.Array
    logprobs_N: jax.Array
    likeliest_NK: jax.Array
    likeliest_logprobs_NK: jax.Array


def empty_plan(settings: EngineConfig, rows: int, pieces: int, width: int) -> Plan:
    """A plan of this shape that computes nothing."""
    slots, drawn = settings.rows[-1], rows + pieces
    ints = functools.partial(np.zeros, dtype=np.int32)
    return Plan(
        slots_B=ints(rows), positions_B=ints(rows) - 1, tables_BW=ints((rows, width)),
        tokens_PC=ints((pieces, settings.piece)), media_PC=ints((pieces, settings.piece)) - 1, starts_P=ints(pieces),
        lengths_P=ints(pieces), tables_PW=ints((pieces, width)), targets_N=ints(drawn) + slots,
        seeds_N=np.zeros(drawn, np.uint32), samples_N=ints(drawn), temperatures_N=np.zeros(drawn, np.float32),
        top_p_N=np.ones(drawn, np.float32), alternatives=np.zeros((), bool),
    )  # fmt: skip


class ModelRunner:
    """Weights, cache and the programs over them, each compiled once: ahead of its first use, or in it.

    In a mesh weights lie as they come, and the cache, which is small beside them, on every device.
    """

    def __init__(self, params, config: K25Config, settings: EngineConfig, width: int):
        self.config, self.settings, self.width = config, settings, width
        self.dtype = jnp.dtype(settings.dtype)
        self._mesh, self._everywhere = _mesh_of(params)
        self._unstack = jax.jit(lambda p: decoder.unstack(cast(p, self.dtype)))
        self._programs: dict[tuple, Future] = {}
        self._lock = threading.Lock()
        self.params = self._lay_out(params)
        self._shapes = jax.tree.map(lambda a: (a.shape, a.dtype), self.params)
        self._state = self._placed(self._fresh_state())
        self._abstract = jax.tree.map(self._abstracted, self._state)

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
        """What the cache takes on a device."""
        return sum(a.nbytes for a in jax.tree.leaves(self._state.pools))

    def replace_params(self, params) -> None:
        """Other weights of the same model, from the next step on; raises EngineError for those of another."""
        new = self._lay_out(params)
        if jax.tree.map(lambda a: (a.shape, a.dtype), new) != self._shapes:
            raise EngineError("the new weights are of another model: their names or shapes differ")
        self.params = jax.tree.map(lambda a, old: jax.device_put(a, old.sharding), new, self.params)

    def warm_up(self) -> Iterator[str]:
        """Compile all programs, those first that a first request needs; says what comes next before each.

        Another thread may call this while steps run: a step that needs a program which is being compiled waits for it.
        """
        first, *more = self.settings.rows
        shapes = [(first, pieces) for pieces in (*self.settings.pieces, 0)]
        for rows, pieces in shapes:
            yield from self._ahead(*self._step_program(empty_plan(self.settings, rows, pieces, self.width)))
        for patches in self.settings.vision_patches if self.sees else ():
            pack = blank_pack(1, patches, self.config.vision.patch_dim, np.uint8)
            yield from self._ahead(
                *self._encode_program(pack, np.full(patches // self.config.vision.group, -1, np.int32))
            )
        for rows in more:
            for pieces in (0, *self.settings.pieces):
                yield from self._ahead(*self._step_program(empty_plan(self.settings, rows, pieces, self.width)))

    def step(self, plan: Plan) -> Drawn:
        """Run a step; returns at once, the result may still be on its way."""
        drawn, self._state = self._run(*self._step_program(plan))
        return drawn

    def encode(self, pack, rows_M: np.ndarray) -> None:
        """Features of a pack of images into rows rows_M of the buffer; -1 where a token of the pack is not wanted."""
        _, self._state = self._run(*self._encode_program(pack, rows_M))

    def _step_program(self, plan: Plan):
        """(name, function, arguments) of a step."""
        body = functools.partial(_step, config=self.config, alternatives=self.settings.alternatives)
        return ("step", len(plan.positions_B), len(plan.lengths_P)), body, plan

    def _encode_program(self, pack, rows_M: np.ndarray):
        body = functools.partial(_encode, config=self.config, dtype=self.dtype)
        return ("encode", *pack.patches_PNC.shape[:2], pack.patches_PNC.dtype.str), body, pack, rows_M

    def _run(self, name, body, *arguments):
        return self._program(name, body, *arguments)(self.params, self._state, *arguments)

    def _ahead(self, name, body, *arguments) -> Iterator[str]:
        if name not in self._programs:
            yield _title(name)
            self._program(name, body, *arguments)

    def _program(self, name, body, *arguments):
        """The compiled program; whoever asks first compiles it, others wait."""
        with self._lock:
            program, mine = self._programs.get(name), name not in self._programs
            if mine:
                program = self._programs[name] = Future()
        if mine:
            try:
                with self._in_mesh(), waiting(f"compiling {_title(name)}"):
                    jitted = jax.jit(body, donate_argnums=1, out_shardings=self._everywhere)
                    program.set_result(jitted.lower(self.params, self._abstract, *arguments).compile())
            except BaseException as problem:
                del self._programs[name]
                program.set_exception(problem)
                raise
        return program.result()

    def _lay_out(self, params):
        with self._in_mesh():
            return self._unstack(params)

    def _in_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _fresh_state(self) -> State:
        settings, features_MD = self.settings, None
        if "vision" in self.params and settings.vision_patches:
            features_MD = jnp.zeros((settings.vision_tokens, self.config.text.d_model), self.dtype)
        pools = page_pools(self.config.text, settings.pages, settings.page_size, self.dtype)
        return State(pools, jnp.zeros(settings.rows[-1], jnp.int32), features_MD)

    def _abstracted(self, array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=None if self._mesh is None else array.sharding)

    def _placed(self, state: State) -> State:
        return state if self._mesh is None else jax.device_put(state, self._everywhere)


def _title(name: tuple) -> str:
    """What a program does, for whoever waits for it."""
    kind, first, second, *_ = name
    return (
        f"a step of {first} answers and {second} pieces of prompts" if kind == "step" else f"{second} patches of images"
    )


def _mesh_of(params):
    """(the mesh that the weights lie in, the layout of what every device of it holds); (None, None) on one device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        return sharding.mesh, NamedSharding(sharding.mesh, PartitionSpec())
    return None, None


def _step(params, state: State, plan: Plan, *, config: K25Config, alternatives: int):
    rows, (pieces, size) = len(plan.positions_B), plan.tokens_PC.shape
    offsets_C = jnp.arange(size)
    positions_PC = jnp.where(offsets_C < plan.lengths_P[:, None], plan.starts_P[:, None] + offsets_C, -1)
    positions_T = jnp.concatenate([plan.positions_B, positions_PC.reshape(-1)])
    tokens_T = jnp.concatenate([state.last_X[plan.slots_B], plan.tokens_PC.reshape(-1)])
    media_T = jnp.concatenate([jnp.full(rows, -1, jnp.int32), plan.media_PC.reshape(-1)])
    parts = (plan.tables_BW, plan.positions_B[:, None]), (plan.tables_PW, positions_PC)
    page_size, pages = state.pools[0][0].shape[1], len(state.pools[0][0])
    pages_T = jnp.concatenate([_pages(*part, page_size, pages).reshape(-1) for part in parts])

    def attend(q_T1HR, q_T1HK, c_QOR, r_QOK):
        outs, at = [], 0
        for tables_BW, positions_BL in parts:
            count, shape = positions_BL.size, (*positions_BL.shape, *q_T1HR.shape[2:])
            if count:
                q = (a[at : at + count].reshape(*positions_BL.shape, *a.shape[2:]) for a in (q_T1HR, q_T1HK))
                out = paged_attention(*q, c_QOR, r_QOK, tables_BW, positions_BL, softmax_scale(config.text))
                outs.append(out.reshape(count, 1, *shape[2:]))
            at += count
        return jnp.concatenate(outs)

    x_TD = splice(params, tokens_T, media_T, state.features_MD, config)
    x_T1D, pools = decoder.paged_step(params, x_TD[:, None], state.pools, positions_T, pages_T, attend, config.text)
    ends_P = rows + jnp.arange(pieces) * size + jnp.maximum(plan.lengths_P - 1, 0)
    picked_N = jnp.concatenate([jnp.arange(rows), ends_P])
    logits_NV = decoder.logits(params, x_T1D[picked_N, 0])
    drawn = draw(logits_NV, positions_T[picked_N] + 1, plan, alternatives)
    last_X = state.last_X.at[plan.targets_N].set(drawn.tokens_N, mode="drop")
    return drawn, State(pools, last_X, state.features_MD)


def _pages(tables_BW, positions_BL, size: int, pages: int):
    """The page of each token; the number of pages, which is none of them, where there is no token."""
    pages_BL = jnp.take_along_axis(tables_BW, jnp.maximum(positions_BL, 0) // size, axis=1)
    return jnp.where(positions_BL >= 0, pages_BL, pages)


def draw(logits_NV, places_N, plan: Plan, alternatives: int) -> Drawn:
    """A token a row by its own temperature, top-p and key; log-probabilities are those of the unmodified distribution."""
    logprobs_NV = jax.nn.log_softmax(logits_NV)
    greedy_N = logits_NV.argmax(axis=-1).astype(jnp.int32)

    def sampled():
        scaled_NV = logits_NV / jnp.where(plan.temperatures_N > 0, plan.temperatures_N, 1)[:, None]
        kept_NV = keep_top_p(scaled_NV, plan.top_p_N[:, None])
        tokens_N = jax.vmap(_categorical)(plan.seeds_N, plan.samples_N, places_N, kept_NV)
        return jnp.where(plan.temperatures_N > 0, tokens_N, greedy_N)

    tokens_N = jax.lax.cond((plan.temperatures_N > 0).any(), sampled, lambda: greedy_N)
    none = jnp.zeros((len(greedy_N), alternatives))
    likeliest_NK, numbers_NK = jax.lax.cond(
        plan.alternatives,
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
