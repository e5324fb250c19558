"""Which revision of the code runs."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[2]


def revision() -> str:
    """What git calls the checkout that runs; "unknown" for an installed package, whatever repository is around it."""
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        command = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:  # git is not installed
        return "unknown"
    return git.stdout.strip() or "unknown"
