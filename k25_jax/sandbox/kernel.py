"""One Jupyter kernel in a process that can be trusted with nothing, from its start to its end (K2.5 §4.4).

It is spoken to over Unix sockets that lie in its own memory, reached through /proc/PID/root: there is no network, and
nothing that it writes comes to lie on this machine's disk. What comes over these sockets may be forged by the program
in there: it is read under a budget (`sandbox.wire`), and whatever is not a message as it should be ends the kernel. A
thread watches what it uses (`sandbox.usage`) from its first call to its end, between calls too.
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from k25_jax.sandbox import bubblewrap, cgroup
from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.syscalls import syscall_filter
from k25_jax.sandbox.usage import Usage
from k25_jax.sandbox.wire import MOST_BYTES, Closed, Connection, TooLarge

logger = logging.getLogger(__name__)

PORTS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}
BOOTSTRAP = pathlib.Path(__file__).resolve().with_name("bootstrap.py")
TICK = 0.2  # seconds between two looks whether the kernel still runs
SETTLE = 0.05  # seconds of silence after the end of a call: what its child processes print comes late


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a kernel may use. Memory holds for every process, and for all together; disk for /tmp and for /dev/shm."""

    memory_mb: int = 2048
    disk_mb: int = 256
    processes: int = 64  # with all their threads; a kernel has about ten
    cpu_seconds: int = 3600  # of one process, over its whole life
    start_seconds: float = 120.0
    stop_seconds: float = 0.5  # between the interrupt at a deadline and the end of the kernel
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
        self._limits, self._connections, self._scratch, self._group = limits, {}, None, None
        self._process, self._pidfd, self._usage, self._reason = None, None, None, ""
        self._watcher, self._ending = None, threading.Event()
        self._deadline = time.monotonic() + limits.start_seconds
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
            program, disk = [bubblewrap.python(), "-I", "/run/bootstrap.py"], self._limits.disk_mb * 2**20
            files, writing = {"/run/bootstrap.py": str(BOOTSTRAP)}, [writing for _, writing in pipes]
            command = bubblewrap.command(program, files, disk, _environment("/tmp"), writing, rules)
            os.close(fill)
            # Files in /tmp and /dev/shm count as memory there, and each bubblewrap is a process.
            most = self._limits.memory_mb * 2**20 + 2 * disk
            self._group = cgroup.make(most, self._limits.processes + 2 * bubblewrap.layers())
            if self._group is not None:
                command = cgroup.inside(self._group, command)
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
        command = [bubblewrap.python(), "-I", str(BOOTSTRAP)]
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
        # No key: it would lie in the memory of the program that it should keep from forging.
        connection |= {"transport": "ipc", "ip": self._address, "key": "", "signature_scheme": "hmac-sha256"}
        limits = self._limits
        rlimits = {"RLIMIT_AS": limits.memory_mb * 2**20, "RLIMIT_FSIZE": limits.disk_mb * 2**20, "RLIMIT_CORE": 0}
        rlimits |= {"RLIMIT_CPU": limits.cpu_seconds, "RLIMIT_NOFILE": 256, "RLIMIT_SIGPENDING": 1024}
        rlimits |= {"RLIMIT_MSGQUEUE": 0}
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
            except (Closed, OSError) as problem:
                words = self._last_words()
                self.close()
                raise SandboxError(f"the kernel ended while it started: {words}") from problem
            except BaseException:
                self.close()
                raise

    def _wait(self):
        while not all(self._is_socket(port) for port in PORTS.values()):
            self._check_start()
            time.sleep(0.02)
        for name, kind in (("iopub", b"SUB"), ("shell", b"DEALER"), ("control", b"DEALER")):
            path, left = f"{self._root}{self._address}-{PORTS[name]}", self._deadline - time.monotonic()
            self._connections[name] = Connection(path, kind, max(0.1, left))
        iopub, asked = self._connections["iopub"], set()
        while True:  # what it publishes is heard only once it knows that somebody listens
            asked.add(self._connections["shell"].send("kernel_info_request", {}, self._deadline))
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                if iopub.wait(TICK) and (message := iopub.receive()) is not None and message.parent in asked:
                    return
                self._check_start()

    def _is_socket(self, port: int) -> bool:
        try:
            return stat.S_ISSOCK(os.lstat(f"{self._root}{self._address}-{port}").st_mode)
        except OSError:
            return False

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
        """How the process ended, or why it had to."""
        if self._reason:
            return self._reason
        code = self._process.poll()
        number = -code if code is not None and code < 0 else (code or 0) - 128
        names = {int(one): one.name for one in signal.Signals}
        return f"killed by {names[number]}" if number in names else f"exit code {code}"

    def execute(
        self,
        code: str,
        seconds: float,
        heard: Callable[[str, Mapping | None, int], None],
        data: bytes | None = None,
    ) -> str:
        """Run code and give its outputs (Jupyter's message type, content and size) to `heard`.

        With `data` the code is ours, not counted, and finds the data in the buffers of its message.
        Returns "" when it came to its end, "interrupted" when the deadline stopped it, or why the kernel is dead: it is
        being killed then, and has to be closed.
        """
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="k25-kernel-watch", daemon=True)
            self._watcher.start()
        until = time.monotonic() + seconds
        try:
            return self._execute(code, until, heard, [] if data is None else [data])
        except Closed:
            ended = self._ends_within(0.5)
            reason = self._reason or (f"its process ended ({self.ending()})" if ended else "it closed its connections")
        except TooLarge:
            reason = f"an output was over {MOST_BYTES // 2**20} MB"
        except TimeoutError as problem:
            reason = f"the call passed its deadline and {problem}"
        except Exception as problem:  # whatever a forged message can bring about
            logger.warning("a kernel sent what no kernel sends: %s: %.200s", type(problem).__name__, problem)
            reason = "it sent damaged messages"
        self._kill()  # whoever closes it may wait for that
        return reason

    def _execute(self, code: str, until: float, heard: Callable, buffers: list[bytes]) -> str:
        content = {"code": code, "silent": bool(buffers), "store_history": not buffers, "allow_stdin": False}
        iopub, interrupted, idle = self._connections["iopub"], False, False
        for name in ("shell", "control"):  # replies to what came before
            for _ in range(100):
                if not self._connections[name].wait(0):
                    break
                self._connections[name].skip()
        request = self._connections["shell"].send("execute_request", content, until, buffers)
        while True:
            now = time.monotonic()
            if idle and (now > until or not iopub.wait(SETTLE)):
                return "interrupted" if interrupted else ""
            if now > until and interrupted:
                raise TimeoutError("did not stop when interrupted")
            if now > until:
                interrupted, until = True, now + self._limits.stop_seconds
                self._connections["control"].send("interrupt_request", {}, until)
            if self._reason or not self.alive():
                raise Closed
            if not iopub.wait(min(TICK, max(0.0, until - now))):
                continue
            message = iopub.receive(request)
            if message is None:
                continue
            if message.kind == "status" and message.content["execution_state"] == "idle":
                idle, until = True, time.monotonic() + 4 * SETTLE
            else:
                heard(message.kind, message.content, message.size)

    def _watch(self):
        """Kill all processes when they use too much together; a thread of its own."""
        if not self._root:
            return
        most, pause = self._limits.memory_mb * 2**20, 0.0
        try:
            self._usage = Usage(self._root, most)
            while not self._ending.wait(pause):
                began = time.monotonic()
                used = self._usage.look(most)
                if used > most or (self._group is not None and cgroup.out_of_memory(self._group)):
                    self._reason = f"its processes together took more than {self._limits.memory_mb} MB of memory"
                    self._kill()
                    return
                pause = max(self._usage.pause(used), (time.monotonic() - began) / 4)
        except OSError:
            return  # it has ended
        finally:
            if self._usage is not None:
                self._usage.close()

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _kill(self):
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # the first process: all others go with it
            elif self._scratch:
                os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self):
        """Kill all its processes, wait for their end, and remove what it has written. May be called again."""
        self._ending.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._process is not None:
            self._kill()
            self._ends_within(5.0)  # which it does once the others are gone
            self._process.kill()
            self._process.wait()
            self._process.stderr.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        for connection in self._connections.values():
            connection.close()
        if self._group is not None:
            cgroup.remove(self._group)
            self._group = None
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
    path = f"{os.path.dirname(bubblewrap.python())}:/usr/bin:/bin"
    return one | names | {"PATH": path, "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1"}
