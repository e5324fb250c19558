"""The first Python in the sandbox: puts the limits on itself, then becomes a Jupyter kernel.

It runs as a script, where nothing else of k25_jax can be seen. Standard input holds a JSON object: `connection` (a
Jupyter connection file), `connection_file` (where to write it) and `limits` (of `resource.setrlimit`).
"""

import json
import os
import resource
import sys


def main():
    """Never returns: a kernel runs until it is killed."""
    settings = json.load(sys.stdin)
    with open(settings["connection_file"], "w") as file:
        json.dump(settings["connection"], file)
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.closerange(3, 1024)
    from ipykernel.kernelapp import IPKernelApp

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # errors up to here are told to whoever waits for the kernel
        os.dup2(nothing, stream)
    IPKernelApp.launch_instance(["-f", settings["connection_file"], "--HistoryManager.enabled=False"])


if __name__ == "__main__":
    main()
