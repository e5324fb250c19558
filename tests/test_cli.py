"""Every command as a user types it: what it prints, where, and with which status it ends."""

import base64
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import reference
import runs
from k25_jax.checkpoint.hf_config import read_config
from k25_jax.cli import main
from k25_jax.sampling.prompt import MediaReader

GREEDY = ("--temperature=0", "--max_tokens=16")


@pytest.fixture
def picture(finished) -> str:
    """An image of the training data."""
    return str(finished.file.parent / "data" / "0.png")


@pytest.fixture(scope="session")
def converted(finished, tmp_path_factory):
    """The finished run in the public format: exact, INT4 and FP8."""
    folder = tmp_path_factory.mktemp("converted")
    for name, flags in (("exact", ["--dtype=float32"]), ("int4", ["--quantise=int4"]), ("fp8", ["--quantise=fp8"])):
        assert main(["convert", f"--checkpoint={finished.run}", f"--output={folder / name}", *flags]) == 0
    return folder


# ------------------------------------------------------------------------------------------------------------- params
MEASURED = """
import json, resource, subprocess, sys
out = subprocess.run([sys.executable, "-m", "k25_jax.cli", *sys.argv[1:]], stdout=subprocess.PIPE, check=True).stdout
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([json.loads(out), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def test_params_of_the_real_model_in_no_time_and_little_memory():
    """Measured from a small process: a child counts the memory of what it was forked from as its own."""
    command = [sys.executable, "-c", MEASURED, "params", "--config=experiments/pretrain/k25_1t.py", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT)
    assert result.returncode == 0, result.stderr
    counts, seconds, kilobytes = json.loads(result.stdout)
    assert seconds < 10 and kilobytes < 1e6
    assert 1.026e12 <= counts["total"] <= 1.028e12
    assert 32e9 <= counts["active"] <= 33e9
    assert 0.41e9 <= counts["vision"] <= 0.42e9
    assert counts["total"] == counts["text"] + counts["vision"] + counts["projector"]


def test_params_as_a_table_and_with_overrides(k25, finished):
    status, out, _ = k25("params", "--preset=tiny")
    assert status == 0 and "routed_experts" in out and "100.00 %" in out
    command = ("params", f"--config={finished.file}", "--json")
    counts = [json.loads(k25(*command, *more)[1]) for more in ([], ["--config.model.text.layers=3"])]
    assert counts[1]["routed_experts"] == 2 * counts[0]["routed_experts"] and counts[1]["vision"] == counts[0]["vision"]
    assert json.loads(k25(*command, "--config.model=tiny")[1])["total"] == 990656


# ----------------------------------------------------------------------------------------------------------- generate
def test_generate_prints_one_line_of_json_and_nothing_of_its_vocabulary(converted, picture):
    """In a process of its own. The folder has the byte-level vocabulary, so there is nothing to warn of."""
    prompt = ("--prompt=which?", f"--image={picture}")
    result = runs.k25("generate", f"--checkpoint={converted / 'exact'}", *prompt, *GREEDY, "--json")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert list(answer) == ["tokens", "logprobs", "text"]
    assert len(answer["tokens"]) == len(answer["logprobs"]) > 0
    assert all(type(token) is int for token in answer["tokens"]) and all(p <= 0 for p in answer["logprobs"])
    assert answer["text"].startswith("no. ")
    assert "vocabulary" not in result.stderr and "Traceback" not in result.stderr


def ask(k25, checkpoint, *flags: str) -> dict:
    command = ("generate", f"--checkpoint={checkpoint}", "--prompt=which?", "--json", "--max_tokens=16")
    status, out, err = k25(*command, *flags)
    assert status == 0, err
    return json.loads(out)


def test_a_run_and_its_public_form_give_the_same_answer(k25, finished, converted, picture):
    flags = ("--temperature=0", f"--image={picture}")
    ours, public = (ask(k25, checkpoint, *flags) for checkpoint in (finished.run, converted / "exact"))
    assert ours == public
    text_only = [ask(k25, checkpoint, "--temperature=0") for checkpoint in (finished.run, converted / "exact")]
    assert text_only[0] == text_only[1] != ours
    for name in ("int4", "fp8"):
        answer = ask(k25, converted / name, *flags)
        assert answer["tokens"][:3] == ours["tokens"][:3] and answer["logprobs"] != ours["logprobs"]


def test_a_seed_gives_the_same_answer_again(k25, finished):
    answers = [ask(k25, finished.run, f"--seed={seed}", "--temperature=2", "--ignore_eos") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] and answers[0]["tokens"] != answers[2]["tokens"]


def test_a_stop_text_ends_the_answer(k25, finished, picture):
    answer = ask(k25, finished.run, "--temperature=0", f"--image={picture}", "--stop=never", "--stop=. ")
    assert answer["text"] == "no" and len(answer["tokens"]) == len(answer["logprobs"]) == 4


def test_a_model_that_transformers_has_written(k25, tmp_path):
    """save_pretrained to --prompt_ids and --image: the greedy tokens of transformers itself."""
    config = reference.draw_config(3)
    model = reference.torch_model(config)
    reference.save(model, tmp_path / "theirs")
    pad = config.image_token_id
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (61, 90, 3)).astype(np.uint8)).save(tmp_path / "image.png")
    ids = [5, 9, pad, 17, 3]
    ours = read_config(tmp_path / "theirs")
    clip = MediaReader(ours).image(tmp_path / "image.png")
    tokens = [token for id_ in ids for token in [id_] * (clip.tokens if id_ == pad else 1)]
    with torch.no_grad():
        inputs = reference.torch_inputs(tokens, [clip], ours)
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    flags = (f"--prompt_ids={','.join(map(str, ids))}", f"--image={tmp_path / 'image.png'}", "--ignore_eos", "--json")
    status, printed, err = k25(
        "generate", f"--checkpoint={tmp_path / 'theirs'}", *flags, "--temperature=0", "--max_tokens=12"
    )
    assert status == 0, err
    assert json.loads(printed)["tokens"] == out[0, len(tokens) :].tolist()


# ---------------------------------------------------------------------------------------------------------------- chat
def test_chat_reads_standard_input(k25, finished, picture, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {picture}\nwhich?\n"))
    status, out, _ = k25("chat", f"--checkpoint={finished.run}", *GREEDY)
    expected = ask(k25, finished.run, "--temperature=0", f"--image={picture}")["text"]
    assert status == 0 and out.split("> ")[2].strip() == expected


# ------------------------------------------------------------------------------------------------------------- convert
def test_convert_says_where_and_keeps_the_vocabulary(k25, converted, tmp_path):
    source = shutil.copytree(converted / "int4", tmp_path / "source")
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (source / "tiktoken.model").write_text("".join(lines))
    status, out, err = k25("convert", f"--checkpoint={source}", f"--output={tmp_path / 'target'}")
    assert (status, out) == (0, f"wrote {tmp_path / 'target'}\n"), err
    assert (tmp_path / "target" / "tiktoken.model").read_bytes() == (source / "tiktoken.model").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "target" / "config.json").read_text())["text_config"]
    assert k25("convert", f"--checkpoint={source}", f"--output={source}")[0] == 0  # in its own place


# -------------------------------------------------------------------------------------------------------------- report
def test_report_of_a_run(k25, finished, tmp_path):
    run = shutil.copytree(finished.run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    status, out, _ = k25("report", f"--workdir={run}")
    assert (status, out) == (0, f"wrote {run / 'report.html'}\n")
    page = (run / "report.html").read_text()
    for part in ("Run run", "Loss", "Gradient norm before clipping", "Configuration", "peak_lr"):
        assert part in page


# --------------------------------------------------------------------------------------------------------------- train
@pytest.mark.parametrize("name", ["moonlight_16b", "k25_1b", "k25_100m"])
def test_data_of_the_real_experiments_are_reported_missing_before_anything_is_written(k25, tmp_path, name, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    status, out, err = k25("train", f"--config=experiments/pretrain/{name}.py", f"--workdir={tmp_path / 'run'}")
    assert status == 2 and out == "" and not any(tmp_path.iterdir())
    assert err.count("\n") == 1 and err.startswith("k25 train: error: data") and "data/" in err


def test_a_mesh_that_this_machine_does_not_have_is_one_line(k25, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    config = ("--config=experiments/pretrain/k25_1t.py:runlocal", "--config.mesh.expert=64")
    status, out, err = k25("train", *config, f"--workdir={tmp_path / 'run'}")
    assert status == 2 and out == "" and not any(tmp_path.iterdir())
    assert err.count("\n") == 1 and "needs a multiple of 64 devices, there are 1; set mesh.pipe" in err


def test_an_experiment_of_the_real_size_shrinks_to_this_machine(tmp_path):
    """All of it: bfloat16, rematerialisation, the tasks, checkpoints."""
    result = runs.k25("train", "--config=experiments/pretrain/k25_1t.py:runlocal", f"--workdir={tmp_path}", "--json")
    assert result.returncode == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert metrics["step"] == 4 and metrics["bad"] == 0 and 4 < metrics["loss"] < 8 and metrics["media_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("spec", [
    "pretrain/moonlight_16b.py:runlocal", "pretrain/k25_1b.py:runlocal", "pretrain/k25_100m.py:runlocal",
    "midtrain/passkey.py:runlocal", "midtrain/k25_1t.py:131072,runlocal", "midtrain/k25_1t.py:262144,runlocal",
])  # fmt: skip
def test_the_other_experiments_shrink_too(tmp_path, spec):
    """Those that tests/train/test_stages.py does not run."""
    config = f"--config=experiments/{spec}"
    result = runs.k25("train", config, f"--workdir={tmp_path}", "--json", "--config.train.steps=2")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["step"] == 2


# ---------------------------------------------------------------------------------------------------------- mistakes
MISTAKES = {
    "an unknown command": ("tarin", "no command 'tarin'; did you mean 'train'?"),
    "an unknown command of data": ("data chekc", "no command 'chekc'; did you mean 'check'?"),
    "help on an unknown command": ("help servr", "did you mean 'serve'?"),
    "an unknown flag": ("{ask} --temprature=0", "unknown argument --temprature=0; did you mean '--temperature'?"),
    "an unknown flag before all": ("--verson", "unknown argument --verson; did you mean '--version'?"),
    "a required flag misspelt": ("train --confg=a.py", "unknown argument --confg=a.py; did you mean '--config'?"),
    "a word too many": ("generate hello", "unknown argument hello"),
    "an unknown choice": ("{ask} --mode=thinkin", "--mode: no choice 'thinkin'; did you mean 'thinking'?"),
    "a flag without its value": ("{ask} --seed", "--seed"),
    "a required flag left out": ("convert", "--checkpoint"),
    "a number that is none": ("{ask} --top_p=high", "--top_p"),
    "no experiment file": ("train --config={file}x", "did you mean '{file}'"),
    "an unknown override": ("train --config={file} --config.train.stepz=5", "'stepz'; did you mean 'steps'?"),
    "an unknown section": ("params --config={file} --config.trian.steps=5", "'trian'; did you mean 'train'?"),
    "an ill-typed override": ("train --config={file} --config.train.steps=x", "train.steps must be int, not 'x'"),
    "an override without value": ("train --config={file} --config.train.steps", "--config.train.steps has no value"),
    "an entry that is not there": ("train --config={file} --config.data.sources.1.weight=2", "has entries 0 to 0"),
    "a source that is missing": ("{train} --config.data.sources=[{{'path':'no.jsonl'}}]", "no.jsonl"),
    "another model in the folder": ("{train} --workdir={run} --config.model.text.heads=4", "another model"),
    "a start that is missing": ("{train} --config.train.init_from={tmp}/no", "{tmp}/no"),
    "an unknown preset": ("params --preset=100b", "did you mean '100m'"),
    "no checkpoint": ("generate --checkpoint={tmp}/no --prompt=a", "{tmp}/no is neither a run"),
    "an empty run": ("generate --checkpoint={empty} --prompt=a", "{empty}/checkpoints"),
    "ids that are no numbers": ("{ask} --prompt_ids=1,x", "--prompt_ids='1,x'"),
    "an id beyond the vocabulary": ("{ask} --prompt_ids=1,288", "[288]"),
    "an id beyond any": ("{ask} --prompt_ids=99999999999999999999", "[99999999999999999999]"),
    "a negative id": ("{ask} --prompt_ids=-1", "[-1]"),
    "no token": ("{ask} --raw --prompt=", "prompt 0 is empty"),
    "a missing image": ("{ask} --prompt=a --image=no.png", "no.png: there is no such file"),
    "a broken image": ("{ask} --prompt=a --image={broken}", "{broken}: "),
    "a missing video": ("{ask} --prompt=a --video=no.mp4", "no.mp4"),
    "an image without its place": ("{ask} --prompt_ids=1 --image={image}", "0 media_pad tokens"),
    "a place without its image": ("{ask} --prompt_ids=264,264 --image={image}", "2 media_pad tokens"),
    "too long a prompt": ("{ask} --raw --prompt={long}", "context of 128"),
    "too long an answer": ("{ask} --prompt=a --max_tokens=1000", "context of 128"),
    "too large an image": ("{ask} --prompt=a --image={large}", "context of 128"),
    "no room for an answer": ("{ask} --prompt=a --max_tokens=0", "max_tokens=0"),
    "an impossible temperature": ("{ask} --prompt=a --temperature=-1", "temperature=-1"),
    "a temperature that is no number": ("{ask} --prompt=a --max_tokens=5 --temperature=nan", "temperature=nan"),
    "an impossible top_p": ("{ask} --prompt=a --top_p=1.5", "top_p=1.5"),
    "an empty stop text": ("{ask} --prompt=a --stop=", "--stop is empty"),
    "a seed beyond 64 bits": ("{ask} --prompt=a --max_tokens=5 --seed=9223372036854775808", "seed"),
    "a server for all without a key": ("serve --checkpoint={tmp}/no --host=0.0.0.0", "needs an API key"),
    "a key that is not there": ("serve --api_key_env=NO_SUCH_KEY", "$NO_SUCH_KEY holds no API key"),
    "two keys": ("serve --api_key_env=A --api_key_file={file}", "--api_key_file"),
    "no folder of media": ("serve --media_root={tmp}/no", "--media_root={tmp}/no"),
    "no answers at once": ("serve --slots=0", "slots=0 must be at least 1"),
    "a port that is none": ("serve --port=70000", "port=70000"),
    "nothing to serve": ("serve --checkpoint={tmp}/no", "{tmp}/no is neither a run"),
    "nothing to convert": ("convert --checkpoint={tmp}/no --output={tmp}/out", "{tmp}/no is neither"),
    "a folder that is in use": ("convert --checkpoint={run} --output={tmp}", "{tmp}"),
    "no run to report": ("report --workdir={tmp}/no", "{tmp}/no"),
    "a folder that is no run": ("demo --workdir={tmp}", "{tmp} holds something other than a run"),
    "a place that cannot be written": ("train --config={file} --workdir=/proc/no", "/proc/no"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_thing(k25, finished, tmp_path, mistake):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    shutil.copy(finished.run / "experiment.json", tmp_path / "empty")
    image = finished.file.parent / "data" / "0.png"
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:60])
    Image.new("RGB", (700, 700)).save(tmp_path / "large.png")
    names = dict(file=finished.file, run=finished.run, tmp=tmp_path, empty=tmp_path / "empty", image=image)
    names |= dict(broken=tmp_path / "broken.png", large=tmp_path / "large.png", long="a" * 200)
    names |= dict(ask=f"generate --checkpoint={finished.run}")
    names |= dict(train=f"train --config={finished.file} --workdir={tmp_path / 'run'}")
    command, message = (text.format(**names) for text in MISTAKES[mistake])
    status, out, err = k25(*command.split())
    assert status == 2 and out == "", (out, err)
    assert message in err and err.startswith("k25"), err
    assert err.count("\n") == 1, err
    assert runs.step_of(finished.run) == runs.STEPS
