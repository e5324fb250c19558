"""What a hostile program tries, and what it is told: nothing outside changes, and the caller always gets an observation."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.kernel import Limits
from k25_jax.sandbox.sandbox import Sandbox


def told(sandbox, code, status="error", seconds=60.0):
    observation = sandbox.run(code, seconds)
    assert observation.status == status, observation
    return observation.text


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_well(sandbox):
    return sandbox.run("'we' + 'll'").text == "'well'"


@pytest.mark.parametrize(
    "code, error",
    [
        ("import socket; socket.create_connection(('192.0.2.1', 80), timeout=60)", "Network is unreachable"),
        ("import socket; socket.getaddrinfo('example.org', 80)", "gaierror"),
        ("import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "Operation not permitted"),
        ("open('/usr/new', 'w')", "Read-only file system"),
        ("open('/new', 'w')", "Read-only file system"),
        ("open('/dev/new', 'w')", "Read-only file system"),
        ("import sys; open(sys.prefix + '/new', 'w')", "Read-only file system"),
        ("open('/proc/sys/kernel/hostname', 'w')", "Permission denied"),
        ("open('/proc/sysrq-trigger', 'w')", "No such file|Permission denied|Read-only"),
        ("open('/etc/shadow').read()", "No such file"),
        ("open('/etc/passwd').read()", "No such file"),
        ("open('/proc/1/mem', 'rb').read(1)", "rror"),
        ("import os; os.setuid(0)", "Operation not permitted|Invalid argument"),
        ("import os; os.chroot('/tmp')", "Operation not permitted"),
        ("import os; os.mknod('sda', 0o60644, os.makedev(8, 0))", "Operation not permitted"),
        ("import os; os.memfd_create('hidden')", "Function not implemented"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("open('large', 'wb').write(bytes(2**25))", "No space left|File too large"),
        ("import os; [open(f'f{i}', 'wb').write(bytes(2**20)) for i in range(40)]", "No space left"),
        ("open('/dev/shm/large', 'wb').write(bytes(2**25))", "No space left|File too large"),
    ],
)
def test_what_is_refused_inside(sandbox, code, error):
    text = told(sandbox, code)
    assert any(part in text for part in error.split("|")), text
    told(sandbox, "import glob, os\nfor name in glob.glob('f*') + glob.glob('large'): os.remove(name)", "ok")


LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    print(name, libc[name](*arguments), os.strerror(ctypes.get_errno()))
"""


def test_system_calls_that_are_not_there(sandbox):
    """No tracing, no namespaces, no mounts, no shared memory that nobody counts."""
    text = told(sandbox, LIBC + "call('ptrace', 16, 1, 0, 0)\ncall('shmget', 0, 2**30, 0o1600)", "ok")
    assert text == "ptrace -1 Function not implemented\nshmget -1 Function not implemented"
    text = told(sandbox, LIBC + "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)", "ok")
    assert text == "mount -1 Operation not permitted"
    assert "unshare failed: No space left on device" in told(sandbox, "!unshare --user true", "ok")


def test_the_host_is_not_visible(sandbox, tmp_path, monkeypatch):
    """Its files, its environment, its processes, its sockets; nor this repository."""
    monkeypatch.setenv("K25_SECRET", "hunter2")
    root = Path(__file__).parents[2]
    paths = [Path.home() / ".ssh", tmp_path, root / "README.md", root / "k25_jax", "/var/run/docker.sock", "/var"]
    (tmp_path / "secret").write_text("hunter2")
    code = f"import os\nprint([path for path in {list(map(str, paths))} if os.path.exists(path)])"
    assert told(sandbox, code, "ok") == "[]"
    assert told(sandbox, "print(os.listdir(os.path.expanduser('~')), 'K25_SECRET' in os.environ)", "ok").endswith(
        "False"
    )
    assert "hunter2" not in told(sandbox, "print(*(open(f'/proc/{p}/environ').read() for p in ('1', 'self')))", "ok")
    assert told(sandbox, "print([p for p in os.listdir('/proc') if p.isdigit() and int(p) > 100])", "ok") == "[]"
    assert told(sandbox, "import importlib.util; print(importlib.util.find_spec('k25_jax'))", "ok") == "None"
    assert "ProcessLookupError" in told(sandbox, f"os.kill({os.getpid()}, 9)")


def test_sockets_of_the_host_are_out_of_reach(sandbox, tmp_path):
    """Not by their path, not by an abstract name, not by a port of the loopback."""
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract, socket.socket() as port:
        named.bind(str(tmp_path / "s"))
        abstract.bind(f"\0k25-{os.getpid()}")
        port.bind(("127.0.0.1", 0))
        for listening in (named, abstract, port):
            listening.listen()
        code = f"""
import socket
for family, address in ((1, {str(tmp_path / "s")!r}), (1, {abstract.getsockname()!r}), (2, {port.getsockname()!r})):
    try:
        socket.socket(family).connect(address)
    except OSError as error:
        print(type(error).__name__)
"""
        assert told(sandbox, code, "ok").split() == ["FileNotFoundError", *["ConnectionRefusedError"] * 2]


def test_symbolic_links_lead_nowhere(sandbox, tmp_path):
    """Whoever reads a file for the model reads it in the sandbox, where links point to what is there."""
    (tmp_path / "secret").write_bytes(b"hunter2")
    links = f"""
import os
os.symlink({str(tmp_path / "secret")!r}, 'a.png'); os.symlink('/proc/1/root/etc/shadow', 'b.png')
os.remove('/run/kernel-1'); os.symlink('/var/run/docker.sock', '/run/kernel-1')
"""
    assert told(sandbox, links, "ok") == ""
    for name in ("a.png", "b.png", "../../../etc/shadow", str(tmp_path / "secret"), "'); 1/0; ('"):
        assert sandbox.get(name) is None
    assert is_well(sandbox)
    with pytest.raises(SandboxError, match="a.png .* cannot be written into the sandbox: FileNotFoundError"):
        sandbox.put("a.png", b"mine")  # it follows the link, in there
    assert (tmp_path / "secret").read_bytes() == b"hunter2"


def test_signals_stay_inside(sandbox):
    told(sandbox, "import os\nfor number in (9, 15, 19, 2): os.kill(1, number)", "ok")
    assert "ProcessLookupError" in told(sandbox, "os.kill(-1, 9)") and is_well(sandbox)  # all but itself: there is none


def test_a_fork_bomb_finds_its_limit(sandbox):
    code = """
import os, signal
children = []
try:
    while True:
        child = os.fork()
        if not child:
            signal.pause()
        children.append(child)
except OSError as error:
    print(error.strerror, len(children) < 40)
finally:
    for child in children:
        os.kill(child, 9); os.waitpid(child, 0)
"""
    assert told(sandbox, code, "ok") == "Resource temporarily unavailable True" and is_well(sandbox)


def test_many_processes_do_not_share_out_a_memory_bomb(sandbox):
    """Each may take as much as one, all together no more."""
    code = """
import os, time
for _ in range(4):
    if not os.fork():
        x = bytearray(b'x') * (300 * 2**20)
        time.sleep(600)
time.sleep(600)
"""
    assert "its processes together took more than 768 MB" in told(sandbox, code, "died", seconds=300)
    assert is_well(sandbox)


def test_an_endless_loop_is_stopped_and_the_state_kept(sandbox):
    told(sandbox, "kept = 7", "ok")
    text = told(sandbox, "print('begun', flush=True)\nwhile True: pass", "deadline", seconds=1.0)
    assert text.startswith("begun") and "KeyboardInterrupt" in text
    assert text.endswith("[Stopped: the call took longer than 1 seconds. The interpreter and its variables are kept.]")
    assert told(sandbox, "kept", "ok") == "7"


def test_a_loop_of_prints_is_cut(sandbox):
    text = told(sandbox, "while True: print('spam' * 1000)", "deadline", seconds=1.0)
    assert len(text) < 2300 and "characters left out" in text and text.startswith("spam") and "are kept.]" in text


def test_output_keeps_its_head_and_tail(sandbox):
    text = told(sandbox, "print('a' * 10**6 + 'b' * 1000 + 'end')", "ok")
    assert text.startswith("a" * 1000 + f"\n[.. {10**6 + 1004 - 2000} characters left out ..]\n") and text.endswith(
        "bend"
    )


def test_an_output_of_a_hundred_megabytes_costs_the_interpreter(sandbox):
    assert "an output was over 64 MB" in told(sandbox, "'x' * 10**8", "died") and is_well(sandbox)


def test_forged_messages_cost_the_interpreter(sandbox):
    for forged in (
        "k.iopub_socket.send_multipart([b'junk'] * 9)",
        "k.session.send(k.iopub_socket, 'stream', {}, parent=p)",
    ):
        code = f"k = get_ipython().kernel; p = k.get_parent(); {forged}; import time; time.sleep(600)"
        text = told(sandbox, code, "died")
        assert "it sent damaged messages" in text and "files that were given at the start" in text


def test_a_kernel_that_does_not_stop_is_killed(bwrap):
    with Sandbox(Limits(stop_seconds=0.5)) as sandbox:
        sandbox.run("x = 1")
        text = told(sandbox, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "deadline", seconds=0.5)
        assert "passed its deadline and did not stop when interrupted. A new one has no variables" in text
        assert "NameError" in told(sandbox, "x")


def test_the_death_of_whoever_started_it_ends_it(bwrap):
    """SIGKILL leaves no time to clean up, and the kernel keeps a child."""
    code = """
import time
from k25_jax.sandbox.sandbox import Sandbox
sandbox = Sandbox()
sandbox.run("import subprocess; subprocess.Popen(['sleep', '600'])")
print(sandbox._kernel._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        first = psutil.Process(int(parent.stdout.readline()))
        inside = [first, *first.children(recursive=True)]
        assert {"bwrap", "sleep"} < {process.name() for process in inside}
        parent.kill()
    until = time.monotonic() + 60
    while any(map(is_running, inside)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, inside))
