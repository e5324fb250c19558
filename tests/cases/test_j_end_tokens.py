"""All end tokens of a model count, wherever its files name them, and `k25 convert` keeps them."""

import argparse
import copy
import dataclasses
import json
import shutil

import pytest
import transformers

from benchmarks.serving import minute_model
from k25_jax.checkpoint.convert import convert
from k25_jax.checkpoint.folders import BASE, read_experiment
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.checkpoint.load import Model, load_model
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.cli.flags import build_parser
from k25_jax.config import ConfigError, Experiment, K25Config, from_dict, preset, to_dict
from k25_jax.evals.local import Checkpoint
from k25_jax.evals.tool_use import Asker
from k25_jax.sampling.console import Console
from k25_jax.serving.requests import chat_ask, completion_ask

FILES = ("generation_config.json", "config.json", "text_config")


def name_ends(folder, where: str, ends) -> None:
    """Write the end tokens into one of FILES; the others have none."""
    for file in ("config.json", "generation_config.json"):
        path = folder / file
        values = json.loads(path.read_text()) if path.exists() else {}
        sections = [values, values.get("text_config", {})]
        for section in sections:
            section.pop("eos_token_id", None)
        if where == file:
            values["eos_token_id"] = ends
        if where == "text_config" and file == "config.json":
            values["text_config"]["eos_token_id"] = ends
        path.write_text(json.dumps(values))


@pytest.fixture
def base(tmp_path):
    """A copy of the model that comes with the package."""
    return shutil.copytree(BASE, tmp_path / "base")


@pytest.fixture(scope="module")
def console() -> Console:
    flags = ["--raw", "--prompt=hi", "--temperature=0", "--max_tokens=8", "--ignore_eos"]
    return Console(build_parser().parse_args(["generate", *flags]))


# ---------------------------------------------------------------------------------------------------------- they count
@pytest.mark.parametrize("where", FILES)
@pytest.mark.parametrize(("ends", "read"), [([257, 258], (257, 258)), ([258, 257, 258], (258, 257)), (257, (257,))])
def test_every_file_may_name_one_or_several(base, where, ends, read):
    name_ends(base, where, ends)
    assert read_config(base).eos_ids == read


def test_those_of_all_files_count_together(base):
    contents = json.loads((base / "config.json").read_text())
    contents["eos_token_id"], contents["text_config"]["eos_token_id"] = 257, [274, 257]
    (base / "config.json").write_text(json.dumps(contents))
    (base / "generation_config.json").write_text('{"eos_token_id": [258]}')
    assert read_config(base).eos_ids == (258, 257, 274)
    (base / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_config(base).eos_ids == (257, 274)


def test_a_raw_answer_ends_at_each_of_them(base, console):
    """Whichever place in the list the token has that is drawn."""
    tokens = console.answer(console.prompt(), (), lambda text: None)["tokens"]
    drawn, other = tokens[2], next(id_ for id_ in (257, 274) if id_ not in tokens)
    for ends in ([other, drawn], [drawn, other]):
        name_ends(base, "generation_config.json", ends)
        ended = copy.copy(console)
        ended.args = argparse.Namespace(**vars(console.args) | {"ignore_eos": False})
        ended.model = dataclasses.replace(console.model, config=read_config(base))
        answer = console.answer(console.prompt(), ended.ends(templated=False), lambda text: None)
        assert answer["tokens"] == tokens[: tokens.index(drawn) + 1]


def test_whoever_draws_stops_at_all_of_them(console):
    """Requests of the server, questions of evaluations, tasks with a sandbox."""
    served = minute_model()
    served = dataclasses.replace(
        served,
        reader=dataclasses.replace(served.reader, config=dataclasses.replace(served.reader.config, eos_ids=(5, 257))),
    )
    body = {"model": "minute", "seed": 1}
    asks = (
        chat_ask(json.dumps(body | {"messages": [{"role": "user", "content": "hi"}]}).encode(), served),
        completion_ask(json.dumps(body | {"prompt": "hi"}).encode(), served),
    )
    for ask in asks:
        assert {5, 257} <= set(ask.requests[0].sampling.stop_ids)
    model = console.model
    config = dataclasses.replace(model.config, eos_ids=(5, 257))
    checkpoint = Checkpoint(lambda: Model(model.params, config, model.tokenizer), {})
    engine, tokenizer = checkpoint.open()
    assert set(checkpoint._ends) == {258, 5, 257}
    asked = []
    submit = engine.submit
    engine.submit = lambda request: asked.append(request) or submit(request)
    with Asker(engine, tokenizer, max_tokens=1) as asker:
        asker.ask("dots:test", 1)
    assert set(asked[0].sampling.stop_ids) == {258, 5, 257, config.media_pad_id}


# ------------------------------------------------------------------------------------------------------- they are kept
@pytest.mark.parametrize("where", FILES)
def test_convert_keeps_them(base, tmp_path, where):
    name_ends(base, where, [257, 258])
    kept = json.loads((base / "generation_config.json").read_text()) | {"temperature": 0.6, "max_length": 99}
    (base / "generation_config.json").write_text(json.dumps(kept))
    convert(str(base), str(tmp_path / "out"))
    assert read_config(tmp_path / "out").eos_ids == (257, 258)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["temperature"], written["max_length"]) == ([257, 258], 0.6, 99)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [257, 258]
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == theirs.text_config.eos_token_id == [257, 258]
    convert(str(tmp_path / "out"), str(tmp_path / "out"))  # in its own place
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == written


def test_a_model_in_anothers_place_has_its_own_ends(base, tmp_path):
    name_ends(base, "generation_config.json", [257, 274])
    convert(str(base), str(tmp_path / "out"))
    convert("base", str(tmp_path / "out"))
    assert read_config(tmp_path / "out").eos_ids == (258,)


# -------------------------------------------------------------------------------------------- ids that cannot be, old runs
WRONG = [-5, 288, 10**12, True, "258", 258.0, [258, -1], [258, "257"], [[258]], {"id": 258}, [258, None], [True]]


@pytest.mark.parametrize("where", FILES)
@pytest.mark.parametrize("ends", WRONG, ids=str)
def test_what_is_no_token_is_named(base, where, ends):
    name_ends(base, where, ends)
    with pytest.raises(CheckpointError, match="eos_token_id=.* must be a token id.* below vocab_size=288") as error:
        load_model(base)
    file = "config.json" if where == "text_config" else where
    assert str(base / file) in str(error.value) and "\n" not in str(error.value)


def test_begin_and_padding_are_checked_too(base):
    contents = json.loads((base / "config.json").read_text())
    for name in ("bos_token_id", "pad_token_id"):
        (base / "config.json").write_text(json.dumps(contents | {name: -1}))
        with pytest.raises(CheckpointError, match=f"{name}=-1 must be a token id"):
            read_config(base)


@pytest.mark.parametrize("ends", [(), (-5,), (3, -1)])
def test_a_config_needs_ends_that_can_be(ends):
    with pytest.raises(ConfigError, match="eos_ids="):
        K25Config(eos_ids=ends)


def test_runs_with_one_end_token_are_still_read(tmp_path):
    experiment = from_dict(Experiment, {"name": "old", "model": to_dict(preset("tiny"))})
    values = to_dict(experiment)
    values["model"]["eos_id"] = values["model"].pop("eos_ids")[0]
    (tmp_path / "experiment.json").write_text(json.dumps(values))
    assert read_experiment(tmp_path) == experiment and experiment.model.eos_ids == (258,)
