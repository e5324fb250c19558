"""The command that runs a program in bubblewrap: what it sees of this machine, and what it may write.

It sees /usr, the folders of this Python and a few files of /etc, all read-only; nothing of any home but these; no
network, no process but its own. It may write to /tmp and /dev/shm, which are in memory and of limited size. It cannot
make namespaces of its own, and some system calls (`sandbox.syscalls`) are not there.

bubblewrap as root would keep root's user id in there, and Linux does not limit root's processes. So root starts it as
NOBODY, in a first bubblewrap that shows these folders, which may lie below a folder of root's, and that ends with us: a
signal from root without its rights would not reach NOBODY.
"""

import os
import shutil
import sys
from pathlib import Path

from k25_jax.sandbox.observation import InfrastructureError

NOBODY = 65534
REMEDY = "install it (Debian, Ubuntu: apt install bubblewrap; version 0.8 or later), or say unconfined=True"
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64")
_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/fonts")
_BECOME = "import os, sys; os.setgroups([]); os.setgid({0}); os.setuid({0}); os.execv(sys.argv[1], sys.argv[1:])"


class SandboxError(InfrastructureError):
    """A sandbox that cannot be made or used; the message says why, and the remedy."""


def command(
    program: list[str], files: dict[str, str], disk_bytes: int, env: dict[str, str], info: list[int], seccomp: int
) -> list[str]:
    """How to start a program in /tmp/work. `files`: those to show besides, inside -> here.

    Each bubblewrap, the outer one first, tells the id of its first process to the next descriptor in `info`. `seccomp`:
    one with the filter of system calls.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError(f"bubblewrap (bwrap) is not there, and what a model writes runs only in it: {REMEDY}")
    bwrap = os.path.realpath(bwrap)
    inner = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
    inner += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
    inner += ["--info-fd", str(info[-1]), "--seccomp", str(seccomp)]
    for name, value in env.items():
        inner += ["--setenv", name, value]
    inner += [*_memory(disk_bytes, "/tmp"), *_view([])]  # in this order: this Python may lie below /tmp
    inner += ["--proc", "/proc", "--dev", "/dev", *_memory(disk_bytes, "/dev/shm")]
    inner += ["--dev-bind", "/dev/full", "/dev/zero"]  # reads the same, and cannot be mapped: memory that nobody counts
    inner += ["--remount-ro", "/dev"]
    inner += ["--dir", "/tmp/work", "--dir", "/tmp/home", *_memory(2**20, "/run")]
    for inside, here in files.items():
        inner += ["--ro-bind", here, inside]
    inner += ["--remount-ro", "/", "--chdir", "/tmp/work", "--", *program]
    if layers() == 1:
        return inner
    outer = [bwrap, "--die-with-parent", "--unshare-pid", "--info-fd", str(info[0])]
    outer += ["--perms", "1777", "--dir", "/tmp", *_view([*files.values(), bwrap])]
    outer += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--chdir", "/"]
    outer += ["--bind", "/proc", "/proc", "--dev", "/dev", "--proc", "/pids"]
    return [*outer, "--", python(), "-I", "-S", "-c", _BECOME.format(NOBODY), *inner]


def python() -> str:
    """This Python by a path that bubblewrap finds: whole, with no "..", and no link but the last name."""
    folder, name = os.path.split(sys.executable)
    return os.path.join(os.path.realpath(folder), name)


def layers() -> int:
    """How many bubblewraps there are, one in the other."""
    return 2 if os.getuid() == 0 else 1


def root(pids: list[int]) -> str:
    """Where this machine sees the files of the program, from what came on `info`."""
    inner = f"/proc/{pids[0]}/root/pids/{pids[1]}" if len(pids) == 2 else f"/proc/{pids[0]}"
    return f"{inner}/root"


def _pythons() -> list[str]:
    """The folders of this Python that are not below /usr."""
    prefixes = (sys.prefix, sys.base_prefix)
    folders = {os.path.realpath(prefix) for prefix in prefixes}
    given = {os.path.abspath(prefix) for prefix in prefixes}  # which scripts name in their first line
    folders |= {folder for folder in given if os.path.realpath(folder) in folders}
    home = os.path.realpath(Path.home())
    for folder in folders:
        if Path(home).is_relative_to(folder):
            raise SandboxError(f"this Python's folder {folder} holds {home}: use a virtual environment of its own")
    return sorted(folder for folder in folders if not Path(folder).is_relative_to("/usr"))


def _view(more: list[str]) -> list[str]:
    """Options that show what a program needs, and `more`, read-only."""
    shown = [*_pythons(), *(path for path in more if not Path(path).is_relative_to("/usr"))]
    above = {str(parent) for path in (*shown, *_FILES) for parent in Path(path).parents}
    options = [option for folder in sorted(above - {"/"}) for option in ("--perms", "0755", "--dir", folder)]
    options += ["--ro-bind", "/usr", "/usr"]
    for name in _LINKS:
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    for path in _FILES:
        options += ["--ro-bind-try", path, path]
    for path in shown:
        options += ["--ro-bind", path, path]
    return options


def _memory(size: int, folder: str) -> list[str]:
    return ["--size", str(size), "--tmpfs", folder]
