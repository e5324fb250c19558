"""A config.json that asks for more than the files hold is refused before anything is done for each of its parts."""

import json
import shutil

import pytest

from k25_jax.checkpoint.folders import BASE
from k25_jax.checkpoint.load import load_model
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.cli import main

TEXT = "vocab_size hidden_size intermediate_size num_attention_heads num_hidden_layers kv_lora_rank q_lora_rank".split()
TEXT += "qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts moe_intermediate_size n_shared_experts".split()
VISION = "vt_num_hidden_layers vt_hidden_size vt_intermediate_size patch_size init_pos_emb_height".split()
SIZES = [("text_config", name) for name in TEXT] + [("vision_config", name) for name in VISION]
OTHER_NAMES = {"vt_num_hidden_layers": "num_hidden_layers", "vt_hidden_size": "hidden_size",
               "vt_intermediate_size": "intermediate_size", "init_pos_emb_height": "pos_emb_height"}  # fmt: skip


@pytest.fixture
def sized(tmp_path):
    """The base model with one size of its config changed."""

    def write(section: str, name: str, value, **more):
        folder = shutil.copytree(BASE, tmp_path / "m", dirs_exist_ok=True)
        contents = json.loads((BASE / "config.json").read_text())
        part = contents[section]
        for key in {name, OTHER_NAMES.get(name, name)} if section == "vision_config" else {name}:
            part[key] = value
        if name == "num_attention_heads":
            part["num_key_value_heads"] = value
        part |= more
        (folder / "config.json").write_text(json.dumps(contents))
        return folder

    return write


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 20_000
    return str(error.value)


@pytest.mark.parametrize(("section", "name"), SIZES)
@pytest.mark.parametrize("value", [10**7, 2 * 10**9, 10**40])
def test_a_huge_size_is_refused(sized, section, name, value):
    refused(sized(section, name, value))


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [("num_hidden_layers", 10**7, {}), ("n_routed_experts", 10**9, {}),
     ("num_hidden_layers", 10**5, {"n_routed_experts": 10**5}),
     ("num_hidden_layers", 2 * 10**9, {"first_k_dense_replace": 2 * 10**9})],
)  # fmt: skip
def test_layers_and_experts_that_are_not_there_are_one_line(sized, name, value, more):
    line = refused(sized("text_config", name, value, **more))
    assert (
        "\n" not in line
        and f"{name}={value}" in line
        and "the config asks for" in line
        and "the files hold 126" in line
    )


def test_a_few_that_are_missing_are_still_listed(sized):
    text = refused(sized("text_config", "num_hidden_layers", 5))
    assert (
        "language_model.model.layers.4.mlp.experts.7.down_proj.weight is missing" in text
        or text.count("is missing") == 50
    )


def test_every_command_is_quick(sized, capsys, tmp_path):
    folder = sized("text_config", "num_hidden_layers", 10**7)
    for command in (["generate", "--prompt=hi"], ["convert", f"--output={tmp_path / 'o'}"], ["serve", "--port=0"]):
        assert main([command[0], f"--checkpoint={folder}", *command[1:]]) == 2
        *before, line = capsys.readouterr().err.splitlines()
        assert "num_hidden_layers=10000000" in line and [text[:9] for text in before] in ([], ["listening"])
