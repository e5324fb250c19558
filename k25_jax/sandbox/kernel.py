"""One Jupyter kernel in a process that can be trusted with nothing, from its start to its end (K2.5 §4.4).

It is spoken to over Unix sockets that lie in its own memory, reached through /proc/PID/root: there is no network, and
nothing that it writes comes to lie on this machine's disk. What comes over these sockets may be forged by the program
in there: it is limited in size, and whatever is not a message as it should be ends the kernel.
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import zmq
from jupyter_client.session import Session

from k25_jax.sandbox import bubblewrap
from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.syscalls import syscall_filter

logger = logging.getLogger(__name__)

PORTS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}
MOST_BYTES = 64 * 2**20  # of one message
BOOTSTRAP = pathlib.Path(__file__).with_name("bootstrap.py")
TICK = 0.2  # seconds between two looks at the kernel's health
SETTLE = 0.05  # seconds of silence after the end of a call: what its child processes print comes late


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a kernel may use. Memory holds for every process, and for all together; disk for /tmp and for /dev/shm."""

    memory_mb: int = 2048
    disk_mb: int = 256
    processes: int = 64  # with all their threads; a kernel has about ten
    cpu_seconds: int = 3600  # of one process, over its whole life
    start_seconds: float = 120.0
    stop_seconds: float = 5.0  # between the interrupt at a deadline and the end of the kernel
    output_chars: int = 20_000
    images: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"Limits.{field.name}={getattr(self, field.name)} must be positive")


class Kernel:
    """Starts at once, in the background; `wait()` until it is ready. Without `unconfined` it needs bubblewrap."""

    def __init__(self, limits: Limits, unconfined: bool = False):
        self.ready = False
        self._limits, self._context, self._monitors = limits, None, []
        self._process, self._pidfd, self._scratch = None, None, None
        self._deadline = time.monotonic() + limits.start_seconds
        self._session = Session(key=secrets.token_hex(32).encode())
        try:
            # Linux kills what a thread has started when the thread ends, as bubblewrap asks it to: so one that stays.
            _starter(os.getpid()).submit(self._start_unconfined if unconfined else self._start).result()
        except OSError as problem:
            self.close()
            raise SandboxError(f"a kernel could not be started: {problem}") from problem
        except BaseException:
            self.close()
            raise

    def _start(self):
        pipes = [os.pipe() for _ in range(bubblewrap.layers())]
        rules, fill = os.pipe()
        try:
            os.write(fill, syscall_filter())
            program, disk = [sys.executable, "-I", "/run/bootstrap.py"], self._limits.disk_mb * 2**20
            files, writing = {"/run/bootstrap.py": str(BOOTSTRAP)}, [writing for _, writing in pipes]
            command = bubblewrap.command(program, files, disk, _environment("/tmp"), writing, rules)
            os.close(fill)
            self._launch(command, {}, "/", "/run", pass_fds=(*writing, rules))
            pids = [self._first_process(reading) for reading, _ in pipes]
        finally:
            for descriptor in (rules, *(end for pipe in pipes for end in pipe)):
                os.close(descriptor)
        self._pidfd = os.pidfd_open(pids[0])
        self._root = bubblewrap.root(pids)

    def _first_process(self, reading: int) -> int:
        """The process id that a bubblewrap tells as JSON."""
        told = b""
        while not told.rstrip().endswith(b"}"):
            if select.select([reading], [], [], 0.1)[0]:
                told += os.read(reading, 4096)
            elif not self.alive():
                raise SandboxError(f"bubblewrap did not start: {self._last_words()}; {bubblewrap.REMEDY}")
            else:
                self._check_start()
        return json.loads(told)["child-pid"]

    def _start_unconfined(self):
        logger.warning("UNCONFINED: what the model writes runs without a sandbox, with all rights of this user")
        self._scratch = tempfile.mkdtemp(prefix="k25-unconfined-")
        for folder in ("work", "home", "run"):
            os.mkdir(os.path.join(self._scratch, folder))
        command = [sys.executable, "-I", str(BOOTSTRAP)]
        work, run = (os.path.join(self._scratch, folder) for folder in ("work", "run"))
        self._launch(command, _environment(self._scratch), work, run, start_new_session=True)
        self._root = ""

    def _launch(
        self, command: list[str], env: dict[str, str], folder: str, run: str, pass_fds=(), start_new_session=False
    ):
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(
            command, cwd=folder, env=env, pass_fds=pass_fds, start_new_session=start_new_session, **streams
        )
        self._address = f"{run}/kernel"
        connection = {f"{name}_port": port for name, port in PORTS.items()}
        connection |= {"transport": "ipc", "ip": self._address, "key": self._session.key.decode()}
        connection |= {"signature_scheme": "hmac-sha256"}
        limits = self._limits
        rlimits = {"RLIMIT_AS": limits.memory_mb * 2**20, "RLIMIT_FSIZE": limits.disk_mb * 2**20, "RLIMIT_CORE": 0}
        rlimits |= {"RLIMIT_CPU": limits.cpu_seconds, "RLIMIT_NOFILE": 512}
        if not self._scratch:  # where it would count all processes of this user
            rlimits["RLIMIT_NPROC"] = limits.processes
        settings = {"connection": connection, "connection_file": f"{run}/connection.json", "limits": rlimits}
        try:
            with self._process.stdin as pipe:
                pipe.write(json.dumps(settings).encode())
        except BrokenPipeError:
            pass  # it has ended already, and said why

    def wait(self):
        """Return when it is ready for code; raises SandboxError, and then it is closed."""
        if not self.ready:
            try:
                self._wait()
                self.ready = True
            except BaseException:
                self.close()
                raise

    def _wait(self):
        while not all(self._is_socket(port) for port in PORTS.values()):
            self._check_start()
            time.sleep(0.02)
        self._context = zmq.Context()
        for option, value in (("RECONNECT_IVL", -1), ("MAXMSGSIZE", MOST_BYTES), ("LINGER", 0)):
            setattr(self._context, option, value)  # for its sockets; none follows what a name may later stand for
        self._iopub, self._shell = self._connect("iopub", zmq.SUB), self._connect("shell", zmq.DEALER)
        self._control = self._connect("control", zmq.DEALER)
        self._iopub.subscribe(b"")
        while True:  # what it publishes is heard only once it knows that somebody listens
            self._session.send(self._shell, "kernel_info_request", {})
            if self._shell.poll(1000) and self._iopub.poll(1000):
                return
            self._check_start()

    def _is_socket(self, port: int) -> bool:
        try:
            return stat.S_ISSOCK(os.lstat(f"{self._root}{self._address}-{port}").st_mode)
        except OSError:
            return False

    def _connect(self, name: str, kind: int) -> zmq.Socket:
        socket = self._context.socket(kind)
        self._monitors.append(socket.get_monitor_socket(zmq.EVENT_DISCONNECTED))
        socket.connect(f"ipc://{self._root}{self._address}-{PORTS[name]}")
        return socket

    def _check_start(self):
        if not self.alive():
            raise SandboxError(f"the kernel ended while it started: {self._last_words()}")
        if time.monotonic() > self._deadline:
            raise SandboxError(
                f"the kernel was not ready after {self._limits.start_seconds:g} s: the machine is overloaded"
            )

    def _last_words(self) -> str:
        try:
            self._process.wait(5)
            return self._process.stderr.read(4000).decode(errors="replace").strip() or self.ending()
        except subprocess.TimeoutExpired:
            return "it says nothing"

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ending(self) -> str:
        """How the process ended."""
        code = self._process.poll()
        number = -code if code is not None and code < 0 else (code or 0) - 128
        names = {int(one): one.name for one in signal.Signals}
        return f"killed by {names[number]}" if number in names else f"exit code {code}"

    def execute(
        self, code: str, seconds: float, heard: Callable[[str, Mapping], None], data: bytes | None = None
    ) -> str:
        """Run code and give its outputs (Jupyter's message type and content) to `heard`.

        With `data` the code is ours, not counted, and finds the data in the buffers of its message.
        Returns "" when it came to its end, "interrupted" when the deadline stopped it, or why the kernel is dead.
        """
        buffers = [] if data is None else [data]
        content = {"code": code, "silent": bool(buffers), "store_history": not buffers, "allow_stdin": False}
        deadline, interrupted, look, idle = time.monotonic() + seconds, False, 0.0, False
        try:
            for _ in range(1000):
                if self._shell.poll(0):
                    self._shell.recv_multipart()  # replies to what came before
            request = self._session.send(self._shell, "execute_request", content, buffers=buffers)["header"]["msg_id"]
            while True:
                now = time.monotonic()
                if idle and (now > deadline or not self._iopub.poll(int(1000 * SETTLE))):
                    return "interrupted" if interrupted else ""
                if now > deadline and interrupted:
                    self.close()
                    return "the call passed its deadline and did not stop when interrupted"
                if now > deadline:
                    self._session.send(self._control, "interrupt_request", {})
                    interrupted, deadline = True, now + self._limits.stop_seconds
                if now > look:
                    look = now + TICK
                    if reason := self._ill():
                        return reason
                if not self._iopub.poll(int(1000 * TICK)):
                    continue
                _, message = self._session.recv(self._iopub, zmq.NOBLOCK)
                if message is None or message["parent_header"].get("msg_id") != request:
                    continue
                kind, content = message["header"]["msg_type"], message["content"]
                if kind == "status" and content["execution_state"] == "idle":
                    idle, deadline = True, now + 4 * SETTLE
                else:
                    heard(kind, content)
        except Exception as problem:  # whatever a forged message can bring about
            logger.warning("a kernel sent what no kernel sends: %s: %.200s", type(problem).__name__, problem)
            self.close()
            return "it sent damaged messages"

    def _ill(self) -> str:
        """Why the kernel is dead, or has to be; "" when it is well."""
        if not self.alive():
            return f"its process ended ({self.ending()})"
        if any(monitor.poll(0) for monitor in self._monitors):  # its sockets do not connect twice
            ended = self._ends_within(3.0)
            self.close()
            return f"its process ended ({self.ending()})" if ended else f"an output was over {MOST_BYTES // 2**20} MB"
        if self._used() > self._limits.memory_mb * 2**20:
            self.close()
            return f"its processes together took more than {self._limits.memory_mb} MB of memory"
        return ""

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _used(self) -> int:
        """Bytes of memory that its processes have filled, as /proc in its own namespace counts them."""
        total = 0
        for file in pathlib.Path(self._root, "proc").glob("[1-9]*/smaps_rollup") if self._root else ():
            try:
                lines = file.read_text().splitlines()
            except OSError:
                continue  # it has ended
            total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        return total * 1024

    def close(self):
        """Kill all its processes, wait for their end, and remove what it has written. May be called again."""
        if self._process is not None:
            try:
                if self._pidfd is not None:
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # the first process: all others go with it
                elif self._scratch:
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._ends_within(5.0)  # which it does once the others are gone
            except ProcessLookupError:
                pass
            self._process.kill()
            self._process.wait()
            self._process.stderr.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._context is not None:
            self._context.destroy(linger=0)
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


@functools.cache
def _starter(pid: int) -> ThreadPoolExecutor:
    """The thread of this process (not of one that it was forked from) that starts kernels."""
    return ThreadPoolExecutor(1, "k25-kernel-starter")


def _environment(base: str) -> dict[str, str]:
    """All that a kernel knows of the environment."""
    # Threads count as processes, and each takes memory.
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    names = {"HOME": f"{base}/home", "IPYTHONDIR": f"{base}/home/.ipython", "TMPDIR": base, "USER": "user"}
    path = f"{os.path.join(sys.prefix, 'bin')}:/usr/bin:/bin"
    return one | names | {"PATH": path, "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1"}
