"""The rules of the house: layers, sizes, and calls that the package does not make."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys

import pytest

import k25_jax

PACKAGE = pathlib.Path(k25_jax.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in FILES]

FORBIDDEN = {
    r"\bpickle\.loads?\b": "pickle runs code from the file; use JSON, safetensors or Orbax",
    r"(?<![\w.])(eval|exec)\(": "runs code from a string; use ast.literal_eval",
    r"\bos\.(system|popen)\b|shell=True": "runs a shell; use subprocess with a list",
    r"\byaml\.load\(": "runs code from the file; use yaml.safe_load",
    r"\btorch\.load\(": "runs code from the file; use safetensors",
    r"^\s*(import|from) (torch|transformers)\b": "PyTorch is for the tests only",
    r"^\s*from \S+ import \*": "name what is imported",
}


def test_layers_import_only_from_below():
    command = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--config', 'setup.cfg'])"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contract_names_the_layers_in_order():
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg")
    layers = contract["importlinter:contract:layers"]["layers"].split()
    order = "runtime config text vision scoring data sharding kernels models losses optim parallel checkpoint "
    order += "sampling serving sandbox agents rl evals"
    assert [layer.strip("()") for layer in reversed(layers)] == [
        *order.split(),
        "report",
        "train",
        "preflight",
        "demo",
        "cli",
        "launch",
    ]


@pytest.mark.parametrize("path", SOURCES)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    if "kernels" not in path.parts:
        assert len(source.splitlines()) <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name}, line {node.lineno}, has {lines} lines; 60 at most"


@pytest.mark.parametrize("path", SOURCES)
def test_no_forbidden_calls(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for pattern, remedy in FORBIDDEN.items():
            assert not re.search(pattern, line), f"{path}:{number}: {line.strip()} ({remedy})"


@pytest.mark.parametrize("path", SOURCES)
def test_every_file_and_public_name_has_its_docstring(path):
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path} does not say what it is for"
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        assert not public or ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_every_folder_of_the_package_is_a_package():
    assert [str(path.parent) for path in FILES if not (path.parent / "__init__.py").exists()] == []


def test_the_forbidden_calls_are_recognised():
    """The patterns find what they are for, and leave what only looks like it."""
    bad = [
        "x = pickle.load(f)",
        "eval(text)",
        "y = exec(code)",
        "os.system('ls')",
        "run(c, shell=True)",
        "torch.load(f)",
    ]
    bad += ["import torch", "    from transformers import AutoModel", "from a.b import *"]
    good = ["ast.literal_eval(text)", "jax.eval_shape(f)", "model.eval()", "import torchlike", "yaml.safe_load(f)"]
    found = [line for line in bad + good if any(re.search(pattern, line) for pattern in FORBIDDEN)]
    assert found == bad
