"""Several processes that train together: how they find each other, and which of them reads which part of a batch.

On a TPU pod the same command on every worker is enough. Elsewhere three environment variables say who is who; with none of
them a process is alone. `launch/local.py` sets them for processes of one machine.
"""

import collections
import contextlib
import functools
import glob
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import time
import zlib
from dataclasses import dataclass

import jax
import numpy as np
from jax._src import distributed  # the client of the coordination service has no public name
from jax.sharding import Mesh

from k25_jax.config import ConfigError
from k25_jax.sharding.mesh import AXES
from k25_jax.sharding.rules import RULES

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
JOIN_SECONDS = 120  # for all processes to be there
HEARTBEAT_SECONDS = 100  # JAX aborts a process so long after another fell silent; sharding/peers.py is quicker
GATHER_MILLISECONDS = 3_600_000  # that one process may come later than another; one that died ends all (peers.py)
SHUTDOWN_SECONDS = 60  # that all wait for each other at the end
TOLD_SECONDS = 3600  # that process 0 may be behind the others, while it compiles
TOLD_KEPT = 100  # what process 0 told so many times ago has been read by all, who go step by step


# ------------------------------------------------------------------------------------------------------------ beginning
@contextlib.contextmanager
def joined(seconds: float = JOIN_SECONDS):
    """Be connected to the other processes, if there are any; yields the number of this one. Raises ConfigError.

    Enter it before JAX is used. At its end, unless by an error, all wait for each other.
    """
    _join(seconds)
    if not jax.distributed.is_initialized():
        yield 0
        return
    with _clean_stdout():
        if jax.default_backend() == "cpu":
            # Process 0 alone keeps its programs; later it would load them while the others compile. A loaded program runs
            # collectives that do not depend on each other in an order of its own: all would wait for ever.
            jax.config.update("jax_enable_compilation_cache", False)
        yield jax.process_index()
    jax.distributed.shutdown()


@contextlib.contextmanager
def _clean_stdout():
    """Python alone writes to standard output, which is for results; what Gloo says there goes to standard error."""
    sys.stdout.flush()
    before, output = sys.stdout, os.dup(1)
    os.dup2(2, 1)
    with open(output, "w", buffering=1, closefd=False) as sys.stdout:
        yield
    os.dup2(output, 1)
    os.close(output)
    sys.stdout = before


def _join(seconds: float) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would make SIGTERM do nothing
    place = read_place(os.environ)
    if place is not None:
        address, count, index = place
        if count == 1:
            return
        roll_call(address, count, index, seconds)
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method="deactivate",
            coordinator_bind_address=address if listening(address) else None,
            initialization_timeout=int(seconds) + 1,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    elif on_tpu_vm():
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )


def read_place(variables) -> tuple[str, int, int] | None:
    """(address of process 0, how many, which one) from environment variables; None without them."""
    given = {name: variables[name] for name in (ADDRESS, COUNT, INDEX) if variables.get(name)}
    if not given:
        return None
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing:
        raise ConfigError(f"{', '.join(given)} set without {', '.join(missing)}; set all three, or none")
    address = given[ADDRESS]
    if not re.fullmatch(r"[^:]+:\d{1,5}|\[[^\]]+\]:\d{1,5}", address):
        raise ConfigError(f"{ADDRESS}={address!r} must be HOST:PORT")
    numbers = {}
    for name in (COUNT, INDEX):
        if not given[name].isdecimal():
            raise ConfigError(f"{name}={given[name]!r} must be a whole number")
        numbers[name] = int(given[name])
    count, index = numbers[COUNT], numbers[INDEX]
    if not 0 <= index < count:
        raise ConfigError(f"{INDEX}={index} must lie in [0, {COUNT}={count})")
    return address, count, index


def listening(address: str) -> str:
    """Where process 0 listens: on the loopback alone when it is addressed there, else on every network of its machine."""
    host = address.rpartition(":")[0]
    return host if host == "localhost" or host.startswith("127.") else ""


def on_tpu_vm() -> bool:
    """Whether this machine has TPU chips that JAX may use."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    allowed = "tpu" in platforms and "TPU_SKIP_MDS_QUERY" not in os.environ
    return allowed and bool(chips) and importlib.util.find_spec("libtpu") is not None


def roll_call(address: str, count: int, index: int, seconds: float) -> None:
    """Process 0 waits until each of the others has said once who it is; raises ConfigError in all of them.

    JAX, which takes the port over afterwards, would abort without a word on who is missing.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        if index:
            _report(stack, (host.strip("[]"), int(port)), count, index, deadline)
            return
        try:
            server = stack.enter_context(socket.create_server((listening(address), int(port)), backlog=count))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"{ADDRESS}={address}: process 0 cannot listen there ({error}); another port?") from error
        replies, problem = _collect(stack, server, count, deadline)
        for connection in replies:
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem}\n".encode())
    if problem:
        raise ConfigError(problem)


def _collect(stack, server, count: int, deadline: float):
    """(connections to answer, what is wrong or "") once all have come, or when it is too late."""
    came, replies = {0}, []
    while len(came) < count:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection = stack.enter_context(server.accept()[0])
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            hello = json.loads(connection.makefile().readline())
        except TimeoutError:
            missing = sorted(set(range(count)) - came)
            return replies, f"{COUNT}={count}, but processes {missing} did not come in time; start all of them"
        except (OSError, ValueError):
            continue  # somebody else
        replies.append(connection)
        if hello["count"] != count:
            return replies, f"{COUNT} is {count} in process 0 and {hello['count']} in {hello['index']}; set the same"
        if hello["index"] in came:
            return replies, f"two processes have {INDEX}={hello['index']}; number them from 0 to {count - 1}"
        came.add(hello["index"])
    return replies, ""


def _report(stack, address, count: int, index: int, deadline: float) -> None:
    """Say to process 0 who this is, and hear whether all is well."""
    reason = ""
    while time.monotonic() < deadline:
        try:
            connection = stack.enter_context(socket.create_connection(address, timeout=5))
            connection.settimeout(max(0.01, deadline + 5 - time.monotonic()))
            connection.sendall(json.dumps({"count": count, "index": index}).encode() + b"\n")
            answer = connection.makefile().readline()
        except OSError as error:
            reason = str(error)
        else:
            if answer == "\n":
                return
            if answer:
                raise ConfigError(answer.strip())
            reason = "it hung up"
        time.sleep(0.2)
    where = ":".join(map(str, address))
    raise ConfigError(
        f"process {index} cannot reach process 0 at {ADDRESS}={where} ({reason}); start process 0, or mend the address"
    )


def gathered(value, channel: str = "main") -> list:
    """The JSON `value` of every process, in their order; all must call it, and none goes on before all have.

    It goes through process 0, by the key-value store of JAX's coordination service, and no device has a part in it. Threads
    of a process may call it at the same time, each on a channel of its own; on a channel all call it in the same order.
    """
    if jax.process_count() == 1:
        return [value]
    client, index, turn = distributed.global_state.client, jax.process_index(), next(_turns[channel])
    name = f"k25/gathered/{channel}"
    client.key_value_set_bytes(f"{name}/{turn}/{index}", zlib.compress(json.dumps(value).encode(), 1))
    wait = functools.partial(client.blocking_key_value_get_bytes, timeout_in_ms=GATHER_MILLISECONDS)
    texts = [wait(f"{name}/{turn}/{process}") for process in range(jax.process_count())]
    if turn:  # all have come to this turn, so all have read the one before
        client.key_value_delete(f"{name}/{turn - 1}/{index}")
    return [json.loads(zlib.decompress(text)) for text in texts]


_turns = collections.defaultdict(itertools.count)  # of each channel


_numbers = itertools.count()


def from_first(value):
    """The JSON `value` of process 0; all must call it, alike. No device takes part, and process 0 waits for nobody."""
    if jax.process_count() == 1:
        return value
    client, number = distributed.global_state.client, next(_numbers)
    key = "k25/told/{}".format
    if jax.process_index():
        return json.loads(client.blocking_key_value_get(key(number), 1000 * TOLD_SECONDS))
    client.key_value_set(key(number), json.dumps(value))
    if number >= TOLD_KEPT:
        client.key_value_delete(key(number - TOLD_KEPT))
    return value


def any_signal(number: int) -> int:
    """In process 0 the number of a signal that some process has given here, or 0; 0 elsewhere. Nobody waits."""
    if jax.process_count() == 1:
        return number
    client = distributed.global_state.client
    if jax.process_index():
        if number:
            client.key_value_set(f"k25/signal/{jax.process_index()}", str(number), allow_overwrite=True)
        return 0
    heard = [int(value) for _, value in client.key_value_dir_get("k25/signal/")]
    return max([number, *heard])


def met(what: str) -> None:
    """Wait until all processes are here, for as long as one may need more than another; no device takes part."""
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"k25/{what}/{next(_numbers)}", 1000 * TOLD_SECONDS)


# --------------------------------------------------------------------------------------------------------- who reads what
@dataclass(frozen=True)
class Reader:
    """Processes that hold the same rows of a batch, and so read the same share of the data.

    Usually it is one process; where `context` spans several, they share rows.
    """

    processes: tuple[int, ...]
    rows: tuple[int, ...]  # blocks of rows, of as many as fsdp * expert * pipe
    devices: tuple[int, ...]  # its devices, as places in mesh.devices flattened


def readers(owners: np.ndarray) -> list[Reader]:
    """Who reads, in the order of the first rows; `owners` is the process of each device, in the shape of the mesh.

    Raises ConfigError where the mesh makes two processes share some of their rows but not all.
    """
    order = [AXES.index(axis) for axis in (*RULES["batch"], RULES["length"])]
    of_rows = owners.transpose(order).reshape(-1, owners.shape[order[-1]])
    held = {p: tuple(np.flatnonzero((of_rows == p).any(axis=1)).tolist()) for p in np.unique(owners).tolist()}
    found = []
    for rows in sorted(set(held.values())):
        processes = tuple(p for p in sorted(held) if held[p] == rows)
        devices = np.flatnonzero(np.isin(owners.reshape(-1), processes))
        found.append(Reader(processes, rows, tuple(devices.tolist())))
    if sum(len(reader.rows) for reader in found) != len(of_rows) or len({len(reader.rows) for reader in found}) > 1:
        shape = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, owners.shape, strict=True))
        raise ConfigError(
            f"{shape}: processes share some of their rows of a batch; let a whole multiple of mesh.context x mesh.expert "
            "be the devices of a process, or the other way round"
        )
    return found


def owners_of(mesh: Mesh) -> np.ndarray:
    """The process of each device, in the shape of the mesh."""
    return np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)


def hosts_of(mesh: Mesh) -> list[int]:
    """The processes that have devices of the mesh."""
    return np.unique(owners_of(mesh)).tolist()


def own_reader(everyone: list[Reader]) -> int:
    """The number of the reader that this process is, or is one of."""
    return next(n for n, reader in enumerate(everyone) if jax.process_index() in reader.processes)


def assembled(part: np.ndarray, blocks: tuple[int, ...], of: int, layout, axis: int = 0) -> jax.Array:
    """The array whose `blocks`, of `of` along an axis, are `part` in this order; each process has its own."""
    size = part.shape[axis] // len(blocks)
    where = {block: number for number, block in enumerate(blocks)}

    def piece(index):
        start = where[(index[axis].start or 0) // size] * size
        return part[(*index[:axis], slice(start, start + size), *index[axis + 1 :])]

    return jax.make_array_from_callback((*part.shape[:axis], size * of, *part.shape[axis + 1 :]), layout, piece)


def spread(whole: np.ndarray, layout) -> jax.Array:
    """An array that every process has the whole of, laid out over all their devices; or one that already is."""
    if isinstance(whole, jax.Array) and whole.sharding == layout:
        return whole
    whole = np.asarray(whole)
    return jax.make_array_from_callback(whole.shape, layout, lambda index: whole[index])
