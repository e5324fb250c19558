r"""Several processes on this machine that train together, as hosts of a pod do: for tests, and to try a run out.

    python launch/local.py --processes=2 --devices-each=4 -- k25 train --config=experiments/pretrain/demo.py --workdir=two \
        --config.data.packs=8 --config.data.lanes=2

Process 0 writes to the terminal as if it were alone; the lines of the others have their number in front. Ctrl-C and SIGTERM
go to all. When one process fails the others end too, and this command ends with the status of the first that failed.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 45.0  # seconds for the others to end by themselves, as they do when they notice; a signal cuts it to SIGNALLED
SIGNALLED = 20.0


def main(argv: list[str] | None = None) -> int:
    """The status of the first process that failed; 0 when all went well."""
    args = parse(argv)
    address = f"127.0.0.1:{free_port()}"
    processes = [start(args, address, index) for index in range(args.processes)]
    readers = [
        threading.Thread(target=forward, args=(index, pipe, target), daemon=True)
        for index, process in enumerate(processes[1:], 1)
        for pipe, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    failed, status = wait(processes)
    for reader in readers:
        reader.join(timeout=5)
    if failed is not None:
        print(f"launch/local.py: process {failed} {describe(status)}; the others were ended", file=sys.stderr)
    return 128 - status if status < 0 else status


def parse(argv) -> argparse.Namespace:
    """The flags, and the command after `--`."""
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many; default 2")
    parser.add_argument("--devices-each", type=int, default=1, metavar="N", help="CPU devices of a process; default 1")
    parser.add_argument("command", nargs="+", help="what each process runs, after --")
    args = parser.parse_args(argv)
    for name in ("processes", "devices_each"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least 1")
    return args


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(args, address: str, index: int) -> subprocess.Popen:
    """Process `index`, in a session of its own: Ctrl-C reaches it through here, once."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices_each}"
    place = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(index),
    }
    variables = os.environ | place | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE if index else None
    try:
        return subprocess.Popen(args.command, env=variables, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        sys.exit(f"launch/local.py: error: {args.command[0]}: {error.strerror}")


def forward(index: int, pipe, target) -> None:
    """Copy lines with the number of the process in front."""
    for line in pipe:
        target.write(f"[{index}] {line.decode(errors='replace')}")
        target.flush()


def wait(processes: list[subprocess.Popen]) -> tuple[int | None, int]:
    """(the first process that failed or None, its status) after all have ended, by themselves or by us."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    failed, status, deadline = None, 0, float("inf")
    while any(process.poll() is None for process in processes):
        while received:
            number = received.pop(0)
            send(processes, number)
            deadline = min(deadline, time.monotonic() + SIGNALLED)
        for index, process in enumerate(processes):
            if failed is None and process.poll():
                failed, status = index, process.returncode
                deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
        time.sleep(0.05)
    for index, process in enumerate(processes):
        if failed is None and process.returncode:
            failed, status = index, process.returncode
    return failed, status


def send(processes: list[subprocess.Popen], number: int) -> None:
    """A signal to those that still run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def describe(status: int) -> str:
    """What became of a process with this status."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"


if __name__ == "__main__":
    sys.exit(main())
