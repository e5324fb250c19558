"""A control group for one sandbox, where this machine lets us have one (version 2, with memory and pids).

Then Linux itself holds the limits, kernel memory included, and `sandbox.usage` only says why it ended. Where there is
none, as in most containers and with version 1, looking is all there is. Tested here on plain files only: the machine
that it was written on has no controllers in version 2.
"""

import os
import pathlib
import uuid

ROOT = pathlib.Path("/sys/fs/cgroup")
CONTROLLERS = {"memory", "pids"}


def make(memory_bytes: int, processes: int, root: pathlib.Path = ROOT) -> pathlib.Path | None:
    """A new group with these limits, beside or below the group of this process; None where it cannot be had."""
    try:
        lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
        own = root / next(line for line in lines if line.startswith("0::"))[3:].strip("/")
    except (OSError, StopIteration):
        return None
    for folder in (own, own.parent):
        try:
            if not CONTROLLERS <= set((folder / "cgroup.subtree_control").read_text().split()):
                continue
            group = folder / f"k25-sandbox-{uuid.uuid4().hex}"
            group.mkdir()
        except OSError:
            continue
        limits = {"memory.max": memory_bytes, "pids.max": processes, "memory.swap.max": 0, "memory.oom.group": 1}
        try:
            for name, value in limits.items():
                if name != "memory.swap.max" or (group / name).exists():
                    (group / name).write_text(str(value))
            return group
        except OSError:
            remove(group)
    return None


def inside(group: pathlib.Path, command: list[str]) -> list[str]:
    """The command, run in the group from its first instruction on."""
    return ["/bin/sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', os.fspath(group), *command]


def out_of_memory(group: pathlib.Path) -> bool:
    """Whether Linux has ended a process because the group had too much memory."""
    try:
        events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    except (OSError, ValueError):
        return False
    return events.get("oom_kill", "0") != "0"


def remove(group: pathlib.Path):
    """Remove the group; its processes have ended."""
    try:
        group.rmdir()
    except OSError:
        pass  # a process is still ending: an empty group costs little
