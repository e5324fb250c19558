"""What a newcomer types: help in every spelling, mistakes told before anything slow is imported, the wheel elsewhere."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
import zipfile

import pytest
from PIL import Image

import runs
from k25_jax import cli
from k25_jax.cli import checks
from k25_jax.config import ConfigError, load_experiment
from k25_jax.config.experiments import names

HEAVY = ("jax", "jaxlib", "flax", "numpy", "ml_collections", "orbax", "rich", "PIL", "yaml")
WITHOUT_JAX = """
import contextlib, io, json, sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("jax", "jaxlib", "flax", "orbax", "tensorstore"):
            raise ImportError(f"{name} is imported")


sys.meta_path.insert(0, Missing())
from k25_jax.cli import main

told = []
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    told.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def python(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)} | variables
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=300)


# ----------------------------------------------------------------------------------------------------------------- help
def test_help_imports_nothing_heavy():
    script = (
        "import sys; from k25_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    )
    done = python("-c", script)
    assert done.returncode == 0 and done.stdout.startswith("usage: k25 ")
    imported = done.stdout.splitlines()[-1]
    assert [name for name in HEAVY if f"'{name}'" in imported] == []


@pytest.mark.parametrize("command, shown", [
    ([], "usage: k25 [-h]"), (["help"], "usage: k25 [-h]"), (["--help"], "usage: k25 [-h]"),
    (["data"], "usage: k25 data"), (["help", "data", "build"], "usage: k25 data build"),
    (["help", "train"], "usage: k25 train"), (["--version"], "k25_jax 0."),
])  # fmt: skip
def test_help_in_every_spelling(capsys, command, shown):
    try:
        status = cli.main(command)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert not status and out.startswith(shown) and err == ""


def test_the_version_names_jax_and_in_a_checkout_the_revision(capsys):
    assert cli.main(["--version"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f"(jax {importlib.metadata.version('jax')}, revision " in line


# ------------------------------------------------------------------------------------------------- told before JAX is there
TOLD = {
    "key": (
        "train --config=pretrain/demo --workdir={folder}/new --config.train.stpes=3",
        "train: unknown key 'stpes'; did you mean 'steps'?",
    ),
    "value": (
        "train --config=pretrain/demo --workdir={folder}/new --config.train.steps=x",
        "train.steps must be int, not 'x'",
    ),
    "index": (
        "train --config=pretrain/demo --workdir={folder}/new --config.data.sources.7.weight=3",
        "data.sources has entries 0 to 4",
    ),
    "no file": (
        "train --config={folder}/a.py",
        "no experiment file {folder}/a.py",
    ),
    "path": (
        "train --config=pretrain/demo --workdir={folder}/new --config.data.sources.0={'path':'{folder}/no.jsonl'}",
        "there is nothing at {folder}/no.jsonl",
    ),
    "task": (
        "train --config=pretrain/demo --workdir={folder}/new --config.data.sources.0.path=digts:train",
        "did you mean 'digits'?",
    ),
    "split": (
        "train --config=pretrain/demo --workdir={folder}/new --config.data.sources.0.path=digits:tarin",
        "no split 'tarin'",
    ),
    "tokenizer": (
        "train --config=pretrain/demo --workdir={folder}/new --config.data.tokenizer={folder}/no",
        "data.tokenizer={folder}/no: there is no such folder",
    ),
    "start": (
        "train --config=pretrain/demo --workdir={folder}/new --config.train.init_from={folder}/no",
        "train.init_from={folder}/no: there is nothing",
    ),
    "vision start": (
        "train --config=pretrain/demo --workdir={folder}/new --config.train.init_vision_from={folder}/no",
        "train.init_vision_from={folder}/no: there is nothing",
    ),
    "other model": (
        "train --config=pretrain/demo --config.model=100m --workdir={folder}/run",
        "{folder}/run holds a run of another model",
    ),
    "no folder": (
        "train --config=pretrain/demo --workdir=/proc/no",
        "--workdir=/proc/no: /proc cannot be written",
    ),
    "in a file": (
        "train --config=pretrain/demo --workdir={folder}/good.png/new",
        "{folder}/good.png is not a folder",
    ),
    "sweep folder": (
        "sweep --config=base/base --workdir=/proc/no",
        "/proc cannot be written",
    ),
    "params": (
        "params --preset=tinny",
        "did you mean 'tiny'?",
    ),
    "preflight": (
        "preflight --config=pretrain/dmo --topology=cpu",
        "did you mean 'pretrain/demo'?",
    ),
    "no model": (
        "generate --prompt=a --checkpoint={folder}/no",
        "{folder}/no is neither a run",
    ),
    "no step": (
        "generate --prompt=a --checkpoint={folder}/run",
        "{folder}/run/checkpoints: no complete checkpoint",
    ),
    "chat": (
        "chat --checkpoint={folder}/no",
        "{folder}/no is neither a run",
    ),
    "no image": (
        "generate --prompt=a --image={folder}/no.png",
        "{folder}/no.png: there is no such file",
    ),
    "bad image": (
        "generate --prompt=a --image={folder}/good.png --image={folder}/text.png",
        "{folder}/text.png: cannot be read as an image",
    ),
    "empty image": (
        "generate --prompt=a --image={folder}/empty.png",
        "{folder}/empty.png: is empty",
    ),
    "pipe": (
        "generate --prompt=a --image={folder}/pipe.png",
        "{folder}/pipe.png: is not a regular file",
    ),
    "folder image": (
        "generate --prompt=a --image={folder}",
        "{folder}: is not a regular file",
    ),
    "no video": (
        "generate --prompt=a --video={folder}/no.mp4",
        "{folder}/no.mp4: there is no such file",
    ),
    "bad video": (
        "generate --prompt=a --video={folder}/text.mp4",
        "{folder}/text.mp4: cannot be read",
    ),
    "ids": (
        "generate --prompt_ids=1,b",
        "'1,b'",
    ),
    "top_p": (
        "generate --prompt=a --top_p=2",
        "top_p=2.0",
    ),
    "heat": (
        "chat --temperature=nan",
        "temperature=nan",
    ),
    "tokens": (
        "chat --max_tokens=0",
        "max_tokens=0",
    ),
    "no server model": (
        "serve --checkpoint={folder}/no",
        "{folder}/no is neither",
    ),
    "key file": (
        "serve --api_key_file={folder}/no.key",
        "{folder}/no.key: No such file",
    ),
    "key variable": (
        "serve --api_key_env=K25_NO_SUCH_KEY",
        "$K25_NO_SUCH_KEY holds no API key",
    ),
    "reach": (
        "serve --host=0.0.0.0",
        "needs an API key",
    ),
    "port": (
        "serve --port=70000",
        "port=70000",
    ),
    "media": (
        "serve --media_root={folder}/no",
        "--media_root={folder}/no",
    ),
    "convert": (
        "convert --checkpoint={folder}/no --output={folder}/out",
        "{folder}/no is neither",
    ),
    "convert output": (
        "convert --checkpoint=base --output=/proc/no",
        "--output=/proc/no",
    ),
    "eval task": (
        "eval --task=digts:test",
        "did you mean 'digits'?",
    ),
    "eval name": (
        "eval --task=aimee",
        "did you mean 'aime'?",
    ),
    "eval split": (
        "eval --task=digits:train",
        "is of the split 'train'",
    ),
    "eval file": (
        "eval --task=aime --data={folder}/no.jsonl",
        "--data: there is nothing at {folder}/no.jsonl",
    ),
    "eval model": (
        "eval --checkpoint={folder}/no",
        "{folder}/no is neither",
    ),
    "report": (
        "report --workdir={folder}/no",
        "no metrics at {folder}/no/metrics.jsonl",
    ),
    "data": (
        "data check --source={folder}/no.jsonl",
        "there is nothing at {folder}/no.jsonl",
    ),
    "data build": (
        "data build --source=digits:train --output={folder}/good.png",
        "{folder}/good.png is not a folder",
    ),
    "data task": (
        "data check --source=wrods:test",
        "did you mean 'words'?",
    ),
    "copy": (
        "experiments --copy=pretrain/demoo",
        "did you mean 'pretrain/demo'?",
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of many mistakes is answered, in a process that has no JAX."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "text.png").write_text("no image")
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "experiment.json").write_text(json.dumps({"name": "run", "model": "tiny"}))
    lists = [command.replace("{folder}", str(folder)).split() for command, _ in TOLD.values()]
    done = python("-c", WITHOUT_JAX, stdin=json.dumps(lists), K25_NO_CACHE="1")
    assert done.returncode == 0, done.stderr
    assert not (folder / "new").exists() and not (folder / "out").exists()
    answers = json.loads(done.stdout)
    return {name: (str(folder), *answer) for name, answer in zip(TOLD, answers, strict=True)}


@pytest.mark.parametrize("mistake", TOLD)
def test_a_mistake_is_told_before_jax_is_imported(told, mistake):
    folder, status, out, err = told[mistake]
    assert status == 2 and out == "", (status, err)
    assert TOLD[mistake][1].replace("{folder}", folder) in err and err.count("\n") == 1 and err.startswith("k25 "), err
    assert err.count(f"{folder}/no.") <= 1, err


def test_a_run_that_goes_on_needs_no_longer_what_it_started_from(tmp_path):
    experiment = load_experiment("pretrain/demo", [f"train.init_from={tmp_path}/gone"])
    with pytest.raises(ConfigError, match="init_from=.*gone"):
        checks.run(experiment, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "100").mkdir(parents=True)
    checks.run(experiment, tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------- the messages
def test_a_file_is_named_once_in_an_error():
    twice = ValueError("/a/b.json cannot be read ([Errno 13] Permission denied: '/a/b.json'); mend it")
    assert cli.one_line(twice) == "/a/b.json cannot be read (Permission denied); mend it"
    assert cli.one_line(FileNotFoundError(2, "No such file or directory", "a b")) == "a b: No such file or directory"
    other = "the copy failed ([Errno 28] No space left on device: '/c')"
    assert cli.one_line(ValueError(other)) == other


def test_a_bug_is_no_mistake_of_the_users():
    ours, theirs = ValueError("a bug"), cli.run.__globals__["Interrupted"](2)
    assert not cli.is_users(ours) and cli.is_users(OSError()) and cli.is_users(type(theirs)(2))
    assert not cli.is_users(TypeError()) and not cli.is_users(KeyError("a"))


def test_warnings_are_one_line_and_said_once(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    level = root.level
    try:
        cli.set_up_logging()
        for _ in range(2):
            logging.getLogger("here").warning("twice")
            warnings.showwarning(UserWarning("in two\n  lines"), UserWarning, "file.py", 3)
    finally:
        root.setLevel(level)
    assert capsys.readouterr().err == "WARNING here: twice\nWARNING UserWarning: in two lines\n"


IN_A_TERMINAL = """
import logging, warnings
from rich.console import Console
from rich.progress import Progress
from k25_jax import cli

cli.set_up_logging()
with Progress(console=Console(stderr=True)) as bar:
    task = bar.add_task("train", total=2)
    bar.refresh()
    logging.getLogger("here").warning("ours")
    warnings.warn("theirs")
    bar.update(task, completed=2)
"""


def test_warnings_stand_above_a_progress_bar():
    code = (
        "import pty, sys; out = bytearray()\n"
        "def read(fd):\n    data = __import__('os').read(fd, 4096); out.extend(data); return b'.' if data else data\n"
        "pty.spawn([sys.executable, '-c', sys.argv[1]], read); print(repr(bytes(out)))"
    )
    done = python("-c", code, IN_A_TERMINAL, TERM="xterm")
    text = done.stdout
    assert "\\x1b[2KWARNING here: ours\\r\\n" in text and "\\x1b[2KWARNING UserWarning: theirs\\r\\n" in text, text
    assert text.count("ours") == text.count("theirs") == 1
    assert text.rindex("theirs") < text.rindex("100%")


# -------------------------------------------------------------------------------------------------------------- the wheel
def test_experiments_are_listed_and_copied(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["experiments"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == names() and all(line.endswith(".") for line in listed)
    assert cli.main(["experiments", "--copy=pretrain/demo"]) == 0 and (tmp_path / "demo.py").is_file()
    assert cli.main(["experiments", "--copy=pretrain/demo"]) == 2 and "demo.py exists" in capsys.readouterr().err
    specs = ("demo.py", "pretrain/demo", "pretrain/demo.py", "experiments/pretrain/demo.py", "pretrain/demo:runlocal")
    assert len({repr(load_experiment(spec)) for spec in specs}) == 1


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools builds the wheel")
def test_the_wheel_has_all_of_it_and_runs_elsewhere(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(runs.ROOT / name, source)
    for name in ("k25_jax", "experiments", "launch"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(runs.ROOT / name, source / name, symlinks=True, ignore=ignore)
    script = (
        "import os, sys; os.chdir(sys.argv[1]); from setuptools.build_meta import *; print(build_wheel(sys.argv[2]))"
    )
    built = python("-c", script, str(source), str(tmp_path))
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        packed = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    tracked = [p for name in ("k25_jax", "experiments", "launch") for p in (source / name).rglob("*.py")]
    wanted = {str(p.relative_to(source)) for p in tracked}
    wanted = {name if name.startswith("k25_jax/") else f"k25_jax/{name}" for name in wanted}
    assert wanted <= packed, wanted - packed
    assert {name.partition("/")[0] for name in packed if ".dist-info" not in name} == {"k25_jax"}
    elsewhere = ["-m", "k25_jax.cli", "experiments"]
    listed = subprocess.run(
        [sys.executable, *elsewhere], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert listed.stdout.count("\n") == len(names()), listed.stderr
    assert (
        "k25-launch = k25_jax.launch.local:main"
        in next((tmp_path / "installed").glob("*.dist-info/entry_points.txt")).read_text()
    )
