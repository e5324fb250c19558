"""Checkpoints of a run: parameters, optimizer, random stream and data state in one atomic step (Orbax)."""

import contextlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from k25_jax.checkpoint.folders import CheckpointError
from k25_jax.runtime.paths import AnyPath, absolute, to_path


class Store:
    """Asynchronous, atomic checkpoints under `directory`, the newest `keep` of them.

    A killed process leaves at most an unfinished folder, which no reader sees. Orbax does not notice bytes
    that rot on the disk, so each checkpoint holds sums of its arrays, which are compared on reading.
    """

    def __init__(self, directory: str | AnyPath, keep: int = 3, apart: dict[str, tuple[int, ...]] | None = None):
        """`apart` names arrays that are stored in pieces, one for each place along these axes (layout.py: read_apart)."""
        self._apart = apart or {}
        self.directory = absolute(to_path(directory))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._writing = 0  # the step that is being written

    def save(self, step: int, state, data_state: dict, wait: bool = False) -> None:
        """Start writing step `step`, when the write before it is finished; raises what that one failed with."""
        self.wait()
        data = ocp.args.JsonSave({"data": data_state, "sums": sums(state)})
        self._writing = step
        pieces = jax.tree_util.tree_map_with_path(
            lambda path, _: ocp.SaveArgs(shard_axes=self._apart.get(_name(path), ())), state
        )
        with self._writes():
            args = ocp.args.Composite(state=ocp.args.StandardSave(state, save_args=pieces), data=data)
            self._manager.save(step, args=args, force=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the write in progress; raises CheckpointError when it failed."""
        with self._writes():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writes(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise nearly every type there is
            raise CheckpointError(
                f"{self.directory}: checkpoint of step {self._writing} could not be written ({_first_line(error)}); "
                f"free disk space or choose another folder. Complete checkpoints: {self.steps()}"
            ) from error

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract_state, step: int | None = None) -> tuple[object, dict]:
        """(state, data state) of `step`, or of the newest one; leaves follow the shardings of `abstract_state`."""
        step = self._manager.latest_step() if step is None else step
        if step is None or step not in self.steps():
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {self.steps()}")
        return _read(self._manager, self.directory / str(step), ocp.args.StandardRestore(placed(abstract_state)))

    def close(self) -> None:
        """Wait for the last write; raises CheckpointError when it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()


def restore_params(directory: str | AnyPath, abstract_params) -> dict:
    """Only the parameters of the newest checkpoint under `directory`; a run may go on there, so nothing is changed."""
    with _newest(directory) as (manager, folder):
        target = {"params": placed(abstract_params)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        return _read(manager, folder, args)[0]["params"]


def newest_step(directory: str | AnyPath) -> tuple[AnyPath, dict[str, int]]:
    """(folder of the newest checkpoint under `directory`, the sums of its arrays); reads no array."""
    with _newest(directory) as (manager, folder):
        data = manager.restore(int(folder.name), args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        return folder, data["data"]["sums"]


@contextlib.contextmanager
def _newest(directory: str | AnyPath):
    """(manager, folder) of the newest checkpoint under `directory`, which stays as it is."""
    directory = absolute(to_path(directory))
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder; a run writes its first checkpoint into it")
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{directory}: no complete checkpoint")
        yield manager, directory / str(step)


def _read(manager: ocp.CheckpointManager, folder: AnyPath, args) -> tuple[object, dict]:
    """(what `args` asks for, data state) of the checkpoint in `folder`, whose name is its step."""
    composite = ocp.args.Composite(state=args, data=ocp.args.JsonRestore())
    remedy = "delete that folder to go on from an earlier one"
    try:
        restored = manager.restore(int(folder.name), args=composite)
        state, data, expected = restored["state"], restored["data"]["data"], restored["data"]["sums"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if not isinstance(leaf, jax.Array):  # a partial restore leaves what it does not find as it was
                raise ValueError(f"it has no {_name(path)}")
    except Exception as error:  # Orbax and TensorStore raise nearly every type there is
        raise CheckpointError(
            f"{folder}: checkpoint cannot be read ({_first_line(error)}); {remedy}, or check that the configuration "
            "is the one that wrote it"
        ) from error
    damaged = [name for name, number in sums(state).items() if expected.get(name) != number]
    if damaged:
        raise CheckpointError(f"{folder}: checkpoint is damaged ({len(damaged)} arrays, as {damaged[0]}); {remedy}")
    return state, data


def sums(tree) -> dict[str, int]:
    """For each array, by its path, the sum of its bits as unsigned words: changes with any byte of it."""
    return {
        _name(path): int(number) for path, number in jax.tree_util.tree_leaves_with_path(jax.device_get(_sums(tree)))
    }


@jax.jit
def _sums(tree):
    def leaf(a):
        a = jax.device_put(a, jax.memory.Space.Device)  # from the host's memory, where some may lie
        words = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))
        return words.sum(dtype=jnp.uint32)

    return jax.tree.map(leaf, tree)


def placed(abstract_tree):
    """Shapes with a sharding each: their own, else the first device of this process."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or device), abstract_tree)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
