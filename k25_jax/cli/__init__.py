"""The command `k25`: train, sweep, experiments, data, generate, chat, serve, eval, convert, params, preflight, report, demo.

What a user wrote is checked first; whatever is slow to import, JAX above all, comes afterwards.
"""

import logging
import re
import sys
import warnings

from k25_jax.cli.flags import build_parser, override
from k25_jax.train.interrupts import Interrupted, at_once

__all__ = ["build_parser", "main"]
REPORTS = ("k25_jax", "gcsfs", "google", "aiohttp")  # packages whose errors are told in one line
GOES_ON = "; the same command goes on after the last checkpoint"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors that a user can mend are one line on stderr and status 2."""
    words = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in words if not word.startswith("-")), "")
    with at_once(f"k25 {name}".rstrip(), GOES_ON if name == "train" else ""):
        return run(words)


def run(words: list[str]) -> int:
    """The command that these words are."""
    parser = build_parser()
    parser.check_flags(words)
    args, rest = parser.parse_known_args(words)
    if args.version:
        from k25_jax.cli.version import versions

        print(versions())
        return 0
    if args.command == "help":
        return run([*args.topic, "--help"])
    if not hasattr(args, "run"):  # `k25` or `k25 data` alone
        getattr(args, "parser", parser).print_help()
        return 0
    if rest and not args.overrides:
        args.parser.error(f"unknown argument {rest[0]}")
    args.overrides = override(rest, args.parser)
    set_up_logging()
    try:
        if args.check:
            args.check(args)
        from k25_jax.runtime.environment import prepare

        prepare(getattr(args, "no_cache", False))
        return args.run(args) or 0
    except Interrupted as stop:
        if str(stop):
            print(f"k25 {args.command}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if not is_users(error):
            raise
        print(f"k25 {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2


def is_users(error: Exception) -> bool:
    """Whether the input, the disk or a bucket is at fault: it is of a class of ours, the system's, or of those that reach
    buckets. Else it is a bug: traceback.
    """
    ours = any(kind.__module__.partition(".")[0] in REPORTS for kind in type(error).__mro__)
    return ours or isinstance(error, OSError)


def one_line(error: Exception) -> str:
    """The message, with the name of a file once."""
    if isinstance(error, OSError) and error.filename and error.strerror and str(error).startswith("[Errno"):
        return f"{error.filename}: {error.strerror}"

    def shorter(match: re.Match) -> str:
        return match["reason"] if str(error).count(match["file"]) > 1 else match[0]

    return re.sub(r"\[Errno \d+\] (?P<reason>[^:\[\]]+): '(?P<file>[^']+)'", shorter, str(error))


# ------------------------------------------------------------------------------------------------------------- warnings
class Stderr(logging.StreamHandler):
    """Writes to what is sys.stderr at the time: while a progress bar is shown, that prints above it."""

    @property
    def stream(self):
        """Where to."""
        return sys.stderr

    @stream.setter
    def stream(self, _):
        pass


class OneLine(logging.Formatter):
    """What is told for information stands alone; warnings say what they are, and whose."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback where there is one."""
        return super().format(record) if record.levelno > logging.INFO else record.getMessage()


class Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self):
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is new."""
        message = record.name, record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


def set_up_logging() -> None:
    """Warnings, Python's too, are one line each on stderr, and are said once."""
    root = logging.getLogger()
    if not root.handlers:
        handler = Stderr()
        handler.addFilter(Once())
        handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.WARNING)
        logging.getLogger("k25_jax.runtime.waiting").setLevel(logging.INFO)
        warnings.showwarning = show_warning
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what it raises later


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning of Python's as one of ours, without the line of code."""
    logging.getLogger(category.__name__).warning("%s", " ".join(str(message).split()))
