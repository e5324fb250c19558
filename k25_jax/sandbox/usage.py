"""What a sandbox takes of this machine's memory: of all its processes, and of what Linux keeps for them.

Without a control group nothing but looking tells it, so the looks come the closer together, the nearer the limit is.
Counted are pages (shared ones once), page tables and stacks; sockets as what their buffers may come to hold; files in
memory, terminals and locks by their number. Files' contents are limited where they lie, and are not counted here.
"""

import os
import signal
import time
from contextlib import ExitStack

INTERVALS = (0.005, 0.2)  # seconds between two looks, at least and at most
RATE = 2 * 2**30  # bytes a second that a CPU may fill
SOCKET, CONNECTION = 2**18, 10 * 2**20  # bytes that a socket, and one of TCP, may hold
FILE, TERMINAL, LOCK, THREAD = 2048, 2**17, 512, 2**15  # bytes of kernel memory for one
MOST_LOCKS = 2**20  # bytes of /proc/locks that are read
STANDSTILL = 0.25  # seconds to wait for all processes to stand still
PAGE = os.sysconf("SC_PAGESIZE")
FOLDERS = ("tmp", "dev/shm", "run")
_PAGES = ("RssAnon:", "RssShmem:", "VmSwap:", "VmPTE:")
_SHARES = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")


class Usage:
    """Looks at a sandbox through `root`, where this machine sees its files."""

    def __init__(self, root: str, limit: int):
        self._root, self._limit = os.open(root, os.O_PATH), limit
        self._counted, self._faults = None, {}  # pages when they were last counted exactly, and page faults before

    def close(self):
        """Look no more."""
        os.close(self._root)

    def look(self, most: int) -> int:
        """Bytes that are used; where that is known to be at most `most` without counting exactly, perhaps more."""
        kept = self._kept()
        found = self._processes()
        kept += sum(tables for _, tables, _ in found.values())
        filled = sum(pages for pages, _, _ in found.values())
        if kept + filled <= most:
            return kept + filled
        # Children share the pages that neither has changed. Each page that one got since the last count was a fault.
        if self._counted is not None:
            faults = dict(map(self._page_faults, found))
            new = sum(max(0, count - self._faults.get(process, 0)) for process, count in faults.items())
            if kept + self._counted + new * PAGE <= most:
                return kept + self._counted + new * PAGE
        self._count()
        return kept + self._counted

    def _count(self):
        """Count the pages of all processes, which stand still as long as it takes."""
        with ExitStack() as stack:
            found, until = {}, time.monotonic() + STANDSTILL
            while True:
                found, before = self._processes(), found
                for pid, (_, _, state) in found.items():
                    if pid not in before and pid != "1" and state != b"T":  # that one is bubblewrap's own
                        stack.callback(self._signal, pid, signal.SIGCONT)
                        self._signal(pid, signal.SIGSTOP)
                # A fork in hand shares its pages with a child that cannot be seen yet.
                running = any(state not in b"TZX" for pid, (_, _, state) in found.items() if pid != "1")
                if found.keys() <= before.keys() and not running or time.monotonic() > until:
                    break
                time.sleep(0.001)
            self._counted, self._faults = 0, dict(map(self._page_faults, found))
            for pid, (filled, _, _) in found.items():
                shares = _numbers(self._read(f"proc/{pid}/smaps_rollup"), _SHARES)
                self._counted += sum(shares) if shares else filled

    def _processes(self) -> dict[str, tuple[int, int, bytes]]:
        return {pid: self._pages(pid) for pid in self._list("proc") if pid.isdecimal()}

    def _signal(self, pid: str, number: int):
        try:
            process = os.open(f"proc/{pid}", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        except OSError:
            return  # it has ended
        try:
            signal.pidfd_send_signal(process, number)  # Linux takes such a descriptor, too
        except OSError:
            pass
        finally:
            os.close(process)

    def _page_faults(self, pid: str) -> tuple[tuple[str, bytes], int]:
        """A process, told from a later one with the same number by its start, and how many pages it has got or copied."""
        fields = self._read(f"proc/{pid}/stat").rpartition(b")")[2].split()
        return ((pid, fields[19]), int(fields[7]) + int(fields[9])) if len(fields) > 19 else ((pid, b""), 0)

    def pause(self, used: int) -> float:
        """Seconds until the limit may be reached."""
        rate = RATE * min(8, os.cpu_count() or 1)
        return min(INTERVALS[1], max(INTERVALS[0], (self._limit - used) / rate))

    def _pages(self, pid: str) -> tuple[int, int, bytes]:
        """Bytes of a process that it has filled, and of its tables and threads; and its state."""
        status = self._read(f"proc/{pid}/status")
        state = status.partition(b"\nState:\t")[2][:1]
        threads = max(1, *_numbers(status, ("Threads:",), 1), 1)
        if b"RssAnon:" not in status and threads > 1:  # the first thread has ended, others live
            for thread in self._list(f"proc/{pid}/task"):
                status = self._read(f"proc/{pid}/task/{thread}/status")
                if b"RssAnon:" in status:
                    break
        *filled, tables = _numbers(status, _PAGES) or (0,)
        return sum(filled), tables + threads * THREAD, state

    def _kept(self) -> int:
        """Bytes that Linux keeps besides."""
        counts = self._read("proc/1/net/sockstat") + self._read("proc/1/net/sockstat6")
        words = counts.split()
        total = CONNECTION * sum(int(words[i + 2]) for i, word in enumerate(words) if word in (b"TCP:", b"TCP6:"))
        total += SOCKET * next((int(words[i + 2]) for i, word in enumerate(words) if word == b"sockets:"), 0)
        for folder in FOLDERS:
            descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY, dir_fd=self._root)
            try:
                space = os.fstatvfs(descriptor)
            finally:
                os.close(descriptor)
            total += FILE * max(0, space.f_files - space.f_ffree)
        total += TERMINAL * len(self._list("dev/pts"))
        return total + LOCK * self._read("proc/locks", MOST_LOCKS).count(b"\n")

    def _read(self, path: str, most: int = 2**16) -> bytes:
        """The file; nothing if it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY, dir_fd=self._root)
        except OSError:
            return b""
        try:
            data = b""
            while len(data) < most and (piece := os.read(descriptor, most)):
                data += piece
            return data
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    def _list(self, path: str) -> list[str]:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        except OSError:
            return []
        try:
            return os.listdir(descriptor)
        except OSError:
            return []
        finally:
            os.close(descriptor)


def _numbers(text: bytes, names: tuple[str, ...], unit: int = 1024) -> list[int]:
    """The numbers of these lines, in the order of the names."""
    found = []
    for name in names:
        place = text.find(name.encode())
        if place >= 0:
            found.append(int(text[place + len(name) :].split(maxsplit=1)[0]) * unit)
    return found
