"""Attention over a sequence that is shared out over the `context` axis of the mesh (K2.5 §3.3, long context).

Each device has a stripe of the sequence, places i, i + n, i + 2 n, ..., so that under a causal mask all have as much to do.
What is gathered is MLA's latent, one vector a token, not keys and values, which are expanded from it a few heads at a time.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from k25_jax.kernels.attention import attention
from k25_jax.models.masters import cast_from, product
from k25_jax.sharding.rules import row_axes

HEADS = 1  # whose keys and values are held at once; more would only take memory, for a block of one has work enough


def context_shares() -> int:
    """Over how many devices the mesh in use (jax.set_mesh) shares out a sequence."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


@jax.named_scope("attention.context")
def attend_over_context(p, q_BLHK, c_BLR, r_BLK, segments_BL, scale: float):
    """Causal attention of striped rows: (out_BLHK, the largest logit of each head).

    `p` has the expansions k_b and v_b; q_BLHK holds both parts of the query, c_BLR the latents, r_BLK the rotary keys.
    """

    def body(k_b_RHK, v_b_RHK, q_BLHK, c_BLR, r_BLK, segments_BL):
        c_BSR, r_BSK, segments_BS = _wide(c_BLR), _wide(r_BLK), _in_order(segments_BL)
        first, heads = jax.lax.axis_index("context"), q_BLHK.shape[2]
        held = HEADS if heads % HEADS == 0 else heads

        @jax.checkpoint
        def some_heads(piece):
            q_BLGK, k_b_RGK, v_b_RGK = piece
            c, r = (a.astype(q_BLGK.dtype) for a in (c_BSR, r_BSK))
            r_BSGK = jnp.broadcast_to(r[:, :, None], (*r.shape[:2], held, r.shape[-1]))
            k_BSGK = jnp.concatenate([product("bsr,rgk->bsgk", c, k_b_RGK), r_BSGK], axis=-1)
            v_BSGK = product("bsr,rgk->bsgk", c, v_b_RGK)
            return attention(q_BLGK, k_BSGK, v_BSGK, segments_BS, scale=scale, causal=True, first=first)

        by_head = lambda a: rearrange(a, "... (n g) k -> n ... g k", g=held)  # noqa: E731
        pieces = jax.tree.map(by_head, (q_BLHK, k_b_RHK, v_b_RHK))
        out, top_NG = jax.lax.map(some_heads, pieces)
        top_H = jax.lax.pmax(jax.lax.stop_gradient(top_NG.reshape(-1)), ("context", *rows))
        return rearrange(out, "n ... g k -> ... (n g) k"), top_H

    k_b, v_b = (cast_from(p[name], q_BLHK.dtype) for name in ("k_b", "v_b"))
    rows = row_axes(len(q_BLHK))
    whole, stripe = PartitionSpec(), PartitionSpec(rows, "context")
    return jax.shard_map(
        body,
        in_specs=(whole, whole, stripe, stripe, stripe, stripe),
        out_specs=(stripe, whole),
        axis_names={"context", *rows},
        check_vma=False,
    )(k_b, v_b, q_BLHK, c_BLR, r_BLK, segments_BL)


def _in_order(a_BL):
    """The stripes of all devices, in natural order."""
    a_BLN = jax.lax.all_gather(a_BL, "context", axis=2)
    return a_BLN.reshape(len(a_BL), -1, *a_BL.shape[2:])


@jax.custom_vjp
def _wide(a_BLR):
    """`_in_order`, in float32: gradients of all heads, and of all devices, are added up."""
    return _in_order(a_BLR).astype(jnp.float32)


def _wide_backward(like, da_BSR):
    da_BLNR = da_BSR.reshape(len(da_BSR), -1, jax.lax.axis_size("context"), *da_BSR.shape[2:])
    return (jax.lax.psum_scatter(da_BLNR, "context", scatter_dimension=2).astype(like.dtype),)


_wide.defvjp(lambda a_BLR: (_wide(a_BLR), jnp.zeros((), a_BLR.dtype)), _wide_backward)
