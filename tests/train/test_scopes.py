"""A profile's reader finds the parts of a step by their names."""

import runs

SCOPES = "attention moe moe.router moe.dispatch moe.experts mlp vision projector embed loss dep.encode dep.exchange pipeline "
SCOPES += "optimizer.muon optimizer.adam optimizer.qk_clip optimizer.router_bias norms"

STEP = """
import itertools, re
import jax
from k25_jax.config import load_experiment
from k25_jax.train.feed import Feed
from k25_jax.train.layout import mesh_of, open_data
from k25_jax.train.stages import loss_of
from k25_jax.train.state import abstract_state
from k25_jax.train.step import make_step

changes = ["model.text.layers=5", "mesh.pipe=2", "mesh.expert=2", "data.batch_size=16", "data.packs=8", "optim.name=muonclip"]
experiment = load_experiment({experiment!r}, changes)
mesh = mesh_of(experiment)
feed = Feed(open_data(experiment, mesh), experiment, mesh)
(_, ready), = itertools.islice(feed.batches(0, 1), 1)
feed.close()
with jax.set_mesh(mesh):
    lowered = make_step(experiment, loss_of(experiment), mesh).lower(abstract_state(experiment, mesh), ready.batch)
stacks = re.findall(r'loc\\("([^"]*)"', lowered.as_text(debug_info=True))
print(*sorted({{re.sub(r"[a-z_]*\\(|\\)", "", name) for stack in stacks for name in stack.split("/")}}))
"""


def test_every_part_of_a_step_has_its_name(tmp_path):
    """On a mesh with a pipeline and expert parallelism, lowered, not compiled."""
    found = runs.on_eight_devices(STEP.format(experiment=str(runs.write_experiment(tmp_path)))).split()
    assert set(SCOPES.split()) - set(found) == set()
