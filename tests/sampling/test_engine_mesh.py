"""The engine on a mesh of its own gives what it gives on one device; what does not divide is refused with its numbers."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import runs
from engines import CONFIG
from k25_jax.config import ConfigError, preset
from k25_jax.models.k25 import abstract_params
from k25_jax.sampling.layout import Layout, engine_mesh, tensors
from k25_jax.sampling.requests import EngineConfig, fitting
from k25_jax.sharding.rules import ENGINE_AXES

SAME = """
import sys; sys.path[:0] = ["tests"]
import dataclasses, re
import jax, jax.numpy as jnp, numpy as np
from engines import CONFIG, PARAMS, SETTINGS, drain, prompts
from k25_jax.models import decoder
from k25_jax.models.k25 import abstract_params, logical_axes
from k25_jax.preflight import hlo
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import Request
from k25_jax.sampling.sample import SampleConfig
from k25_jax.sharding.mesh import make_mesh
from k25_jax.sharding.rules import shardings

compiled, sent, real = [], [], []  # names; (tokens, copies for experts) of each layer and step; tokens that are no padding
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
)
plain = decoder.moe

def counted(p, x_BLD, valid_BL, config):
    y_BLD, load_E = plain(p, x_BLD, valid_BL, config)
    jax.debug.callback(lambda *numbers: sent.append([int(n) for n in numbers]), valid_BL.sum(), load_E.sum())
    return y_BLD, load_E

def weights(scale=1.0):
    return jax.tree.map(lambda a: a * np.float32(scale), PARAMS)

mesh = make_mesh(fsdp=4, expert=2)
layout = shardings(logical_axes(CONFIG), abstract_params(CONFIG), mesh)
asked = [Request(*p, SampleConfig(6, t, 0.9, 3), n=1 + 2 * (t > 0)) for p in prompts() for t in (0.0, 1.0)]

def play(engine, laid):
    "Waves of requests; some are given up, weights change twice: [Completion of each request and sample], given up or not."
    answers, gone = {}, set()
    for wave in range(2):
        numbers = [engine.submit(request) for request in asked[wave::2]]
        for step in range(400):
            drain(engine, answers)
            if step == 2:
                gone.add(numbers[wave + 1])
                engine.abort(numbers[wave + 1])
            if not engine.busy:
                break
        engine.update_weights(laid(weights(1 - 0.1 * wave)), wave)
    return answers, gone

sizes = dataclasses.replace(SETTINGS, queue=256, pages=96, rows=(40,), pieces=(16,))
one = Engine(weights(), CONFIG, dataclasses.replace(sizes, rows=(5,), pieces=(3,), pages=12))
want, _ = play(one, lambda params: params)
decoder.moe = counted
place = lambda params: jax.device_put(params, layout)
many = Engine(place(weights()), CONFIG, sizes)
assert tuple(many._runner.params["layers"][-1]["moe"]["experts"]["gate"].sharding.spec) == ("expert", None, "tensor")
many.warm_up()
many.update_weights(place(weights()), 0)
send = many._runner.step

def step(plan):
    real.append(int((plan.positions_ZB >= 0).sum() + plan.lengths_ZP.sum()))
    return send(plan)

many._runner.step = step
before = len(compiled)
got, gone = play(many, place)
assert len(compiled) == before, compiled[before:]
stats, alone = many.stats(), one.stats()
assert stats["devices"] == 8 and stats["pages"] == 96 and stats["pages_used"] == 0
assert all(s[name] for name in ("preempted", "reused", "encoded") for s in (stats, alone)), (stats, alone)
assert want.keys() == got.keys() and len(gone) == 2
for key, ours in got.items():
    theirs = want[key]
    length = min(len(ours.tokens), len(theirs.tokens)) if key[0] in gone else 6
    assert ours.reason == theirs.reason == "length" or key[0] in gone
    assert ours.tokens[:length] == theirs.tokens[:length], key
    assert ours.versions[:length] == theirs.versions[:length], key
    np.testing.assert_allclose(ours.logprobs[:length], theirs.logprobs[:length], atol=1e-5)
jax.effects_barrier()
assert all(copies == tokens * CONFIG.text.moe.top_k for tokens, copies in sent)
assert sorted(tokens for tokens, _ in sent) == sorted(real * CONFIG.text.moe_layers), (len(sent), len(real))
print("same", len(got))
"""


@pytest.mark.slow
def test_answers_are_those_of_one_device():
    """From a training mesh (fsdp 4, expert 2), with media, shared beginnings, too few pages, given up, other weights.

    Nothing is compiled after the warm-up, and no padding reaches an expert.
    """
    assert "same 48" in runs.on_eight_devices(SAME)


FEW = """
import sys; sys.path[:0] = ["tests"]
import dataclasses, math
import jax, numpy as np
from engines import CONFIG, PARAMS
from k25_jax.models.k25 import init_params
from k25_jax.preflight import hlo
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.requests import EngineConfig, Request
from k25_jax.sampling.sample import SampleConfig

config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=60, layers=1, dense_layers=0))
params = init_params(config, jax.random.key(0))
sizes = EngineConfig(rows=(8,), pieces=(8,), piece=3, pages=32, page_size=4, vision_patches=())
asked = [Request([1 + i, 2, 3, 4, 5][: 3 + i % 3], (), SampleConfig(3, 0.0)) for i in range(9)]
one, many = (Engine(params, config, sizes, devices=jax.devices()[:n]) for n in (1, 8))
for a, b in zip(one.generate(asked), many.generate(asked), strict=True):
    assert a[0].tokens == b[0].tokens
    np.testing.assert_allclose(a[0].logprobs, b[0].logprobs, atol=1e-5)
runner = many._runner
largest = max(np.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(runner.params)) * 4
program = hlo.parse(runner._program(*runner._step_program(runner.empty_plan(1, 0))).as_text())
times, _, _ = hlo.runs(program)
sent = hlo.collectives(program, times, {"expert": 4, "tensor": 2})
assert len(sent) > 5 and max(item.bytes for item in sent) <= 8 * config.text.d_model * 4, sent
print("same", many.max_length)
"""


def test_a_small_model_on_eight_devices_sends_tokens_and_no_matrix():
    """Nine requests on eight devices. Of all that a step exchanges nothing is larger than its tokens."""
    assert "same 16" in runs.on_eight_devices(FEW)


def test_the_engines_mesh_divides_the_experts_first():
    assert tensors(preset("k25_1t"), 256) == [2, 4, 8, 16, 32, 64]
    assert tensors(preset("k25_1t"), 128)[0] == 1 and tensors(preset("tiny"), 8) == [1, 2, 4]
    assert engine_mesh(CONFIG, []) is engine_mesh(CONFIG, jax.devices()[:1]) is None


@pytest.mark.parametrize(
    "devices, tensor, words",
    [
        (8, 4, "engine.tensor=4 on 8 devices: it must divide text.heads=2 .*moe.experts=4; set it to 2"),
        (6, 0, "engine.tensor=0 on 6 devices.* use another number of devices"),
    ],
)
def test_what_does_not_divide_over_an_engine_is_refused(devices, tensor, words):
    with pytest.raises(ConfigError, match=words):
        engine_mesh(CONFIG, [jax.devices()[0]] * devices, tensor)


def test_every_device_has_an_equal_share_rounded_up():
    sizes = EngineConfig(rows=(1, 8, 32), pieces=(1, 8), pages=100)
    share = sizes.share(8)
    assert (share.rows, share.pieces, share.pages, share.piece) == ((1, 4), (1,), 13, sizes.piece)
    assert sizes.share(1) == sizes
    config = preset("tiny")
    for devices, batch in ((1, 4), (8, 32), (8, 3)):
        share = fitting(config, batch, devices=devices).share(devices)
        assert share.pages * share.page_size >= share.rows[-1] * config.text.max_length


@pytest.mark.parametrize("tensor", [2, 8])
def test_of_the_flagship_each_device_holds_its_share(tensor):
    """On 256 devices: a 256th of the experts, of other matrices a `tensor`-th or all, of each latent's matrix all."""
    config = preset("k25_1t")
    layout = Layout(AbstractMesh((256 // tensor, tensor), ENGINE_AXES))
    weights = layout.abstract_weights(abstract_params(config), config, jax.numpy.bfloat16)
    held = lambda tree: sum(np.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(tree))  # noqa: E731
    layer, t = weights["layers"][-1], config.text
    assert held(layer["moe"]["experts"]) == 3 * t.moe.experts * t.d_model * t.moe.ffn_dim / 256
    assert held(layer["moe"]["shared"]) == 3 * t.d_model * t.moe.ffn_dim / tensor
    assert held(layer["attention"]["o"]) == t.heads * t.v_dim * t.d_model / tensor
    assert held(weights["head"]) == held(weights["embed"]) == t.vocab_size * t.d_model / tensor
    assert held(weights) * 2 < {2: 22e9, 8: 14e9}[tensor]
