"""Headers, indexes and configs that are damaged or lie: one line that names the file, and nothing that hangs."""

import copy
import json
import os
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from k25_jax.checkpoint.hf_config import read_config, write_config
from k25_jax.checkpoint.store import CheckpointError
from k25_jax.checkpoint.tensor_files import INDEX, TensorFiles, read_header
from k25_jax.config import preset

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.full((2, 2), 7, np.int32),
    "empty": np.zeros((0, 3), np.float32),
}
EXPECTED = {"a": (2, 3), "b": (4,)}
HUGE = [
    float("inf"),
    float("-inf"),
    float("nan"),
    1e308,
    1e999,
    2**63,
    2**64,
    10**400,
    -1,
    1.0,
    True,
    None,
    "1",
    [],
    {},
]


@pytest.fixture
def good(tmp_path):
    """A folder with one file of weights."""
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def split(file) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(file, header, data: bytes, length: int | None = None):
    """Write a file of this header: a dictionary, or bytes as they are."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(head) if length is None else length).to_bytes(8, "little") + head + data)


def everything(folder) -> dict[str, np.ndarray]:
    files = TensorFiles(folder, lambda name: name)
    files.check(EXPECTED, lambda name: name in TENSORS)
    return {name: files.read(name) for name in files.tensors}


def refused(folder) -> str:
    """The one line that refuses to read a folder."""
    with pytest.raises(CheckpointError) as error:
        everything(folder)
    line = str(error.value)
    assert "\n" not in line and str(folder) in line and len(line) < 1000, line
    return line


def test_a_good_file_is_read(good):
    found = everything(good)
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)


# ------------------------------------------------------------------------------------------------------------- entries
@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize("field", ["shape", "data_offsets"])
def test_numbers_that_are_none(good, field, value):
    file = good / "model.safetensors"
    header, data = split(file)
    for place in range(2):
        lie = copy.deepcopy(header)
        lie["a"][field][place] = value
        join(file, lie, data)
        assert "corrupt header" in refused(good)
    join(file, header | {"a": header["a"] | {field: value}}, data)
    assert "corrupt header" in refused(good)


ENTRIES = {
    "three offsets": lambda h: h["a"]["data_offsets"].append(30),
    "one offset": lambda h: h["a"]["data_offsets"].pop(),
    "turned round": lambda h: h["a"]["data_offsets"].reverse(),
    "overlap": lambda h: h.update(b=h["b"] | {"data_offsets": [0, 8]}),
    "the same twice": lambda h: h.update(d=dict(h["a"])),
    "a hole": lambda h: h.pop("a"),
    "beyond the file": lambda h: h.update(d={"dtype": "U8", "shape": [2**40], "data_offsets": [48, 48 + 2**40]}),
    "larger than its bytes": lambda h: h["a"]["shape"].append(2),
    "a product of 2**64": lambda h: h["a"].update(shape=[2**32, 2**32]),
    "many sizes": lambda h: h["a"].update(shape=[2, 3] + [1] * 100_000),
    "many huge sizes": lambda h: h["a"].update(shape=[2**62] * 100_000),
    "an unknown dtype": lambda h: h["a"].update(dtype="F31"),
    "a dtype that is no text": lambda h: h["a"].update(dtype=["F32"]),
    "no dtype": lambda h: h["a"].pop("dtype"),
    "no shape": lambda h: h["a"].pop("shape"),
    "an entry that is a list": lambda h: h.update(a=[1, 2]),
    "an entry that is null": lambda h: h.update(a=None),
    "a name of two lines": lambda h: h.update({"x\ny": h.pop("a")}),
    "a name that is no text": lambda h: h.update({"\ud800": h.pop("a")}),
    "no name": lambda h: h.update({"": h.pop("a")}),
    "a long name": lambda h: h.update({"a" * 10_000: h.pop("a")}),
}


@pytest.mark.parametrize("lie", ENTRIES)
def test_entries_that_cannot_be(good, lie):
    file = good / "model.safetensors"
    header, data = split(file)
    ENTRIES[lie](header)
    join(file, header, data)
    assert "corrupt header" in refused(good) or lie == "beyond the file"


# ------------------------------------------------------------------------------------------------------ whole headers
ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
HEADERS = {
    "nested 5,000 deep": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nested objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "nested and never closed": b"[" * 200_000,
    "nested in the metadata": b'{"__metadata__":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "ten million lists": b"[" + b"[]," * 10_000_000 + b"[]]",
    "a name twice": b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}",
    "a field twice": b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "not UTF-8": b'{"\xff":' + ENTRY + b"}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "a list": b"[]",
    "a number": b"7",
    "nothing": b"",
    "spaces": b" " * 64,
    "zeros": bytes(64),
    "a number of many digits": b'{"a":' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_none(good, name):
    join(good / "model.safetensors", HEADERS[name], b"")
    assert "corrupt header" in refused(good)


@pytest.mark.parametrize("length", [1, 7, 10**6, 2**31, 2**63, 2**64 - 1])
def test_lengths_that_are_not_the_headers(good, length):
    header, data = split(good / "model.safetensors")
    join(good / "model.safetensors", header, data, length)
    refused(good)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_files_that_are_cut_off(good, size):
    file = good / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(good)


def test_three_hundred_headers_with_random_damage(good):
    """What is read of each is what was written, or one line names the file."""
    file, generator, read = good / "model.safetensors", random.Random(0), 0
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    for _ in range(300):
        damaged = bytearray(original)
        for _ in range(generator.randrange(1, 4)):
            place = generator.randrange(8 + length)
            if generator.random() < 0.5:
                damaged[place] = generator.choice(b'0123456789[]{}",:-.eE \\u\xff\0' + original[8 : 8 + length])
            elif generator.random() < 0.5:
                del damaged[place : place + generator.randrange(1, 9)]
            else:
                damaged[place:place] = generator.choice([b"0", b"[", b"-", b",", b"9" * 30, b'"', b"e9", b"{}", b"NaN"])
        file.write_bytes(damaged)
        try:
            found = everything(good)
        except CheckpointError as error:
            assert ("\n" not in str(error) or " problems\n" in str(error)) and str(good) in str(error)
        else:
            read += 1
            for name in EXPECTED:
                np.testing.assert_array_equal(found[name], TENSORS[name])
    assert read < 100


# ------------------------------------------------------------------------------------------------- what is not a file
def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def circle(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [pipe, device, folder, circle])
def test_pipes_devices_and_folders_in_place_of_files(tmp_path, make):
    make(tmp_path / "model.safetensors")
    refused(tmp_path)
    (tmp_path / "shards").mkdir()
    make(tmp_path / "shards" / "1.safetensors")
    (tmp_path / "shards" / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    refused(tmp_path / "shards")
    for name in (INDEX, "config.json"):
        (tmp_path / name[:5]).mkdir()
        make(tmp_path / name[:5] / name)
    refused(tmp_path / INDEX[:5])
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(tmp_path / "confi")
    if make is not circle:
        with pytest.raises(CheckpointError, match="model.safetensors is a"):
            read_header(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------- indexes
INDEXES = {
    "out of the folder": {"weight_map": {"a": "../secret"}},
    "far out": {"weight_map": {"a": "../../../../etc/passwd"}},
    "an absolute path": {"weight_map": {"a": "/etc/passwd"}},
    "another system's": {"weight_map": {"a": "..\\secret"}},
    "the folder above": {"weight_map": {"a": ".."}},
    "the folder": {"weight_map": {"a": "."}},
    "a folder inside": {"weight_map": {"a": "sub/model.safetensors"}},
    "no name": {"weight_map": {"a": ""}},
    "a zero": {"weight_map": {"a": "x\0y"}},
    "two lines": {"weight_map": {"a": "x\ny"}},
    "a long name": {"weight_map": {"a": "x" * 300}},
    "a long name in bytes": {"weight_map": {"a": "é" * 200}},
    "half a character": {"weight_map": {"a": "\ud800"}},
    "a tensor of two lines": {"weight_map": {"a\nb": "x"}},
    "a number": {"weight_map": {"a": 3}},
    "null": {"weight_map": {"a": None}},
    "a list of files": {"weight_map": {"a": ["x"]}},
    "a map that is a list": {"weight_map": ["a"]},
    "a map that is null": {"weight_map": None},
    "no map": {"metadata": {}},
    "a list": [],
    "nested": {"weight_map": {"a": "deep"}},
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_that_lie(tmp_path, name):
    text = json.dumps(INDEXES[name])
    (tmp_path / INDEX).write_text(text.replace('"deep"', "[" * 5000 + "]" * 5000))
    assert f"{INDEX} is not an index" in refused(tmp_path)


def test_an_index_of_a_gigabyte_and_one_of_many_missing_files(tmp_path):
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(2**30)
    assert "larger than" in refused(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(20_000)}}))
    with pytest.raises(CheckpointError) as error:
        everything(tmp_path)
    assert "20002 problems" in str(error.value) and len(str(error.value).splitlines()) == 52


# ------------------------------------------------------------------------------------------------------------- configs
CONFIGS = {
    "nested 5,000 deep": '{"model_type":' + "[" * 5000 + "]" * 5000 + "}",
    "nested objects": '{"text_config":' * 5000 + "1" + "}" * 5000,
    "a list": "[]",
    "a text": '"kimi_k25"',
    "null": "null",
    "nothing": "",
    "a field twice": '{"model_type": "kimi_k25", "model_type": "kimi_k2"}',
    "not a number": '{"model_type": "kimi_k2", "rms_norm_eps": NaN}',
    "infinity": '{"model_type": "kimi_k2", "rms_norm_eps": 1e999}',
    "a long type": json.dumps({"model_type": "x" * 10**6}),
    "a type that is a list": json.dumps({"model_type": ["kimi_k25"] * 10**5}),
    "a section that is a list": '{"model_type": "kimi_k25", "text_config": []}',
    "a section that is false": '{"model_type": "kimi_k25", "vision_config": false}',
    "no experts in a group": '{"model_type": "kimi_k2", "n_group": 0}',
    "no original length": '{"model_type": "kimi_k2", "rope_scaling": '
    '{"type": "yarn", "original_max_position_embeddings": 0}}',
    "no merge": '{"model_type": "kimi_k25", "vision_config": {"merge_kernel_size": [0, 2]}}',
    "a size of many digits": '{"model_type": "kimi_k2", "hidden_size": ' + "9" * 1000 + "}",
    "a negative size": '{"model_type": "kimi_k2", "hidden_size": -1}',
    "a rope of many digits": '{"model_type": "kimi_k2", "rope_theta": ' + "-" + "9" * 1000 + "}",
    "too long": " " * 11_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_lie(tmp_path, name):
    (tmp_path / "config.json").write_text(CONFIGS[name])
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    line = str(error.value)
    assert "\n" not in line and str(tmp_path / "config.json") in line and len(line) < 1000


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(write_config(preset("tiny"))), encoding="utf-8")
    assert read_config(tmp_path) == preset("tiny")
