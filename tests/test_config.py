"""Strict parsing, presets, experiment files and overrides."""

import dataclasses
import json

import ml_collections
import pytest

import runs
from k25_jax.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    Experiment,
    K25Config,
    MoEConfig,
    OptimConfig,
    RopeConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
    check_rl,
    from_dict,
    load_experiment,
    preset,
    run_local,
    to_dict,
)
from k25_jax.models.count import count_params

FILES = sorted((runs.ROOT / "experiments").rglob("*.py"))


# -------------------------------------------------------------------------------------------------------------- parsing
@pytest.mark.parametrize("name", PRESETS)
def test_to_dict_and_back_through_json(name):
    sources = (SourceConfig("a.jsonl"), SourceConfig("b", "folder", 0.5))
    experiment = Experiment(name="x", model=preset(name), data=DataConfig(sources=sources))
    values = json.loads(json.dumps(to_dict(experiment)))
    assert from_dict(Experiment, values) == experiment
    assert hash(experiment.model) == hash(from_dict(K25Config, values["model"]))  # jit takes it as a static argument


@pytest.mark.parametrize("values, message", [
    ({"modle": "tiny"}, "Experiment: unknown key 'modle'; did you mean 'model'?"),
    ({"train": {"step": 1}}, "train: unknown key 'step'; did you mean 'steps'?"),
    ({"model": {"text": {"moe": {"expert": 1}}}}, "model.text.moe: unknown key 'expert'; did you mean 'experts'?"),
    ({"train": {"steps": 1.5}}, "train.steps must be int, not 1.5 (float)"),
    ({"train": {"steps": "5"}}, "train.steps must be int, not '5' (str)"),
    ({"train": {"steps": True}}, "train.steps must be int, not True (bool)"),
    ({"optim": {"peak_lr": True}}, "optim.peak_lr must be float, not True (bool)"),
    ({"data": {"shuffle": 1}}, "data.shuffle must be bool, not 1 (int)"),
    ({"name": None}, "name must be str, not None (NoneType)"),
    ({"train": 5}, "train must be a mapping with the fields of TrainConfig, not 5"),
    ({"data": {"sources": "a.jsonl"}}, "data.sources must be a list, not 'a.jsonl'"),
    ({"data": {"sources": [{"path": "a"}, {"pth": "b"}]}}, "data.sources[1]: unknown key 'pth'; did you mean 'path'?"),
    ({"data": {"sources": [{}]}}, "every source needs a path"),
    ({"model": {"vision": {"merge": [2]}}}, "model.vision.merge must have 2 entries, not 1"),
    ({"model": {"vision": {"merge": [2, "2"]}}}, "model.vision.merge[1] must be int, not '2' (str)"),
    ({"model": "tinny"}, "no preset 'tinny' (there are k25_1t, moonlight_16b, 1b, 100m, tiny); did you mean 'tiny'?"),
])  # fmt: skip
def test_unknown_and_ill_typed_keys_are_named_with_the_nearest(values, message):
    with pytest.raises(ConfigError) as error:
        from_dict(Experiment, values)
    assert message in str(error.value)


def test_whole_numbers_pass_for_floats_and_lists_for_tuples():
    config = from_dict(Experiment, {"optim": {"peak_lr": 1}, "model": {"vision": {"merge": [2, 2]}}})
    assert config.optim.peak_lr == 1.0 and isinstance(config.optim.peak_lr, float)
    assert config.model.vision.merge == (2, 2)


@pytest.mark.parametrize("cls, values, message", [
    (VisionConfig, dict(width=30, heads=4), "vision.width=30 must be heads=4 times a multiple of 4"),
    (VisionConfig, dict(layers=0), "VisionConfig.layers=0 must be positive"),
    (RopeConfig, dict(factor=0.5), "rope.factor=0.5 must be at least 1"),
    (RopeConfig, dict(factor=2.0), "rope.factor > 1 needs rope.yarn=True"),
    (MoEConfig, dict(experts=4, top_k=5), "moe.top_k=5 must lie between 1 and moe.experts=4"),
    (MoEConfig, dict(experts=8, groups=3, top_k=2), "moe.groups=3 must divide moe.experts=8"),
    (MoEConfig, dict(experts=8, groups=4, top_groups=1, top_k=3), "moe.top_k=3 exceeds the experts"),
    (MoEConfig, dict(experts=8, groups=8, top_groups=8), "moe.groups needs at least 2 experts"),
    (MoEConfig, dict(grouped_matmul="block"), "did you mean 'blocked'"),
    (TextConfig, dict(dense_layers=62), "text.dense_layers=62 must lie between 0 and layers=61"),
    (TextConfig, dict(qk_rope_dim=5), "text.qk_rope_dim=5 must be even"),
    (K25Config, dict(media_pad_id=-1), "media_pad_id=-1 must not be negative"),
    (SourceConfig, dict(path="a", weight=0.0), "weight=0.0 of a must be positive"),
    (SourceConfig, dict(path="a", kind="json"), "did you mean 'jsonl'"),
    (DataConfig, dict(batch_size=0), "DataConfig.batch_size=0 must be positive"),
    (OptimConfig, dict(peak_lr=0.0), "OptimConfig.peak_lr=0.0 must be positive"),
    (OptimConfig, dict(decay_steps=-1), "optim.decay_steps=-1 must not be negative"),
    (OptimConfig, dict(b2=1.0), "optim.b2=1.0 must lie in [0, 1)"),
    (OptimConfig, dict(momentum=1.5), "optim.momentum=1.5 must lie in [0, 1)"),
    (OptimConfig, dict(name="muon"), "did you mean 'muonclip'"),
    (OptimConfig, dict(qk_clip=0.0), "OptimConfig.qk_clip=0.0 must be positive"),
    (TrainConfig, dict(remat="ful"), "did you mean 'full'"),
    (TrainConfig, dict(compute_dtype="float16"), "(one of ('float32', 'bfloat16'))"),
    (TrainConfig, dict(seed=-1), "train.seed=-1 must lie in [0, 2**32)"),
    (TrainConfig, dict(max_bad_steps=0), "TrainConfig.max_bad_steps=0 must be positive"),
])  # fmt: skip
def test_values_that_cannot_be_are_refused(cls, values, message):
    with pytest.raises(ConfigError) as error:
        cls(**values)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------------------- presets
def test_the_default_model_is_kimi_k25():
    config = preset("k25_1t")
    assert config == K25Config()
    text, vision, moe = config.text, config.vision, config.text.moe
    assert (text.layers, text.dense_layers, text.d_model, text.heads, text.vocab_size) == (61, 1, 7168, 64, 163840)
    assert (text.q_lora_rank, text.kv_lora_rank, text.qk_dim, text.v_dim, text.ffn_dim) == (1536, 512, 192, 128, 18432)
    assert (moe.experts, moe.top_k, moe.shared_experts, moe.ffn_dim, moe.scale) == (384, 8, 1, 2048, 2.827)
    assert (text.rope.factor, text.rope.theta, text.max_length) == (64.0, 50000.0, 262144)
    assert (vision.layers, vision.width, vision.heads, vision.mlp_dim, vision.group) == (27, 1152, 16, 4304, 4)


@pytest.mark.parametrize("name, low, high", [
    ("k25_1t", 1.026e12, 1.028e12), ("moonlight_16b", 15.9e9, 16.5e9), ("1b", 1.0e9, 1.2e9), ("100m", 0.9e8, 1.2e8),
    ("tiny", 0.9e6, 1.1e6),
])  # fmt: skip
def test_presets_have_the_size_in_their_name(name, low, high):
    counts = count_params(preset(name))
    assert low <= counts["total"] <= high and counts["active"] < counts["text"]


# ----------------------------------------------------------------------------------------------------- experiment files
def write(folder, body: str) -> str:
    file = folder / "one.py"
    file.write_text(f"import ml_collections\ndef get_config(arg=''):\n    {body}\n")
    return str(file)


SMALL = "return ml_collections.ConfigDict(dict(name='a' + arg, model='tiny', train=dict(steps=7)))"


@pytest.mark.parametrize("override, field, value", [
    ("train.steps=5", "train.steps", 5),
    ("train.keep=2", "train.keep", 2),
    ("optim.peak_lr=1e-3", "optim.peak_lr", 1e-3),
    ("optim.peak_lr=1", "optim.peak_lr", 1.0),
    ("train.compute_dtype=bfloat16", "train.compute_dtype", "bfloat16"),
    ("train.init_from=runs/a=b", "train.init_from", "runs/a=b"),
    ("data.shuffle=False", "data.shuffle", False),
    ("model.text.layers=4", "model.text.layers", 4),
    ("model.vision.merge=[2, 2]", "model.vision.merge", (2, 2)),
    ("data.sources=[{'path': 'words:train'}]", "data.sources", (SourceConfig("words:train"),)),
    ("name=other", "name", "other"),
    ("model=100m", "model", preset("100m")),
    ("model.vision.merge.1=4", "model.vision.merge", (2, 4)),  # in a list that the file does not set
    ("model.vision.merge[-1]=4", "model.vision.merge", (2, 4)),
])  # fmt: skip
def test_overrides(tmp_path, override, field, value):
    experiment = load_experiment(write(tmp_path, SMALL), [override])
    found = experiment
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    plain = load_experiment(write(tmp_path, SMALL))
    assert plain.name == "a" and plain.model == preset("tiny") and plain.train.steps == 7
    section = field.split(".")[0]
    others = [f.name for f in dataclasses.fields(Experiment) if f.name != section]
    assert [getattr(experiment, name) for name in others] == [getattr(plain, name) for name in others]


LISTS = "return ml_collections.ConfigDict(dict(data=dict(vision_share=((0.0, 0.1), (0.5, 0.2)), sources=["
LISTS += "dict(path='a', weight=1.0), dict(path='b', weight=((0.0, 1.0), (0.5, 2.0)))])))"


@pytest.mark.parametrize("override, expected", [
    ("data.sources.0.weight=10", (10.0, ((0.0, 1.0), (0.5, 2.0)))),
    ("data.sources[1].weight=10", (1.0, 10.0)),
    ("data.sources.-1.weight.1.1=3", (1.0, ((0.0, 1.0), (0.5, 3.0)))),
    ("data.sources.1.weight.0=[0, 4]", (1.0, ((0.0, 4.0), (0.5, 2.0)))),
])  # fmt: skip
def test_overrides_in_lists(tmp_path, override, expected):
    file = write(tmp_path, LISTS)
    assert tuple(source.weight for source in load_experiment(file, [override]).data.sources) == expected
    assert load_experiment(file, [override, "data.vision_share.1.1=0.4"]).data.vision_share == ((0.0, 0.1), (0.5, 0.4))


@pytest.mark.parametrize("override, message", [
    ("data.sources.2.weight=1", "data.sources has entries 0 to 1; to add one, give the whole list as data.sources=[..]"),
    ("data.sources.-3.weight=1", "data.sources has entries 0 to 1"),
    ("data.sources.weight=1", "data.sources is a list; name an entry by its number, as data.sources.0.weight=.."),
    ("data.sources.one.weight=1", "data.sources is a list"),
    ("data.sources.0.wieght=1", "data.sources[0]: unknown key 'wieght'; did you mean 'weight'?"),
    ("data.sources.0.weight=x", "data.sources[0].weight must be float, not 'x'"),
    ("data.sources.0.weight.1=2", "weight is not a section"),
    ("train.trainable.0=vision", "train.trainable is empty; to add one, give the whole list as train.trainable=[..]"),
    ("train..steps=1", "must read section.key=value"),
])  # fmt: skip
def test_overrides_in_lists_that_cannot_be_are_named(tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        load_experiment(write(tmp_path, LISTS), [override])
    assert message in str(error.value)


def test_the_argument_behind_the_colon(tmp_path):
    assert load_experiment(write(tmp_path, SMALL) + ":b=2").name == "ab=2"


@pytest.mark.parametrize("override, message", [
    ("train.stepz=5", "train: unknown key 'stepz'; did you mean 'steps'?"),
    ("trian.steps=5", "Experiment: unknown key 'trian'; did you mean 'train'?"),
    ("train.steps=many", "train.steps must be int, not 'many'"),
    ("train.steps.more=1", "override 'train.steps.more=1': steps is not a section"),
    ("train.steps", "override 'train.steps' must read section.key=value"),
])  # fmt: skip
def test_overrides_that_cannot_be_are_named(tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        load_experiment(write(tmp_path, SMALL), [override])
    assert message in str(error.value)


def test_files_that_are_no_experiment_are_named(tmp_path):
    file = write(tmp_path, "return dict(name='a')")
    with pytest.raises(ConfigError, match="one.py: get_config must return an ml_collections.ConfigDict, not dict"):
        load_experiment(file)
    with pytest.raises(ConfigError, match=r"no experiment file .*/ones.py; did you mean '.*/one.py'\?"):
        load_experiment(str(tmp_path / "ones.py"))
    with pytest.raises(ConfigError, match="no experiment file /no/such/place.py$"):
        load_experiment("/no/such/place.py")
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"one.py has no get_config\(arg\)"):
        load_experiment(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_experiments_of_the_repository_load_and_shrink(file):
    experiment, local = load_experiment(str(file)), load_experiment(f"{file}:runlocal")
    assert experiment.name == local.name and file.stem in experiment.name
    assert experiment.stage == local.stage and experiment.train.trainable == local.train.trainable
    assert experiment.optim.warmup_steps + experiment.optim.decay_steps < experiment.train.steps
    if experiment.stage == "rl":  # a model that answers nothing learns nothing
        check_rl(experiment)
        check_rl(local)
        assert local.model == experiment.model and local.train.init_from == "base"
    else:
        text = dataclasses.replace(local.model.text, max_length=1024, rope=RopeConfig(original_length=1024))
        assert dataclasses.replace(local.model, text=text) == preset("tiny")
    assert all(source.kind == "task" for source in local.data.sources)
    assert local.train.compute_dtype == experiment.train.compute_dtype and local.train.remat == experiment.train.remat
    if file.stem != "demo":
        assert local.train.steps == 4 and local.data.tokenizer == ""
        with pytest.raises(ConfigError, match=f"{file.name}: unknown argument 'local'; it can be .*runlocal"):
            load_experiment(f"{file}:local")


def test_joint_pre_training_is_that_of_the_paper():
    experiment = load_experiment(str(runs.ROOT / "experiments/pretrain/k25_1t.py"))
    data, optim, train = experiment.data, experiment.optim, experiment.train
    tokens = data.batch_size * data.seq_len
    assert data.seq_len == 4096 and tokens == pytest.approx(67e6, rel=0.01)
    assert train.steps * tokens == pytest.approx(15.5e12, rel=1e-3)
    assert optim.decay_steps * tokens == pytest.approx(5.5e12, rel=1e-3)
    assert (optim.warmup_steps, optim.peak_lr, optim.end_lr, optim.weight_decay) == (500, 2e-4, 2e-5, 0.1)
    assert (train.remat, train.compute_dtype) == ("full", "bfloat16")
    assert (train.init_vision_from, train.trainable) == ("runs/vit_k25_1t", ()) and train.init_from
    rope = RopeConfig(original_length=4096)  # no YaRN yet
    text = preset("k25_1t").text
    text = dataclasses.replace(text, max_length=4096, rope=rope, moe=dataclasses.replace(text.moe, chunk=4096))
    assert experiment.model == dataclasses.replace(preset("k25_1t"), text=text)


def test_runs_have_folders_of_their_own():
    names = [load_experiment(str(file)).name for file in FILES]
    assert len(set(names)) == len(names)


def test_mid_training_is_that_of_the_paper():
    """32768 to 262144 tokens in steps, 500B tokens to 200B, YaRN to K2.5's factor, each from the one before."""
    file, before, tokens = runs.ROOT / "experiments/midtrain/k25_1t.py", "runs/k25_1t", []
    for length in (32768, 65536, 131072, 262144):
        experiment = load_experiment(f"{file}:{length}")
        data, text, local = experiment.data, experiment.model.text, load_experiment(f"{file}:{length},runlocal")
        assert data.seq_len == text.max_length == 4096 * text.rope.factor == length and text.rope.yarn
        assert data.batch_size * data.seq_len == 2**26 and length // experiment.mesh.context == 32768
        assert experiment.train.init_from == before and experiment.train.trainable == ()
        tokens.append(experiment.train.steps * 2**26)
        rope = local.model.text.rope
        assert local.data.seq_len == rope.factor * rope.original_length and rope.factor == text.rope.factor
        before = f"runs/{experiment.name}"
    assert experiment.model == preset("k25_1t")
    assert (tokens[0], tokens[-1]) == (pytest.approx(500e9, rel=1e-3), pytest.approx(200e9, rel=1e-3))
    for wrong in ("4096", "32768,65536", "65536,local"):
        with pytest.raises(ConfigError, match="it can be one of 32768, .*, and runlocal"):
            load_experiment(f"{file}:{wrong}")


def test_the_vit_stage_is_that_of_the_paper():
    first, second = (load_experiment(str(runs.ROOT / f"experiments/vit/{n}.py")) for n in ("moonlight_16b", "k25_1t"))
    assert first.stage == second.stage == "vit" and first.train.siglip_weight == second.train.siglip_weight == 0
    assert first.train.trainable == ("vision", "projector") and second.train.trainable == ("projector",)
    assert first.model == preset("moonlight_16b") and second.train.init_vision_from == f"runs/{first.name}"
    tokens = [e.train.steps * e.data.batch_size * e.data.seq_len for e in (first, second)]
    assert tokens[0] == pytest.approx(1e12, rel=1e-3) and tokens[1] < 0.01 * tokens[0]


def test_run_local_leaves_the_experiment_as_it_is():
    config = ml_collections.ConfigDict(dict(name="a", model=dict(), data=dict(), optim=dict(peak_lr=1.0), train=dict()))
    before = config.to_dict()
    local = run_local(config)
    assert config.to_dict() == before and local.model == "tiny" and local.optim.peak_lr == 1.0
