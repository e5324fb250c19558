"""What JAX is told before it starts: where compiled programs are kept from run to run, and which chips there are.

JAX reads environment variables when it is imported, and processes that this one starts inherit them. A variable of JAX's
that is set already is left alone.
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import platform
import shutil
import stat
import sys
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__)

OFF = "K25_NO_CACHE"  # this variable turns the cache off
MOST_BYTES = 2**30  # of compiled programs; those that were not used for longest go
LEAST_SECONDS = 0.1  # programs that compile faster than this are not kept
STALE = 30 * 24 * 3600.0  # seconds after which the programs of another JAX or processor go
OTHER_DEVICES = ("0x0042", "0x001f")  # of Google's in a virtual machine that are no TPU: network, disk


def prepare(no_cache: bool = False) -> None:
    """Set JAX up; call it before anything imports jax. The cache is off with `no_cache`, or where K25_NO_CACHE is set."""
    if not os.environ.get("JAX_PLATFORMS") and (platforms := _platforms()):
        _tell("jax_platforms", platforms)
    if no_cache or os.environ.get(OFF, "") not in ("", "0"):
        os.environ[OFF] = "1"  # for the processes that this one starts
        _tell("jax_enable_compilation_cache", False)
    elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            folder = _folder()
        except OSError as problem:
            logger.info("compiled programs are not kept: %s", problem)
            return
        _tell("jax_compilation_cache_dir", str(folder))
        _tell("jax_compilation_cache_max_size", MOST_BYTES)
        _tell("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def _tell(name: str, value: str | int | float | bool) -> None:
    """Set a configuration value of JAX, for this process and those that it starts."""
    os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    if "jax" in sys.modules:  # which has read its variables already
        sys.modules["jax"].config.update(name, value)


# ---------------------------------------------------------------------------------------------------------------- cache
def _folder() -> pathlib.Path:
    """The folder for programs of this JAX on this processor, which only this user can write; raises OSError.

    A program is machine code: what was compiled on one processor can fail on another that shares the same home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = pathlib.Path(base, "k25_jax", f"{importlib.metadata.version('jaxlib')}-{_processor()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} can be written by others, who could change the programs in it")
    (folder / "used").touch()
    with _locked(folder):
        _sweep(folder)
    for other in folder.parent.iterdir():
        if other != folder and time.time() - _used(other) > STALE:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _processor() -> str:
    """A name for the kind of this processor."""
    known = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        known += sorted({line.strip() for line in file if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """The lock that JAX holds while it reads or writes an entry."""
    import filelock

    try:
        with filelock.FileLock(folder / ".lockfile", timeout=5.0):
            yield
    except filelock.Timeout as problem:
        raise OSError(f"{folder} is locked by another process") from problem


def _sweep(folder: pathlib.Path) -> None:
    """Remove what a killed process left half written: JAX writes an entry first, then the time of its use."""
    names = {entry.name for entry in os.scandir(folder)}
    for name in names:
        base, _, kind = name.rpartition("-")
        if (kind, f"{base}-atime" in names) == ("cache", False) or (kind, f"{base}-cache" in names) == ("atime", False):
            (folder / name).unlink(missing_ok=True)


def _used(folder: pathlib.Path) -> float:
    try:
        return (folder / "used").stat().st_mtime
    except OSError:
        return time.time()  # not ours


# ---------------------------------------------------------------------------------------------------------------- chips
def _platforms() -> str:
    """What to tell JAX where libtpu is installed and there is no TPU: libtpu would look for one and complain; else ""."""
    if importlib.util.find_spec("libtpu") is None or _has_tpu():
        return ""
    plugins = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return "cuda,cpu" if plugins and os.path.exists("/dev/nvidia0") else "cpu"


def _has_tpu() -> bool:
    """Whether there is a TPU chip, or a device of Google's that may be one."""
    if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    for device in pathlib.Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
            if vendor == "0x1ae0" and kind not in OTHER_DEVICES:
                return True
    return False
