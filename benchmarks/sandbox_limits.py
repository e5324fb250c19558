"""What programs that try to take this machine's memory take of it, and of the process that runs them.

    python -m benchmarks.sandbox_limits [--only=NAME] [--json]

Each attack runs in a fresh sandbox with a limit of 768 MB, one at a time. Measured, every 5 ms: by how much the machine's
available memory falls, and this process grows (as a multiple of 1 MB); then how long the call takes beyond its deadline,
and whether the next call is clean.
"""

import argparse
import json
import os
import textwrap
import threading
import time

from k25_jax.sandbox.kernel import Limits
from k25_jax.sandbox.sandbox import Sandbox

LIMITS = Limits(memory_mb=768, disk_mb=64)
SECONDS = 4.0  # deadline of the call
MACHINE, SUPERVISOR, LATE = LIMITS.memory_mb + 100, 50, 1.0  # what is due, at most

CHILDREN = """
import ctypes, fcntl, mmap, os, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def children(work, count=8):
    for _ in range(count):
        if not os.fork():
            try: work()
            except BaseException as problem: os.write(2, repr(problem).encode())
            signal.pause()
def hold(): time.sleep(600)
"""
KERNEL = """
import json
k = get_ipython().kernel; s = k.session; t = k.iopub_thread.socket; p = k.get_parent()
def forge(content):
    pack = s.pack
    s.pack = lambda x: content if isinstance(x, dict) and 'data' in x else pack(x)
    s.send(k.iopub_socket, 'display_data', {'data': {}}, parent=p)
    s.pack = pack; time.sleep(1)
"""
SHOW = """
import base64, io
from PIL import Image
from IPython.display import publish_display_data
def show(data, kind='png'): publish_display_data({f'image/{kind}': base64.b64encode(data).decode()})
"""

ATTACKS = {  # name -> code; the setup call and the call that is measured, where there are two
    "pages of 8 children": "children(lambda: bytearray(b'x') * 500_000_000)\nhold()",
    "copies of pages, 8 children": """
        x = bytearray(b'x') * 500_000_000
        def work():
            for i in range(0, len(x), 4096): x[i] = 1
        children(work); hold()""",
    "shared memory of 8 children": """
        def work():
            kept = mmap.mmap(-1, 300_000_000); kept.write(bytes(300_000_000)); hold()
        children(work); hold()""",
    "shared memory, by the system call": """
        libc.mmap.restype = ctypes.c_void_p
        def work():
            for _ in range(100):
                m = libc.mmap(None, ctypes.c_size_t(2**26), 3, 0x21, -1, ctypes.c_long(0))
                if m in (None, 2**64 - 1): return
                ctypes.memset(m, 1, 2**26); libc.munmap(ctypes.c_void_p(m + 4096), ctypes.c_size_t(2**26 - 4096))
        children(work); hold()""",
    "/dev/zero, mapped shared": """
        with open('/dev/zero', 'r+b') as zero:
            maps = [mmap.mmap(zero.fileno(), 2**26) for _ in range(10)]
        for m in maps: m.write(bytes(2**26))
        hold()""",
    "memfd": "f = [os.memfd_create(str(i)) for i in range(20)]\nfor one in f: os.write(one, bytes(2**26))\nhold()",
    "files in /tmp and /dev/shm": """
        for folder in '/tmp/', '/dev/shm/':
            for i in range(1000):
                try: open(folder + str(i), 'wb').write(bytes(2**20))
                except OSError: break
        hold()""",
    "empty files": "for i in range(2_000_000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))\nhold()",
    "deep folders": """
        os.chdir('/tmp')
        for i in range(2_000_000): os.mkdir('d'); os.chdir('d')""",
    "long names and symbolic links": """
        for i in range(1_000_000): os.symlink('x' * 100, f'/dev/shm/{i:0250}')
        hold()""",
    "System V semaphores": """
        print([libc.semget(0, 32000, 0o1600) for _ in range(32000)][-1]); hold()""",
    "System V shared memory": "print([libc.shmget(0, 2**28, 0o1600) for _ in range(20)][-1]); hold()",
    "System V queues": "print([libc.msgget(0, 0o1600) for _ in range(30000)][-1]); hold()",
    "POSIX queues": "print([libc.mq_open(b'/q%d' % i, 0o102, 0o600, None) for i in range(300)][-1]); hold()",
    "unix sockets' buffers": """
        def work():
            kept = []
            while True:
                a, b = socket.socketpair(); kept.append((a, b)); a.setblocking(False); b.setblocking(False)
                for one in a, b:
                    try:
                        while True: one.send(bytes(2**16))
                    except BlockingIOError: pass
        children(work, 20); hold()""",
    "larger buffers of sockets": """
        def work():
            kept = []
            while True:
                a, b = socket.socketpair(); kept.append((a, b)); a.setblocking(False)
                try: a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
                except OSError: pass
                try:
                    while True: a.send(bytes(2**16))
                except BlockingIOError: pass
        children(work, 20); hold()""",
    "TCP sockets' buffers": """
        def work():
            server = socket.create_server(('127.0.0.1', 0)); kept = []
            while True:
                a = socket.create_connection(server.getsockname()); b, _ = server.accept(); kept.append((a, b))
                a.setblocking(False); until = time.monotonic() + 0.05
                while time.monotonic() < until:
                    try: a.send(bytes(2**20))
                    except BlockingIOError: time.sleep(0.001)
        children(work, 20); hold()""",
    "pseudo-terminals": """
        def work():
            kept = []
            while True:
                a, b = os.openpty(); kept.append((a, b)); os.set_blocking(b, False)
                try: os.write(b, bytes(2**16))
                except OSError: pass
        children(work, 30); hold()""",
    "pipes' buffers": """
        def work():
            kept = []
            while True:
                a, b = os.pipe(); kept.append((a, b)); os.set_blocking(b, False)
                try: fcntl.fcntl(b, 1031, 2**20)
                except OSError: pass
                try: os.write(b, bytes(2**20))
                except OSError: pass
        children(work, 30); hold()""",
    "pages given to pipes": """
        class Piece(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
        def work():
            kept = []
            while True:
                a, b = os.pipe(); kept.append((a, b)); m = mmap.mmap(-1, 2**22, flags=mmap.MAP_PRIVATE)
                try: m.madvise(14)
                except OSError: pass
                m.write(bytes(2**22)); base = ctypes.addressof(ctypes.c_char.from_buffer(m))
                for i in range(2): libc.vmsplice(b, ctypes.byref(Piece(base + i * 2**21, 1)), 1, 1)
        children(work, 20); hold()""",
    "parts of huge pages": """
        libc.mmap.restype = ctypes.c_void_p; libc.prctl(41, 0, 0, 0, 0)
        def work():
            for _ in range(2000):
                m = libc.mmap(None, ctypes.c_size_t(2**22), 3, 0x22, -1, ctypes.c_long(0))
                if m in (None, 2**64 - 1): return
                m = -(-m // 2**21) * 2**21; libc.madvise(ctypes.c_void_p(m), ctypes.c_size_t(2**21), 14)
                ctypes.memset(m, 1, 2**21); libc.munmap(ctypes.c_void_p(m + 4096), ctypes.c_size_t(2**21 - 4096))
        children(work); hold()""",
    "locks of files": """
        def work():
            files = [open(f'/tmp/lock{os.getpid()}-{i}', 'w') for i in range(200)]
            for start in range(0, 20000, 2):
                for one in files: fcntl.lockf(one, fcntl.LOCK_EX, 1, start)
        children(work, 20); hold()""",
    "timers": """
        def work():
            while not libc.timer_create(1, None, ctypes.byref(ctypes.c_void_p())): pass
        children(work, 30); hold()""",
    "watches of files": """
        def work():
            for _ in range(100):
                one = libc.inotify_init1(0)
                for root, folders, files in os.walk('/usr'):
                    for name in files: libc.inotify_add_watch(one, os.path.join(root, name).encode(), 0xfff)
        children(work, 20); hold()""",
    "epoll on epoll": """
        import select
        def work():
            pipes = [os.pipe()[0] for _ in range(40)]; kept = []
            while True:
                one = select.epoll(); kept.append(one)
                for pipe in pipes: one.register(pipe)
        children(work, 30); hold()""",
    "mappings by the thousand": """
        def work():
            kept = []
            while True: kept.append(mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=1 + 2 * (len(kept) % 2)))
        children(work, 40); hold()""",
    "a process whose first thread has ended": """
        def fill():
            time.sleep(0.2); x = bytearray(b'x') * 500_000_000; hold()
        def work():
            threading.Thread(target=fill).start(); libc.syscall(60, 0)
        children(work); hold()""",
    "forks without end": """
        while True:
            try: os.fork()
            except OSError: pass""",
    "threads without end": """
        def work():
            while True:
                try: threading.Thread(target=hold).start()
                except RuntimeError: time.sleep(0.01)
        children(work); hold()""",
    "between two calls": ("children(lambda: time.sleep(0.5) or bytearray(b'x') * 500_000_000)", "time.sleep(3)"),
    "a message in many parts": KERNEL + "while True: t.send_multipart([b'x' * 1000] * 100_000, copy=True)",
    "60 MB of {}": KERNEL + """forge(b'{"data": [' + b'{},' * 20_000_000 + b'{}]}')""",
    "11 MB of {}": KERNEL + """forge(b'{"data": [' + b'{},' * 3_600_000 + b'{}]}')""",
    "a value of 60 MB": "'x' * 60_000_000",
    "a value of 11 MB in UTF-8": "class A:\n    def __repr__(self): return 'ä' * 5_000_000\nA()",
    "a flood of control": """
        k = get_ipython().kernel
        while True:
            for one in k.control_stream, k.shell_stream:
                try: k.session.send(one, 'flood', {'x': 'x' * 2**20}, ident=k._parent_ident['shell'])
                except Exception: time.sleep(0.01)""",
    "output while no call runs": (
        """
        def flood():
            while True: print('x' * 2**20)
        for _ in range(4): threading.Thread(target=flood, daemon=True).start()""",
        "time.sleep(1)",
    ),
    "output of a call": "while True: print('x' * 2**20)",
    "thousands of images": SHOW + "for i in range(100_000): show(os.urandom(2**21))",
    "an image of many scans": SHOW
    + """
file = io.BytesIO(); Image.new('RGB', (2000, 2000)).save(file, 'JPEG', progressive=True, quality=50)
data = file.getvalue(); start = data.rindex(b'\\xff\\xda'); end = data.rindex(b'\\xff\\xd9')
show(data[:end] + data[start:end] * 1000 + data[end:], 'jpeg')""",
    "an image of very many pixels": SHOW
    + "file = io.BytesIO(); Image.new('1', (20000, 20000)).save(file, 'PNG'); show(file.getvalue())",
    "an exception of 50 MB": "raise ValueError('x' * 50_000_000)",
    "JSON nested deeply": KERNEL + """forge(b'{"data": ' + b'[' * 100_000 + b']' * 100_000 + b'}')""",
    "displays by the million": """
        from IPython.display import publish_display_data
        for i in range(10**6): publish_display_data({'text/plain': 'x' * 5000}, transient={'display_id': str(i)})""",
    "an interrupt that is ignored": """
        while True:
            try: time.sleep(600)
            except KeyboardInterrupt: pass""",
    "a stopped interpreter": "os.kill(os.getpid(), signal.SIGSTOP)",
}


class Watch:
    """How far the machine's available memory falls, and this process grows, in MB."""

    def __enter__(self) -> "Watch":
        self._done, self.machine, self.supervisor = threading.Event(), 0.0, 0.0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = _available(), _resident()
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _look(self):
        while not self._done.wait(0.005):
            self.machine = max(self.machine, self._before[0] - _available())
            self.supervisor = max(self.supervisor, _resident() - self._before[1])


def _available() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 1024


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def attack(name: str, seconds: float = SECONDS) -> dict:
    """Run it under this deadline; what was seen."""
    given = ATTACKS[name]
    first, code = given if isinstance(given, tuple) else ("", given)
    with Sandbox(LIMITS) as sandbox:
        sandbox.run(CHILDREN)
        with Watch() as watch:
            if first:
                sandbox.run(textwrap.dedent(first))
                time.sleep(2.0)
            began = time.monotonic()
            seen = sandbox.run(textwrap.dedent(code), seconds)
            took = time.monotonic() - began
            after = sandbox.run("40 + 2", 30.0)
            if after.status == "died":  # it says so once
                after = sandbox.run("40 + 2", 30.0)
    time.sleep(0.3)
    figures = {
        "machine_mb": round(watch.machine),
        "supervisor_mb": round(watch.supervisor, 1),
        "seconds": round(took, 2),
    }
    kept = watch.machine < MACHINE and watch.supervisor < SUPERVISOR and took < seconds + LATE
    return {
        "attack": name,
        **figures,
        "status": seen.status,
        "clean": after.text == "42",
        "held": kept,
        "text": seen.text,
    }


def best(name: str, rounds: int) -> dict:
    """The round in which the machine's memory rose least: what others take in the meantime only adds."""
    return min((attack(name) for _ in range(rounds)), key=lambda row: (not row["clean"], row["machine_mb"]))


def main():
    """The table, in Markdown; or a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the name of an attack")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of which the best counts, on a machine that is not quiet"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    Sandbox(LIMITS).close()  # imports
    titles = ("attack", f"machine (MB, due < {MACHINE})", f"supervisor (MB, due < {SUPERVISOR})")
    titles += (f"seconds (due < {SECONDS + LATE:g})", "ended as", "next call")
    if not args.json:
        print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    failed = 0
    for name in ATTACKS:
        if args.only in name:
            row = best(name, args.rounds)
            failed += not (row["held"] and row["clean"])
            cells = [name, *(row[key] for key in ("machine_mb", "supervisor_mb", "seconds", "status"))]
            cells.append(("clean" if row["clean"] else "NOT CLEAN") + ("" if row["held"] else ", OVER"))
            print(json.dumps(row) if args.json else f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"{failed} attacks did not stay within what is due")


if __name__ == "__main__":
    main()
