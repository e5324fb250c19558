"""What a sandbox takes of this machine's memory: of all its processes, and of what Linux keeps for them.

Without a control group nothing but looking tells it, so the looks come the closer together, the nearer the limit is.
Counted are pages (shared ones once), page tables and stacks; sockets as what their buffers may come to hold; files in
memory, terminals and locks by their number. Files' contents are limited where they lie, and are not counted here.
"""

import os

INTERVALS = (0.005, 0.2)  # seconds between two looks, at least and at most
RATE = 2 * 2**30  # bytes a second that a CPU may fill
SOCKET, CONNECTION = 2**18, 10 * 2**20  # bytes that a socket, and one of TCP, may hold
FILE, TERMINAL, LOCK, THREAD = 2048, 2**17, 512, 2**15  # bytes of kernel memory for one
MOST_LOCKS = 2**20  # bytes of /proc/locks that are read
FOLDERS = ("tmp", "dev/shm", "run")
_PAGES = ("RssAnon:", "RssShmem:", "VmSwap:", "VmPTE:")
_SHARES = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")


class Usage:
    """Looks at a sandbox through `root`, where this machine sees its files."""

    def __init__(self, root: str, limit: int):
        self._root, self._limit = os.open(root, os.O_PATH), limit

    def close(self):
        """Look no more."""
        os.close(self._root)

    def look(self, most: int) -> int:
        """Bytes that are used; not exact once they are known to be over `most`, or known not to be."""
        kept = self._kept()
        pids = [pid for pid in self._list("proc") if pid.isdecimal()]
        pages = {pid: self._pages(pid) for pid in pids}
        if kept + sum(map(sum, pages.values())) <= most:
            return kept + sum(map(sum, pages.values()))
        total = kept
        for pid, (filled, tables) in pages.items():  # children share the pages that neither has changed
            shares = _numbers(self._read(f"proc/{pid}/smaps_rollup"), _SHARES)
            total += tables + (sum(shares) if shares else filled)
            if total > most:
                break
        return total

    def pause(self, used: int) -> float:
        """Seconds until the limit may be reached."""
        rate = RATE * min(8, os.cpu_count() or 1)
        return min(INTERVALS[1], max(INTERVALS[0], (self._limit - used) / rate))

    def _pages(self, pid: str) -> tuple[int, int]:
        """Bytes of a process that it has filled, and of its tables and threads."""
        status = self._read(f"proc/{pid}/status")
        threads = max(1, *_numbers(status, ("Threads:",), 1), 1)
        if b"RssAnon:" not in status and threads > 1:  # the first thread has ended, others live
            for thread in self._list(f"proc/{pid}/task"):
                status = self._read(f"proc/{pid}/task/{thread}/status")
                if b"RssAnon:" in status:
                    break
        *filled, tables = _numbers(status, _PAGES) or (0,)
        return sum(filled), tables + threads * THREAD

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
