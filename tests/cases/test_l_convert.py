"""What `k25 convert` and the loader take: a language model alone, tied embeddings, the files beside the weights."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from k25_jax.checkpoint.convert import convert
from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.checkpoint.huggingface import load_params
from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.store import CheckpointError, Store
from k25_jax.cli import main
from k25_jax.config import Experiment, from_dict, to_dict

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=40, moe_intermediate_size=10, num_attention_heads=2,
    num_key_value_heads=2, n_routed_experts=4, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=5, n_group=1,
    qk_nope_head_dim=6, topk_group=1, num_experts_per_tok=2, num_hidden_layers=2, first_k_dense_replace=1,
)  # fmt: skip


@pytest.fixture
def language_model(tmp_path):
    """Saves a language model alone, as transformers writes it; `change` edits its config.json."""

    def save(change=None, **sizes):
        torch.manual_seed(0)
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES | sizes))
        model.save_pretrained(tmp_path / "lm")
        if change:
            edit(tmp_path / "lm", change)
        return model, tmp_path / "lm"

    return save


def edit(folder, change):
    contents = json.loads((folder / "config.json").read_text())
    change(contents)
    (folder / "config.json").write_text(json.dumps(contents))


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


# ---------------------------------------------------------------------------------------------- a language model alone
@pytest.mark.parametrize("queries", [8, None])
@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_k2"])
def test_a_language_model_alone_stays_one(language_model, tmp_path, capsys, kind, queries):
    model, folder = language_model(lambda contents: contents.update(model_type=kind), q_lora_rank=queries)
    assert main(["convert", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}", "--dtype=float32"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    again = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name.startswith(("model.", "lm_head.")) for name in names)
    assert read_config(tmp_path / "out") == read_config(folder)
    assert_equal(load_model(tmp_path / "out").params, load_model(folder).params)


@pytest.mark.parametrize("encoding", ["int4", "fp8"])
def test_and_can_be_quantised(language_model, tmp_path, encoding):
    _, folder = language_model(q_lora_rank=8)
    convert(str(folder), str(tmp_path / "q"), quantise=encoding)
    assert "quantization_config" in json.loads((tmp_path / "q" / "config.json").read_text())
    plain, quantised = load_model(folder).params, load_model(tmp_path / "q").params
    assert jax.tree.structure(plain) == jax.tree.structure(quantised)
    down = ("moe", "moe", "experts", "down")
    for key in down:
        plain, quantised = plain[key], quantised[key]
    assert 0 < np.abs(plain - quantised).max() < 0.1 * np.abs(plain).max()


def test_a_whole_model_without_its_encoder_is_one_line(language_model, tmp_path, capsys):
    """A config that promises an encoder, over the files of a language model."""
    _, folder = language_model(q_lora_rank=8)
    text = json.loads((folder / "config.json").read_text())
    whole = {
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": {"hidden_size": 24, "num_attention_heads": 2},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    capsys.readouterr()
    assert main(["convert", f"--checkpoint={folder}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds a language model alone" in error and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ tied embeddings
@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_that_is_the_embedding_is_passed_over(language_model, name):
    _, folder = language_model(q_lora_rank=8, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, file)
    expected = load_model(folder).params
    assert "head" not in expected
    save_file(tensors | {name: tensors["model.embed_tokens.weight"]}, file)
    assert_equal(load_model(folder).params, expected)


@pytest.mark.parametrize(
    "change", [lambda w: w + (np.arange(64)[:, None] == 63), lambda w: w[:-1], lambda w: w.T.copy()]
)
def test_a_head_that_is_not_is_refused(language_model, change):
    _, folder = language_model(q_lora_rank=8, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = change(tensors["model.embed_tokens.weight"]).astype(np.float32)
    save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but lm_head.weight is not") as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    if head.shape == (64, 32):
        edit(folder, lambda contents: contents.update(tie_word_embeddings=False))  # the remedy
        np.testing.assert_array_equal(load_model(folder).params["head"], head.T)


# ----------------------------------------------------------------------------------------------------- files beside them
BESIDE = {
    "preprocessor_config.json": "{}", "chat_template.jinja": "{{ x }}", "tokenization_kimi.py": "x = 1",
    "tool_declaration_ts.py": "", "LICENSE": "free", "README.md": "# model", "special_tokens_map.json": "{}",
    "added_tokens.json": "{}", "configuration_deepseek.py": "", "figure.png": "png", "Notice.TXT": "n", "a b.txt": "s",
}  # fmt: skip
LEFT = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.GGUF", "training_args.bin",
        "rng_state.pt", "adapter_model.safetensors", ".gitattributes", "tf_model.h5"]  # fmt: skip


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for file in ("config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"):
        shutil.copy(BASE / file, folder)
    return folder


def test_files_that_are_not_weights_are_carried_and_others_named(source, tmp_path, capsys):
    for name, text in (BESIDE | dict.fromkeys(LEFT, "weights")).items():
        (source / name).write_text(text)
    (source / "original").mkdir()
    os.mkfifo(source / "pipe")
    with open(source / "film.mp4", "wb") as file:
        file.truncate(300_000_000)
    out = tmp_path / "out"
    assert main(["convert", f"--checkpoint={source}", f"--output={out}"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"wrote {out}" and second.startswith(f"left in {source}: ")
    for name, text in BESIDE.items():
        assert (out / name).read_text() == text, name
    for name in [*LEFT, "original", "pipe", "film.mp4"]:
        assert not (out / name).exists(), name
    named = second.partition(": ")[2]
    assert ".gitattributes" in named and "adapter_model.safetensors" in named and named.endswith("and 2 more")
    assert load_model(out).tokenizer.encode("a") == [97]


def test_nothing_that_is_there_is_overwritten(source, tmp_path):
    out = tmp_path / "out"
    convert(str(source), str(out))
    for name in ("LICENSE", "tokenizer_config.json"):
        (source / name).write_text("{}")
        (out / name).write_text('{"mine": 1}')
    (out / "old").mkdir()
    (out / "old" / "link").symlink_to("/etc/passwd")
    assert convert(str(source), str(out)) == [f"wrote {out}"]
    for name in ("LICENSE", "tokenizer_config.json"):
        assert (out / name).read_text() == '{"mine": 1}'
    assert (out / "old" / "link").is_symlink()


def test_a_vocabulary_that_is_not_read_is_carried_too(source, tmp_path):
    (source / "tokenizer.model").write_text("pieces")
    assert convert(str(source), str(tmp_path / "out")) == [f"wrote {tmp_path / 'out'}"]
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "pieces"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_in_its_own_place_all_files_stay(source):
    (source / "LICENSE").write_text("free")
    (source / "notes.bin").write_text("x")
    assert convert(str(source), str(source)) == [f"wrote {source}"]
    assert (source / "LICENSE").read_text() == "free" and (source / "notes.bin").exists()


def test_links_that_lead_out_are_not_followed(source, tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("secret")
    (source / "far.txt").symlink_to(tmp_path / "secret.txt")
    (source / "up.txt").symlink_to("../secret.txt")
    (source / "gone.txt").symlink_to("nowhere")
    (source / "here.txt").write_text("here")
    (source / "near.txt").symlink_to("here.txt")
    (source / "folder").symlink_to(tmp_path)
    out = tmp_path / "out"
    assert convert(str(source), str(out))[1] == f"left in {source}: far.txt, folder/, gone.txt, up.txt"
    assert (out / "near.txt").read_text() == "here" and not (out / "near.txt").is_symlink()
    assert not any((out / name).exists() for name in ("far.txt", "up.txt", "gone.txt", "folder"))


def test_links_into_the_hubs_own_cache_are_followed(source, tmp_path):
    """There every file of a model is a link beside its snapshot."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (source / "chat_template.jinja").write_text("{{ x }}")
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert convert(str(snapshot), str(tmp_path / "out")) == [f"wrote {tmp_path / 'out'}"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "out" / "chat_template.jinja").is_symlink()


def test_a_run_takes_its_vocabulary_along(tmp_path):
    """A run of ours on bytes; and one that was trained with a vocabulary in a folder of other things."""
    base, run, data = load_model("base"), tmp_path / "run", tmp_path / "data"
    store = Store(run / "checkpoints")
    store.save(1, {"params": base.params}, {}, wait=True)
    store.close()
    experiment = to_dict(from_dict(Experiment, {"model": to_dict(base.config)}))
    (run / "experiment.json").write_text(json.dumps(experiment))
    convert(str(run), str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    data.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "out" / name, data)
    for name in ("tokenization_kimi.py", "chat_template.jinja", "thesis.txt", "config.json"):
        (data / name).write_text("x")
    experiment["data"]["tokenizer"] = str(data)
    (run / "experiment.json").write_text(json.dumps(experiment))
    convert(str(run), str(tmp_path / "again"))
    carried = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"tokenizer.json", "tokenization_kimi.py", "chat_template.jinja"} <= carried and "thesis.txt" not in carried
    config = read_config(tmp_path / "again")
    assert_equal(load_params(tmp_path / "again", config), load_params(tmp_path / "out", config))
