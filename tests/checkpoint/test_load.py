"""Models from the folders of runs and from folders in the public format."""

import gc
import json
import shutil

import jax
import numpy as np
import pytest

from k25_jax.checkpoint.folders import read_experiment
from k25_jax.checkpoint.huggingface import save_params
from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.store import CheckpointError, Store
from k25_jax.config import ConfigError, load_experiment
from k25_jax.train.handover import load_initial
from k25_jax.train.state import abstract_state


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=str(path))


def test_a_run_is_read_with_what_it_was_started_with(finished):
    model = load_model(finished.run)
    experiment = load_experiment(str(finished.file))
    assert model.experiment == experiment == read_experiment(finished.run) and model.config == experiment.model
    store = Store(finished.run / "checkpoints")
    state, _ = store.restore(abstract_state(experiment))
    store.close()
    assert_equal(model.params, state.params)
    assert model.tokenizer.decode(model.tokenizer.encode("né")) == "né"


def test_the_public_format_gives_the_same_model(finished, tmp_path):
    ours = load_model(finished.run)
    save_params(ours.params, ours.config, tmp_path / "public", dtype=np.float32)
    public = load_model(tmp_path / "public")
    assert_equal(public.params, ours.params)
    assert public.config == ours.config and public.experiment is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops readers that failed
def test_training_starts_from_either(finished, tmp_path):
    ours = load_model(finished.run)
    save_params(ours.params, ours.config, tmp_path / "public", dtype=np.float32)
    fresh = {"embed": np.zeros(3)}
    assert load_initial(load_experiment(str(finished.file)), fresh) is fresh
    for source in (finished.run, tmp_path / "public"):
        experiment = load_experiment(str(finished.file), [f"train.init_from={source}"])
        assert_equal(load_initial(experiment, fresh), ours.params)
    wider = load_experiment(str(finished.file), [f"train.init_from={finished.run}", "model.text.d_model=32"])
    with pytest.raises(CheckpointError, match="model.text.d_model is 24 there and 32 here"):
        load_initial(wider, fresh)
    nowhere = load_experiment(str(finished.file), [f"train.init_from={tmp_path / 'nowhere'}"])
    with pytest.raises(CheckpointError, match="nowhere"):
        load_initial(nowhere, fresh)
    gc.collect()


def test_folders_that_hold_no_model_are_named(finished, tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path} is neither a run"):
        load_model(tmp_path)
    shutil.copy(finished.run / "experiment.json", tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/checkpoints: no such folder"):
        load_model(tmp_path)
    values = json.loads((tmp_path / "experiment.json").read_text())
    values["train"]["step"] = 3
    (tmp_path / "experiment.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="train: unknown key 'step'; did you mean 'steps'"):
        load_model(tmp_path)
    (tmp_path / "experiment.json").write_text('{"name": "half')
    with pytest.raises(CheckpointError, match="experiment.json is not valid JSON.*restore it"):
        load_model(tmp_path)
