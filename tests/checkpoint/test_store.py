"""Checkpoints on a disk that is damaged, full, or read while it is written."""

import gc
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from k25_jax.checkpoint.store import CheckpointError, Store, restore_params, sums

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """Orbax drops the readers that failed, which Python reports when it collects them: here, where it is ignored."""
    yield
    gc.collect()


def make_state(seed: int = 0, size: int = 64) -> dict:
    rng = np.random.default_rng(seed)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((size, 2 * size)), jnp.float32) for i in range(4)}
    params["half"] = jnp.asarray(rng.standard_normal(9), jnp.bfloat16)
    return {"params": params, "step": jnp.int32(seed), "key": jnp.arange(2, dtype=jnp.uint32)}


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype and np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def checkpoints(tmp_path) -> pathlib.Path:
    """Steps 1 and 2."""
    store = Store(tmp_path / "c")
    for step in (1, 2):
        store.save(step, make_state(step), {"place": step})
    store.close()
    return tmp_path / "c"


def test_what_is_saved_is_restored(checkpoints):
    store = Store(checkpoints)
    for step in (1, 2):
        state, data = store.restore(abstract(make_state()), step)
        assert_equal(state, make_state(step))
        assert data == {"place": step}
    assert store.restore(abstract(make_state()))[1] == {"place": 2}
    assert_equal(restore_params(checkpoints, abstract(make_state())["params"]), make_state(2)["params"])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there are \[1, 2\]"):
        store.restore(abstract(make_state()), 3)
    store.close()


def test_only_the_newest_are_kept(tmp_path):
    store = Store(tmp_path, keep=2)
    for step in (5, 10, 15):
        store.save(step, make_state(), {}, wait=True)
    assert store.steps() == [10, 15]
    store.close()


def test_steps_that_overwrite_the_buffers_do_not_reach_a_checkpoint_being_written(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    state = make_state(size=512)
    expected = jax.tree.map(np.array, state)
    store = Store(tmp_path)
    store.save(1, state, {})
    for _ in range(20):
        state = advance(state)
    jax.block_until_ready(state)
    store.close()
    assert_equal(Store(tmp_path).restore(abstract(expected))[0], expected)


# ------------------------------------------------------------------------------------------------------------- damage
def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(file: pathlib.Path, how: str):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    {
        "cut": lambda: file.write_bytes(content[: len(content) // 2]),
        "emptied": lambda: file.write_bytes(b""),
        "flipped": lambda: file.write_bytes(content),
        "gone": file.unlink,
    }[how]()


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped", "gone"])
def test_damage_to_any_file_is_harmless_or_an_error_that_names_the_folder(checkpoints, tmp_path, how):
    """Nothing wrong is ever read; only files that are not needed may be damaged without notice."""
    target, readers, errors = abstract(make_state()), 0, 0
    for original in files(checkpoints / "2"):
        copy = shutil.copytree(checkpoints, tmp_path / "copy")
        damage(copy / original.relative_to(checkpoints), how)
        for read, expected in (
            (lambda copy=copy: Store(copy).restore(target), (make_state(2), {"place": 2})),
            (lambda copy=copy: restore_params(copy, target["params"]), make_state(2)["params"]),
        ):
            readers += 1
            try:
                result = read()
            except CheckpointError as error:
                errors += 1
                assert str(copy / "2") in str(error) and "delete that folder" in str(error)
            else:
                assert_equal(result[0], expected[0]) if isinstance(result, tuple) else assert_equal(result, expected)
        shutil.rmtree(copy)
    assert 4 <= errors < readers


def test_damage_to_the_arrays_is_noticed_and_the_step_before_is_whole(checkpoints):
    largest = max(files(checkpoints / "2"), key=lambda file: file.stat().st_size)
    damage(largest, "flipped")
    store, target = Store(checkpoints), abstract(make_state())
    with pytest.raises(CheckpointError, match=r"/2: checkpoint is damaged .*params/w\d"):
        store.restore(target)
    assert_equal(store.restore(target, 1)[0], make_state(1))
    store.close()


def test_the_sums_change_with_any_byte():
    state = make_state()
    before = sums(state)
    assert set(before) == {f"params/{name}" for name in ("w0", "w1", "w2", "w3", "half")} | {"step", "key"}
    for name, leaf in state["params"].items():
        content = bytearray(np.asarray(leaf).tobytes())
        content[5] ^= 1
        changed = np.frombuffer(bytes(content), leaf.dtype).reshape(leaf.shape)
        after = sums(state | {"params": state["params"] | {name: jnp.asarray(changed)}})
        assert {key for key in after if after[key] != before[key]} == {f"params/{name}"}


@pytest.mark.parametrize("change", ["shape", "missing", "added"])
def test_another_model_is_an_error(checkpoints, change):
    params = abstract(make_state())["params"]
    other = {"shape": params | {"w0": jax.ShapeDtypeStruct((9, 9), jnp.float32)},
             "missing": {name: leaf for name, leaf in params.items() if name != "w0"},
             "added": params | {"w9": params["w0"]}}[change]  # fmt: skip
    with pytest.raises(CheckpointError, match="check that the configuration is the one that wrote it"):
        Store(checkpoints).restore(abstract(make_state()) | {"params": other})
    if change != "missing":
        with pytest.raises(CheckpointError, match="check that the configuration is the one that wrote it"):
            restore_params(checkpoints, other)


# -------------------------------------------------------------------------------------------------------------- folder
def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("missing", "empty"):
        with pytest.raises(CheckpointError, match=folder):
            restore_params(tmp_path / folder, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step None; there are \[\]"):
        Store(tmp_path / "new").restore({})


def test_a_reader_leaves_the_write_in_progress_alone(checkpoints):
    """`k25 generate` on a run that is being trained must not take its unfinished checkpoint for rubbish."""
    unfinished = checkpoints / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert_equal(restore_params(checkpoints, abstract(make_state())["params"]), make_state(2)["params"])
    assert unfinished.is_dir()
    store = Store(checkpoints)
    assert store.steps() == [1, 2]
    store.save(3, make_state(3), {}, wait=True)
    assert not unfinished.exists() and store.steps() == [1, 2, 3]
    store.close()


FULL = """
    import os, pathlib, resource, sys
    sys.path[:0] = ["tests", "tests/checkpoint"]
    from test_store import make_state
    from k25_jax.checkpoint.store import CheckpointError, Store

    folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
    store, state = Store(folder / "c"), make_state(size=256)
    store.save(1, state, {"place": 1}, wait=True)
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    else:
        space = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "filler").write_bytes(bytes(space - 300_000))
    for attempt in (lambda: store.save(2, state, {}, wait=True), lambda: store.save(3, state, {}), store.close):
        try:
            attempt()
            print("no error")
        except CheckpointError as error:
            print(error)
"""


def on_full_disk(folder: pathlib.Path, how: str) -> list[str]:
    """What the attempts to save step 2 and wait, to save step 3, and to close end with."""
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(folder), how]
    result = subprocess.run(command, env=runs.environment(), cwd=runs.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def disks(tmp_path):
    """Folders in which one can write little: under a limit on the size of files; on a disk, if one can be mounted."""
    for how in ("limit", "full"):
        (tmp_path / how).mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path / "full")]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    yield [tmp_path / "limit"] + [tmp_path / "full"] * bool(mounted)
    if mounted:
        subprocess.run(["umount", "-l", str(tmp_path / "full")], check=True)


def test_a_full_disk_is_an_error_that_names_the_step_and_spares_the_others(disks):
    for folder in disks:
        second, third, closing = on_full_disk(folder, folder.name)
        assert str(folder / "c") in second and "step 2 could not be written" in second and "[1]" in second
        assert third == "no error" and "step 3 could not be written" in closing  # an error comes with the next call
        (folder / "filler").unlink(missing_ok=True)
        store, state = Store(folder / "c"), make_state(size=256)
        assert_equal(store.restore(abstract(state))[0], state)
        store.save(2, state, {}, wait=True)
        assert store.steps() == [1, 2]
        store.close()
