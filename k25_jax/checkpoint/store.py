"""Checkpoints of a run: parameters, optimizer, random stream and data state in one atomic step (Orbax)."""

import pathlib

import jax
import orbax.checkpoint as ocp


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and the remedy."""


class Store:
    """Asynchronous, atomic checkpoints under `directory`, the newest `keep` of them.

    A killed process leaves at most an unfinished temporary folder, which no reader sees.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 3):
        self.directory = pathlib.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state, data_state: dict, wait: bool = False) -> None:
        """Start writing step `step`; raises what an earlier write failed with."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
        try:
            self._manager.save(step, args=args, force=True)
            if wait:
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.directory}: checkpoint of step {step} could not be written ({error}); free disk space or choose "
                f"another folder. Complete checkpoints: {self.steps()}"
            ) from error

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract_state, step: int | None = None) -> tuple[object, dict]:
        """(state, data state) of `step` or of the newest checkpoint; leaves follow the shardings of `abstract_state`."""
        step = self._manager.latest_step() if step is None else step
        if step is None or step not in self.steps():
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {self.steps()}")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(placed(abstract_state)), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.directory}/{step}: checkpoint cannot be read ({error}); delete that folder to go on from an "
                "earlier one, or check that the configuration is the one that wrote it"
            ) from error
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Wait for the last write."""
        self._manager.wait_until_finished()
        self._manager.close()


def placed(abstract_tree):
    """Shapes with a sharding each: their own, else the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or device), abstract_tree
    )


def restore_params(directory: str | pathlib.Path, abstract_params) -> dict:
    """Only the parameters of the newest checkpoint under `directory`."""
    directory = pathlib.Path(directory).resolve()
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{directory}: no complete checkpoint")
        target = {"params": placed(abstract_params)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        restore = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["params"]
