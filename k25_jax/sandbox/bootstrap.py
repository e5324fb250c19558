"""The first Python in the sandbox: puts the limits on itself, then becomes a Jupyter kernel.

It runs as a script, where nothing else of k25_jax can be seen. Standard input holds a JSON object: `connection` (a
Jupyter connection file), `connection_file` (where to write it) and `limits` (of `resource.setrlimit`).
"""

import json
import os
import resource
import sys

from ipykernel.iostream import OutStream
from ipykernel.kernelapp import IPKernelApp

PIECE = 2**20  # characters


class Stream(OutStream):
    """Sends what is printed in pieces, and waits for each to be sent: a loop of prints does not fill the memory."""

    def write(self, string: str) -> int:
        """As a file's."""
        if not isinstance(string, str):
            return super().write(string)  # which says what is wrong with it
        for begin in range(0, len(string), PIECE):
            piece = string[begin : begin + PIECE]
            super().write(piece)
            self._unsent = getattr(self, "_unsent", 0) + len(piece)
            if self._unsent >= PIECE:
                self._unsent = 0
                self.flush()
        return len(string)


def main():
    """Never returns: a kernel runs until it is killed."""
    settings = json.load(sys.stdin)
    with open(settings["connection_file"], "w") as file:
        json.dump(settings["connection"], file)
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.closerange(3, 1024)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # errors up to here are told to whoever waits for the kernel
        os.dup2(nothing, stream)
    streams = "--IPKernelApp.outstream_class=__main__.Stream"
    IPKernelApp.launch_instance(["-f", settings["connection_file"], "--HistoryManager.enabled=False", streams])


if __name__ == "__main__":
    main()
