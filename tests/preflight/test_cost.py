"""FLOPs, traffic and collectives against numbers worked out by hand; shared out over eight CPU devices too."""

import functools
import importlib
import json
import types

import jax
import jax.numpy as jnp
import pytest

from k25_jax.config import load_experiment
from k25_jax.kernels.grouped_matmul import TILE, grouped_matmul
from k25_jax.models.count import count_params
from k25_jax.preflight import aot, hlo
from k25_jax.preflight.cost import arrays_made, jaxpr_flops, live, model_flops, roofline, temporaries
from k25_jax.preflight.topology import parse_topology
from runs import on_eight_devices

X = jnp.ones((4, 8))
W = jnp.ones((8, 8))
ONE = 2 * 4 * 8 * 8  # FLOPs of X @ W


def count(function, *arguments, **settings):
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments), **settings)


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]


def looped(x, w):
    return jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, scanned(c[1], w)), (2, x))[1]


CASES = {
    "a product": (lambda x, w: x @ w, ONE),
    "in a scan": (scanned, 5 * ONE),
    "in a scan in a while loop": (looped, 5 * 5 * ONE),
    "in a function": (jax.jit(scanned), 5 * ONE),
    "the dearer branch": (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w), 2 * ONE),
    "batched": (lambda x, w: jnp.einsum("bd,edf->ebf", x, jnp.stack([w, w, w])), 3 * ONE),
    "with both gradients": (jax.grad(lambda x, w: jnp.sin(x @ w).sum(), (0, 1)), 3 * ONE),
    "recomputed": (jax.grad(jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w).sum()), (0, 1)), 8 * ONE),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_counted_as_often_as_they_run(case):
    function, want = CASES[case]
    flops = count(function, X, W)
    assert flops.total == flops.products == want and flops.unknown_loops == 0


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    flops = count(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x @ W, x), 3, X)
    assert flops.total == ONE and flops.unknown_loops == 1


def test_what_no_result_depends_on_does_not_count():
    """As in a layer that is computed again for its gradient alone, in a loop: its last product has no reader."""

    def step(x, _):
        unused, pull = jax.vjp(lambda x: (x @ x) @ x, x)
        return pull(x)[0], None

    jaxpr = jax.make_jaxpr(lambda x: jax.lax.scan(step, x, length=3)[0])(jnp.ones((8, 8)))
    product = 2 * 8**3
    assert jaxpr_flops(jaxpr).total == 3 * 6 * product and jaxpr_flops(live(jaxpr)).total == 3 * 5 * product


def test_arrays_that_a_step_makes():
    """The largest of a scan's body is found, and shared out."""
    made = max(arrays_made(jax.make_jaxpr(scanned)(X, W), devices=2), key=lambda entry: entry[3])
    assert made[1:] == ((4, 8), jnp.float32, 4 * 8 * 4 / 2) and "dot_general" in made[0]


def test_a_convolution():
    image, kernel = jnp.ones((2, 10, 10, 3)), jnp.ones((3, 3, 3, 5))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count(convolve, image, kernel).total == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize("implementation", ["ragged", "megablox"])
def test_groups_count_by_the_rows_that_hold_something(implementation):
    x, w, sizes = jnp.ones((TILE, 8)), jnp.ones((3, 8, 16)), jnp.asarray([50, 0, 14])
    multiply = lambda x, w: grouped_matmul(x, w, sizes, implementation)  # noqa: E731
    one = 2 * TILE * 8 * 16
    assert count(multiply, x, w).total == one
    assert count(jax.grad(lambda x, w: multiply(x, w).sum(), (0, 1)), x, w, filled=0.5).total == 3 * one / 2
    assert (count(multiply, x, w).kernels > 0) == (implementation == "megablox")


def test_what_is_left_of_the_executed_tiles_is_what_the_kernel_plans():
    """The bound of the benchmark: as many tiles of rows as there are, and one more for each border between experts."""
    plan = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm").make_group_metadata
    sizes = jnp.asarray([100, 156, 0, 1, 255])
    _, tiles = plan(group_sizes=sizes, m=512, tm=TILE, start_group=0, num_nonzero_groups=5, visit_empty_groups=False)
    assert int(tiles) == 1 + 2 + 0 + 1 + 2


SHARED = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from k25_jax.preflight import hlo
from k25_jax.preflight import aot
from k25_jax.preflight.cost import jaxpr_flops
from k25_jax.sharding.mesh import make_mesh

mesh = make_mesh(pipe=1, fsdp=2, expert=4)

def body(x, w):
    def layer(x, w):
        whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        y = jax.lax.psum_scatter(jax.lax.all_gather(x, "expert", tiled=True) @ whole, "expert", tiled=True)
        y = jax.lax.all_to_all(y.reshape(4, -1, 16), "expert", 0, 0, tiled=True).reshape(y.shape)
        return jax.lax.ppermute(y, "fsdp", [(0, 1), (1, 0)]), jax.lax.psum(jnp.sum(y, 0), ("fsdp", "expert"))
    return jax.lax.scan(layer, x, w)

spec = P(("fsdp", "expert"))
step = jax.shard_map(body, mesh=mesh, in_specs=(spec, P(None, "fsdp")), out_specs=(spec, P()), check_vma=False)
place = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
traced = jax.jit(lambda x, w, v: (step(x, w), x @ v)).trace(
    place((64, 16), spec), place((3, 16, 16), P(None, "fsdp")), place((16, 32), P()))
program = hlo.parse(traced.lower().compile().as_text())
times, fused, unknown = hlo.runs(program)
found = [[c.kind, list(c.axes), c.bytes, c.times] for c in hlo.collectives(program, times, dict(mesh.shape))]
print(json.dumps([jaxpr_flops(traced.jaxpr, 8).total, hlo.products(program, times), found, unknown]))
"""


def test_over_eight_devices():
    """Three layers in a loop, 8 rows of 16 float32 on a device; a product outside is an eighth on each device."""
    asked, compiled, found, unknown = json.loads(on_eight_devices(SHARED))
    assert asked == compiled == 3 * (2 * 32 * 16 * 16) + 2 * 8 * 16 * 32
    assert unknown == []
    rows = 8 * 16 * 4
    want = {
        ("all-gather", ("fsdp",)): 3 * (8 * 16 * 4),
        ("all-gather", ("expert",)): 3 * 3 * rows,
        ("reduce-scatter", ("expert",)): 3 * 3 * rows,
        ("all-to-all", ("expert",)): 3 * 3 / 4 * rows,
        ("collective-permute", ("fsdp",)): 3 * rows,
        ("all-reduce", ("fsdp", "expert")): 3 * 2 * 7 / 8 * 16 * 4,
    }
    sums: dict = {}
    for kind, axes, each, times in found:
        sums[kind, tuple(axes)] = sums.get((kind, tuple(axes)), 0) + each * times
    assert sums == want


GROUPS = {
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("fsdp",),
    "replica_groups={{0,1,2,3},{4,5,6,7}}, x": ("expert",),
    "replica_groups=[2,4]<=[8], x": ("expert",),
    "replica_groups=[4,2]<=[2,4]T(1,0), x": ("fsdp",),
    "replica_groups=mesh['a'=8,'b'=1] {'a'}, x": ("fsdp", "expert"),
    "replica_groups=mesh['a'=2,'b'=4] {'b'}, x": ("expert",),
    "source_target_pairs={{0,4},{4,0}}, x": ("fsdp",),
    "replica_groups={}, x": ("fsdp", "expert"),
}


@pytest.mark.parametrize("written", GROUPS)
def test_groups_of_devices_in_every_notation(written):
    assert hlo.axes_of(hlo.device_groups(written, 8), {"pipe": 1, "fsdp": 2, "expert": 4}) == GROUPS[written]


TPU_PROGRAM = """HloModule m

%cond (p: (s32[], bf16[4,8,16])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (q: (s32[], bf16[4,8,16])) -> (s32[], bf16[4,8,16]) {
  %q = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = bf16[4,8,16]{2,1,0:T(8,128)} get-tuple-element(%q), index=1
  %w = bf16[4,16,16]{2,1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %y = bf16[4,8,16]{2,1,0:T(8,128)} convolution(%x, %w), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  ROOT %t = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0:T(8,128)}) tuple(%j, %y)
}

ENTRY %main (a: bf16[4,8,16]) -> (s32[], bf16[4,8,16]) {
  %a = bf16[4,8,16]{2,1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(1)
  %start = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0:T(8,128)}) tuple(%zero, %a)
  ROOT %loop = (s32[]{:T(128)}, bf16[4,8,16]{2,1,0:T(8,128)}) while(%start), condition=%cond, body=%body
}
"""


def test_a_program_as_the_tpu_compiler_writes_it():
    """Five trips by its counter; four products of [8,16] by [16,16] as one dilated convolution; a matrix in the cache."""
    program = hlo.parse(TPU_PROGRAM)
    times, fused, unknown = hlo.runs(program)
    assert times["body"] == 5 and not unknown and not fused
    assert hlo.products(program, times) == 5 * 4 * (2 * 8 * 16 * 16)
    comparison = 4 + 4 + 1
    assert hlo.traffic(program, times, fused) == 5 * (2 * (4 * 8 * 16 * 2) + comparison)


SEVERAL_SLICES = """HloModule m

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %token = token[] after-all()
  %send = (f32[4,8]{1,0:T(8,128)}, u32[], token[]) send(%a, %token), is_host_transfer=true, SETTINGS
  %done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %own = f32[4,8]{1,0:T(8,128)} all-gather(%a), replica_groups={{0,2},{1,3}}, dimensions={0}
}
"""
SENT = {"ALL_GATHER": 2, "ALL_REDUCE": 4 / 3, "REDUCE_SCATTER": 2 / 3, "ALL_TO_ALL": 2 / 3, "ONE_TO_ONE": 1}


@pytest.mark.parametrize("kind", SENT)
def test_what_crosses_three_slices(kind):
    """Of 128 bytes: to each of the two others, or a third to each; what stays inside is numbered by the slice."""
    settings = (
        f'frontend_attributes={{_xla_megascale_target="{{1,2,3}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}'
    )
    program = hlo.parse(SEVERAL_SLICES.replace("SETTINGS", settings))
    times, fused, _ = hlo.runs(program)
    (across,) = hlo.between_slices(program, times, 3)
    assert (across.axes, across.times) == (("dcn",), 1) and across.bytes == pytest.approx(128 * SENT[kind])
    assert across.kind == kind.lower().replace("_", "-").replace("one-to-one", "collective-permute")
    (inside,) = hlo.collectives(program, times, {"pipe": 1, "fsdp": 2, "expert": 2})
    assert (inside.axes, inside.bytes) == (("fsdp",), 128)
    assert hlo.traffic(program, times, fused) == 0


def test_the_network_between_slices_bounds_a_step():
    bounds = roofline(parse_topology("2xv5e-8"), 16, 0.0, 0.0, model=1.0, network=1.0, dcn=2.0)
    assert (bounds.network, bounds.dcn, bounds.step) == (1.0, 2.0, 2.0)


def test_a_roofline_takes_the_slowest_of_three():
    chip = parse_topology("v5e-8")
    bounds = roofline(chip, 8, flops=197e12, traffic=2 * 819e9, model=8 * 197e12, network=0.5)
    assert (bounds.compute, bounds.memory, bounds.network) == (1.0, 2.0, 0.5)
    assert bounds.step == 2.0 and bounds.mfu == pytest.approx(0.5)
    assert roofline(parse_topology("cpu"), 1, 1e9, 1e9, 1e9).mfu == 0.0


def test_model_flops_are_six_for_each_active_parameter_and_token():
    """With one layer, one short row and no pictures, little else is left; and they grow with the rows."""
    small = ["data.seq_len=2", "data.packs=0", "data.batch_size=3"]
    experiment = load_experiment("experiments/pretrain/demo.py", small)
    text = experiment.model.text
    attention = 6 * 3 * 2 * text.layers * text.heads * (text.qk_dim + text.v_dim) * 2 / 2
    counts = count_params(experiment.model)
    assert model_flops(experiment) == 6 * 3 * 2 * (counts["active"] - counts["embedding"]) + attention


@pytest.mark.parametrize("temporary, peak, expected", [(30, 250, 30), (130, 250, 30), (30, 0, 30), (30, 90, 0)])
def test_temporaries_leave_out_the_arguments_even_where_the_compiler_counts_them(temporary, peak, expected):
    """Of 100 bytes of arguments 80 are written over by results of 200."""
    sizes = dict(argument_size_in_bytes=100, output_size_in_bytes=200, alias_size_in_bytes=80)
    memory = types.SimpleNamespace(**sizes, temp_size_in_bytes=temporary, peak_memory_in_bytes=peak)
    assert temporaries(memory) == expected


def test_what_is_frozen_has_no_gradient_of_its_weights():
    """The projector alone: the language model still passes the gradient on, the encoder does not run backward."""
    whole, part = (
        load_experiment("experiments/pretrain/demo.py", [f"train.trainable={names}"]) for names in ([], ["projector"])
    )
    vision, data, counts = whole.model.vision, whole.data, count_params(whole.model)
    tokens, patches = data.batch_size * data.seq_len, data.packs * data.pack_patches
    encoder = counts["vision"] + 2 * vision.layers * vision.width * min(data.max_image_patches, data.pack_patches)
    saved = 2 * tokens * (counts["active"] - counts["embedding"]) + 4 * patches * encoder
    assert model_flops(whole) - model_flops(part) == pytest.approx(saved)


def test_what_is_frozen_takes_no_memory_for_the_optimizer():
    """AdamW's two means of what is trained, and a count: nothing else, in every array that preflight lists."""
    experiment = load_experiment("experiments/pretrain/demo.py", ["train.trainable=['projector']"])
    listed = [t for t in aot.layout(experiment, parse_topology("cpu")) if "opt_state" in t.name and t.shape]
    assert all(".projector." in tensor.name for tensor in listed)
    assert sum(tensor.bytes for tensor in listed) == 2 * 4 * count_params(experiment.model)["projector"]
