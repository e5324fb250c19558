"""The ViT stage: which tokens give a loss, what SigLIP's term adds, the step of each sub-stage."""

import dataclasses

import jax
import numpy as np
import pytest

import runs
from k25_jax.config import ConfigError, DataConfig, Experiment, load_experiment
from k25_jax.data.packing import make_example, pack_examples
from k25_jax.data.pipeline import make_pipeline
from k25_jax.losses.siglip import siglip
from k25_jax.models.k25 import embedded, init_params
from k25_jax.parallel.dep import striped
from k25_jax.train import pretrain, vit
from k25_jax.train.stages import loss_of
from k25_jax.train.vit import after_media
from k25_jax.vision.patchpack import Clip

caption_loss = jax.jit(vit.loss_fn, static_argnums=2)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    file = runs.write_experiment(tmp_path_factory.mktemp("vit"))
    return load_experiment(str(file), ["stage=vit", "train.trainable=['vision', 'projector']"])


@pytest.fixture(scope="module")
def params(experiment):
    return jax.jit(init_params, static_argnums=0)(experiment.model, jax.random.key(0))


@pytest.fixture(scope="module")
def batch(experiment):
    """Five documents: image first, text alone, text before an image, two images, an image with nothing after it."""
    return pack_examples(
        documents(experiment.model), DataConfig(batch_size=2, seq_len=32, packs=1, pack_patches=64), experiment.model
    )


def documents(model):
    rng, pad = np.random.default_rng(0), model.media_pad_id
    clip = lambda: Clip(rng.integers(0, 256, (4, model.vision.patch_dim)).astype(np.uint8), (1, 2, 2))  # noqa: E731
    out = []
    for tokens in ([1, pad, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, pad, 13, 14], [pad, 15, pad, 16, 17, 18], [19, pad]):
        out.append(make_example(tokens, [1.0] * len(tokens), [clip() for t in tokens if t == pad], pad))
    return out


def counted(batch, pad) -> set[int]:
    """The targets that count, by going through each document from its start."""
    out = set()
    for row in range(len(batch.tokens_BL)):
        for segment in range(1, batch.segments_BL[row].max() + 1):
            places = np.flatnonzero(batch.segments_BL[row] == segment)
            seen = False
            for place in places[np.argsort(batch.positions_BL[row][places])]:
                seen = seen or batch.tokens_BL[row, place] == pad
                if seen and batch.loss_weights_BL[row, place] > 0:
                    out.add(int(batch.targets_BL[row, place]))
    return out


def test_tokens_after_an_image_of_their_document_count_and_no_others(experiment, batch):
    pad = experiment.model.media_pad_id
    for rows in (batch, striped(batch, 4)):
        weights = np.where(after_media(rows), rows.loss_weights_BL, 0)
        assert set(rows.targets_BL[weights > 0].tolist()) == counted(rows, pad) == {3, 4, 5, 13, 14, 15, 16, 17, 18}
        assert (weights > 0).sum() == 9
    assert not np.asarray(after_media(batch))[batch.segments_BL == 0].any()


def test_the_loss_is_the_mean_over_captions_alone(experiment, params, batch):
    weights = np.where(after_media(batch), batch.loss_weights_BL, 0).astype(np.float32)
    plain = jax.jit(pretrain.loss_fn, static_argnums=2)
    expected, _ = plain(params, batch.replace(loss_weights_BL=weights), experiment)
    loss, (metrics, _) = caption_loss(params, batch, experiment)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert metrics["target_weight"] == 9 and "siglip" not in metrics
    assert abs(loss - plain(params, batch, experiment)[0]) > 1e-3
    assert loss_of(experiment) is vit.loss_fn
    assert loss_of(dataclasses.replace(experiment, stage="pretrain")) is pretrain.loss_fn


def test_text_alone_gives_no_loss_and_no_gradient(experiment, params):
    data = DataConfig(batch_size=1, seq_len=16, packs=1, pack_patches=64)
    text = pack_examples(documents(experiment.model)[1:2], data, experiment.model)
    weighted = with_siglip(experiment, 0.5)
    grad_fn = jax.jit(jax.value_and_grad(vit.loss_fn, has_aux=True), static_argnums=2)
    (loss, _), grads = grad_fn(params, text, weighted)
    assert loss == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def with_siglip(experiment, weight: float):
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, siglip_weight=weight))


def test_siglip_s_term_pairs_images_with_their_captions(experiment, params, batch):
    """Features from what the model reads: means over each document's image tokens, and over the embeddings of its text."""
    loss, (metrics, _) = caption_loss(params, batch, with_siglip(experiment, 0.5))
    x = np.asarray(embedded(params, batch, experiment.model))
    weights, images, texts, rows = np.where(after_media(batch), batch.loss_weights_BL, 0), [], [], []
    for row in range(2):
        for segment in range(1, batch.segments_BL[row].max() + 1):
            here, media = batch.segments_BL[row] == segment, batch.media_BL[row] >= 0
            if (here & media).any() and (here & ~media & (weights[row] > 0)).any():
                images.append(x[row][here & media].mean(axis=0))
                texts.append(x[row][here & ~media & (weights[row] > 0)].mean(axis=0))
                rows.append(row)
    assert rows == [0, 0, 0]  # all documents with a caption fit into the first row
    expected = siglip(np.stack(images)[None], np.stack(texts)[None], np.ones((1, 3), bool))
    np.testing.assert_allclose(metrics["siglip"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, caption_loss(params, batch, experiment)[0] + 0.5 * expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="train.siglip_weight=0.5 needs stage='vit', not 'pretrain'"):
        dataclasses.replace(with_siglip(experiment, 0.5), stage="pretrain")
    with pytest.raises(ConfigError, match="did you mean 'vit'"):
        dataclasses.replace(experiment, stage="vitt")


def test_the_contrast_falls_when_it_is_trained(experiment, params):
    """Steps of plain gradient descent on SigLIP's loss alone, over encoder and projector."""
    pipeline = make_pipeline(
        dataclasses.replace(experiment.data, seq_len=192, batch_size=1, pack_patches=128), experiment.model, steps=1
    )
    batch = next(pipeline)
    pipeline.close()
    weighted, text = with_siglip(experiment, 1.0), {k: v for k, v in params.items() if k not in ("vision", "projector")}

    @jax.jit
    def descend(part):
        def contrast(part):
            return vit.loss_fn(text | part, batch, weighted)[1][0]["siglip"]

        value, grads = jax.value_and_grad(contrast)(part)
        return value, jax.tree.map(lambda a, g: a - 0.02 * g, part, grads)

    part, values = {name: params[name] for name in ("vision", "projector")}, []
    for _ in range(12):
        value, part = descend(part)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]


# ---------------------------------------------------------------------------------------------------------- on a mesh
ON_A_MESH = """
import dataclasses
import jax, numpy as np
from k25_jax.config import DataConfig, Experiment, TrainConfig, load_experiment
from k25_jax.data.packing import pack_examples
from k25_jax.models.k25 import init_params
from k25_jax.parallel import hosts
from k25_jax.sharding.mesh import make_mesh
from k25_jax.train import vit
import sys; sys.path[:0] = ["tests", "tests/train"]
from test_vit import documents

model = load_experiment({experiment!r}).model
params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
rows = documents(model) * 8
data = DataConfig(batch_size=16, seq_len=32, packs=8, pack_patches=64)
batch = pack_examples(rows, data, model)
run = Experiment(stage="vit", model=model, data=data, train=TrainConfig(siglip_weight=0.7))
grads_of = jax.jit(jax.value_and_grad(vit.loss_fn, has_aux=True), static_argnums=2)
(want, (metrics, _)), grads = jax.tree.map(np.asarray, grads_of(params, batch, run))
assert metrics["siglip"] > 0 and (batch.segments_BL.max(axis=1) > 1).any()
for axes, accumulate in (((1, 2, 2, 2), 1), ((1, 4, 2, 1), 2)):  # pipe, fsdp, expert, context
    mesh, part = make_mesh(*axes), dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=accumulate))
    with jax.set_mesh(mesh):
        (got, (seen, _)), other = grads_of(params, hosts.place(batch, mesh, part), part)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(seen["siglip"], metrics["siglip"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(jax.tree.map(np.asarray, other)), strict=True):
        assert np.abs(a - b).max() <= 2e-5 * max(np.abs(a).max(), 1e-6), np.abs(a - b).max()
print("equal")
"""


@pytest.mark.slow
def test_on_a_mesh_both_losses_are_those_of_one_device(tmp_path):
    """Rows striped over `context`, and a batch in two parts: of either loss and of every gradient."""
    experiment = str(runs.write_experiment(tmp_path))
    assert runs.on_eight_devices(ON_A_MESH.format(experiment=experiment)).endswith("equal\n")
