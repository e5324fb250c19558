"""Attention with its gradients at MLA's widths (queries and keys 192, values 128), packed rows, against cuDNN's and others.

cuDNN takes a mask as a bias it reads, so beside the packed rows stands one document a row, which needs none. What a peer
does not take as it is, it gets padded: values, then all, to a width that it takes. Rates count causal scores alone.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_gpu.kernels import segments
from benchmarks.on_gpu.run import Run, difference, peak_flops, seconds
from k25_jax.kernels.attention import attention

SHAPES = {"4k": (4, 4096, 16), "16k": (1, 16384, 16)}  # rows, length, heads
SMALL = {"minute": (1, 64, 2)}
WIDTHS, SCALE = (192, 128), 192**-0.5
PADDED = (WIDTHS, (192, 192), (256, 256), (128, 128))  # queries and keys, values; the last leaves a part of 192 out
AGREES = 0.03  # results of a peer and of ours, both in bfloat16


def run(run: Run) -> None:
    """A line for each length, one or several documents a row, and each peer."""
    for name, shape in (SMALL if run.small else SHAPES).items():
        for packed in (True,) if run.small else (False, True):
            label = f"attention_{name}_{'packed' if packed else 'whole'}"
            run.attempt(label, measure, run, label, shape, packed, seconds=2 if run.small else 15)


def measure(run: Run, label: str, shape, packed: bool) -> None:
    """Ours and the peers that run, in turns; of the others their words. A peer that differs from ours is a failure."""
    rows, length, heads = shape
    keys, widths = jax.random.split(jax.random.key(0), 4), (*WIDTHS[:1] * 2, *WIDTHS[1:] * 2)
    shapes = [(rows, length, heads, width) for width in widths]
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    cuts = segments(np.random.default_rng(0), rows, length) if packed else np.ones((rows, length), np.int32)
    segments_BL = jnp.asarray(cuts)
    ours = both(lambda q, k, v: attention(q, k, v, segments_BL, scale=SCALE, causal=True)[0], *arrays)
    found = {peer: working(peer, *arrays, segments_BL if packed else None) for peer in PEERS}
    sides = {"ours": ours} | {peer: call for peer, (call, _, _) in found.items() if call}
    taken = seconds(sides, rounds=1 if run.small else 3)
    flops = (
        rows * heads * length**2 * (4 * WIDTHS[0] + 3 * WIDTHS[1])
    )  # two products forward, five backward, half of each
    rates, peak = {side: flops / duration / 1e12 for side, duration in taken.items()}, peak_flops()
    more = dict(dtype="bfloat16", shape=list(shape), of_peak=peak and rates["ours"] * 1e12 / peak)
    for peer, (call, widths, words) in found.items():
        if call:
            off = difference(ours()[0], call()[0][..., : WIDTHS[1]]) if widths != PADDED[-1] else None
            ok = None if off is None or off <= AGREES else False
            more |= dict(ratio=rates["ours"] / rates[peer], ok=ok, difference=off, peer_widths=list(widths))
        line = dict(peer=peer, peer_value=rates.get(peer), **({} if call else {"peer_error": words}))
        run.line(f"{label}_{peer}", rates["ours"], "TFLOP/s", **(line | more))
        more = {key: more[key] for key in ("dtype", "shape", "of_peak")}


def both(function, q, k, v, dout):
    """A call without arguments: (result, gradients)."""

    @jax.jit
    def run(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(dout)

    return functools.partial(run, q, k, v, dout)


def working(peer: str, q, k, v, dout, segments_BL):
    """(call, widths, "") of the first of PADDED that runs, or (None, None, why none did)."""
    words = []
    for widths in PADDED:
        to = [*widths[:1] * 2, *widths[1:] * 2]
        arrays = [resized(a, width) for a, width in zip((q, k, v, dout), to, strict=True)]
        try:
            call = both(functools.partial(PEERS[peer], segments_BL), *arrays)
            jax.block_until_ready(call())
            return call, widths, ""
        except Exception as error:
            words.append(f"{widths}: {type(error).__name__}: {error}"[:250])
            if isinstance(error, ModuleNotFoundError) or "RESOURCE_EXHAUSTED" in str(error):
                break
    return None, None, "; ".join(words)


def resized(a, width: int):
    """The last axis cut, or padded with zeros, to a width."""
    return jnp.pad(a[..., :width], [(0, 0)] * (a.ndim - 1) + [(0, max(width - a.shape[-1], 0))])


def jax_nn(implementation: str, segments_BL, q, k, v):
    mask = None if segments_BL is None else (segments_BL[:, None, :, None] == segments_BL[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=SCALE, is_causal=True, implementation=implementation)


def tokamax(segments_BL, q, k, v):
    module = importlib.import_module("tokamax")
    mask = None if segments_BL is None else (segments_BL[:, None, :, None] == segments_BL[:, None, None, :])
    return module.dot_product_attention(q, k, v, mask=mask, scale=SCALE, is_causal=True)


PEERS = {"cudnn": functools.partial(jax_nn, "cudnn"), "xla": functools.partial(jax_nn, "xla"), "tokamax": tokamax}
