"""Control groups, on plain files: the machines of these tests need have none."""

import subprocess

import pytest

from k25_jax.sandbox import cgroup


def own(root):
    """The folder of this process's group below a root of our own."""
    lines = open("/proc/self/cgroup").read().splitlines()
    path = next((line for line in lines if line.startswith("0::")), None)
    folder = root / path[3:].strip("/") if path else root
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_none_without_controllers(tmp_path):
    (own(tmp_path) / "cgroup.subtree_control").write_text("cpu memory")
    assert cgroup.make(2**20, 10, tmp_path) is None
    assert cgroup.make(2**20, 10, tmp_path / "nowhere") is None


def test_limits_and_what_they_say(tmp_path):
    (own(tmp_path) / "cgroup.subtree_control").write_text("cpu memory pids\n")
    group = cgroup.make(2**20, 10, tmp_path)
    if group is None:
        pytest.skip("no cgroup v2 is mounted on this machine")
    assert (group / "memory.max").read_text() == "1048576" and (group / "pids.max").read_text() == "10"
    assert (group / "memory.oom.group").read_text() == "1"
    assert not cgroup.out_of_memory(group)
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 0\n")
    assert not cgroup.out_of_memory(group)
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert cgroup.out_of_memory(group)


def test_a_program_starts_inside(tmp_path):
    done = subprocess.run(cgroup.inside(tmp_path, ["echo", "$0", "two words"]), capture_output=True, text=True)
    assert done.stdout == "$0 two words\n" and (tmp_path / "cgroup.procs").read_text() == "0\n"
