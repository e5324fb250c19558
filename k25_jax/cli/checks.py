"""What a user wrote, checked before anything slow is imported: files, folders, names, numbers. Nothing here imports JAX.

What only the model or the data can tell is checked where it is used.
"""

import os
import re
import socket
import stat
import tempfile

from k25_jax.runtime import paths
from k25_jax.runtime.paths import AnyPath, check_reachable, is_remote, local_only, to_path

PLACE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TASK = re.compile(r"\w+(:[\w.=+,-]+)+")


# ------------------------------------------------------------------------------------------------------- of each command
def run(experiment, workdir: AnyPath) -> None:
    """`k25 train`. One of several processes looks later, when it can tell the others what it has found."""
    from k25_jax.checkpoint.folders import check_same_model, complete_steps
    from k25_jax.config import check_rl

    if any(os.environ.get(name) for name in PLACE):
        return
    for source in experiment.data.sources:
        _source(source.path, source.kind)
    if experiment.stage == "rl":
        check_rl(experiment)
    if experiment.data.tokenizer:
        _folder("data.tokenizer", experiment.data.tokenizer)
    if not complete_steps(workdir / "checkpoints"):  # else it goes on, whatever it once started from
        _start("train.init_from", experiment.train.init_from)
        _start("train.init_vision_from", experiment.train.init_vision_from)
    check_same_model(experiment, workdir)
    _writable("--workdir", workdir)


def sweep(args) -> None:
    """`k25 sweep`."""
    _at_least(args, jobs=1)
    local_only(args.workdir, "--workdir", "its runs are processes of this machine; `k25 train` runs one in a bucket")
    _writable("--workdir", args.workdir)


def data(args) -> None:
    """`k25 data build|inspect|check`."""
    for path in args.source:
        _source(path, "auto")
    _at_least(args, workers=0, deadline=0)
    if getattr(args, "output", None):
        local_only(args.output, "--output", paths.UPLOAD)
        _writable("--output", args.output)


def traces(args) -> None:
    """`k25 data traces`."""
    if not args.source:
        raise _error("give files of traces: k25 data traces FILE .. --min_reward=R --output=FILE.jsonl")
    for path in args.source:
        if not _is_there("FILE", path):
            raise _error(f"{path}: there is nothing at that path; give a file of traces, a folder of them, or a run")
    if not 0 <= args.min_reward <= 1:
        raise _error(f"min_reward={args.min_reward} must lie in [0, 1]; change --min_reward")
    if args.tokenizer:
        _folder("--tokenizer", args.tokenizer)
    _at_least(args, per_group=0)
    _writable("--output", to_path(args.output, "--output").parent)


def sampling(args) -> None:
    """`k25 chat`, and what `k25 generate` has of it."""
    _checkpoint(args.checkpoint)
    _at_least(args, max_tokens=1, temperature=0, max_image_patches=1, max_frame_patches=1)
    if not 0 < args.top_p <= 1:
        raise _error(f"top_p={args.top_p} must lie in (0, 1]")
    if not args.fps > 0:
        raise _error(f"fps={args.fps} must be positive")
    if "" in args.stop:
        raise _error("--stop is empty: give the text that ends the answer")


def generate(args) -> None:
    """`k25 generate`."""
    sampling(args)
    if args.prompt_ids is not None and not re.fullmatch(r"\s*[-+]?\d+\s*(,\s*[-+]?\d+\s*)*", args.prompt_ids):
        raise _error(f"--prompt_ids={args.prompt_ids!r} must be integers with commas between them")
    for path in args.image:
        _image(path)
    for path in args.video:
        _video(path)


def serve(args) -> None:
    """`k25 serve`."""
    from k25_jax.serving.limits import check_reach, read_key

    check_reach(args.host, read_key(args.api_key_env, args.api_key_file))
    if args.media_root:
        local_only(args.media_root, "--media_root", "files there are opened without following links; copy them here")
        _folder("--media_root", args.media_root)
    _at_least(args, slots=1, pages=1, max_length=0, max_tokens=0, concurrency=1, grace_seconds=0, max_pixels=1)
    _at_least(args, max_image_patches=1, max_frame_patches=1)
    _checkpoint(args.checkpoint)
    _port(args.host, args.port)


def convert(args) -> None:
    """`k25 convert`."""
    if not args.file_gb > 0:
        raise _error(f"--file_gb={args.file_gb} must be positive")
    _checkpoint(args.checkpoint)
    _writable("--output", args.output)


def evaluate(args) -> None:
    """`k25 eval`."""
    from k25_jax.evals.benchmarks import BENCHMARKS

    named = [name for name in args.task if name in BENCHMARKS]
    if named and (len(args.task) > 1 or not args.data):
        raise _error(f"--task={named[0]} is a public benchmark: ask it alone, with --data=FILE as published")
    if args.data and not named:
        raise _error(f"--data goes with one --task of {', '.join(BENCHMARKS)}")
    if args.suite and args.task:
        raise _error("--suite and --task exclude each other")
    if args.data and not _is_there("--data", args.data):
        raise _error(f"--data: there is nothing at {args.data}; check the path")
    if not args.url:
        if args.model:
            raise _error(f"--model={args.model} goes with --url; a checkpoint is named by --checkpoint")
        _checkpoint(args.checkpoint)
    if not named:
        _tasks(args.task, BENCHMARKS)
    _at_least(args, questions=1, k=1, temperature=0, max_tokens=1, context=1, batch=1, concurrency=1)
    if args.workdir:
        _writable("--workdir", args.workdir)


def report(args) -> None:
    """`k25 report`."""
    if args.trace is not None:
        _writable("--output", to_path(args.output or "trace.html", "--output").parent)
        return
    for name in ("output", "tokenizer"):
        if getattr(args, name) is not None:
            raise _error(f"--{name} goes with --trace=FILE; the report of a run is written into its folder")
    file = _reached("--workdir", args.workdir) / "metrics.jsonl"
    if not file.is_file():
        raise _error(f"no metrics at {file}; a run writes metrics.jsonl into its directory")


# ---------------------------------------------------------------------------------------------------------- of one thing
def _error(message: str) -> Exception:
    from k25_jax.config.checks import ConfigError

    return ConfigError(message)


def _at_least(args, **least: float) -> None:
    """Raise ConfigError for a flag that is given and below its least value, or no number."""
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            raise _error(f"{name}={value} must be at least {bound}; change --{name}")


def _reached(name: str, path: str | AnyPath) -> AnyPath:
    """The path that was given; a bucket is there, and may be read."""
    place = to_path(path, name)
    check_reachable(place, name)
    return place


def _is_there(name: str, path: str) -> bool:
    return _reached(name, path).exists()


def _folder(name: str, path: str) -> None:
    if not _reached(name, path).is_dir():
        raise _error(f"{name}={path}: there is no such folder; check the path")


def _start(name: str, path: str) -> None:
    """Weights to start from: the word "base", a folder, or for the encoder a file too."""
    if path not in ("", "base") and not _is_there(name, path):
        raise _error(f"{name}={path}: there is nothing at that path; name a run or a public checkpoint")


def _source(path: str, kind: str) -> None:
    """A source is there, or is a task that can be made."""
    from k25_jax.data.tasks import make_task

    if kind == "task" or (kind == "auto" and TASK.fullmatch(path) and not os.path.exists(path)):
        make_task(path)
    elif not _is_there("data.sources", path) and not paths.expand(path):
        raise _error(f"data.sources: there is nothing at {path}; check the path")


def _tasks(specs: list[str], benchmarks) -> None:
    """Held-out tasks; a benchmark may have been meant."""
    from k25_jax.config.checks import nearest
    from k25_jax.data.tasks import TASKS
    from k25_jax.evals.suite import check_suite

    for spec in specs:
        if ":" not in spec and spec not in TASKS:
            raise _error(f"no task or benchmark {spec!r}{nearest(spec, [*benchmarks, *TASKS])}")
    check_suite(specs)


def _checkpoint(path: str) -> None:
    """A run with a checkpoint, or a public one."""
    from k25_jax.checkpoint.folders import CheckpointError, complete_steps, find

    folder, is_run = find(path if path == "base" else _reached("--checkpoint", path))
    if is_run and not complete_steps(folder / "checkpoints"):
        raise CheckpointError(f"{folder / 'checkpoints'}: no complete checkpoint; a run writes its first one there")


def _writable(name: str, path: str | AnyPath) -> None:
    """A folder can be made there, or written into; nothing is left there."""
    if is_remote(place := to_path(path, name)):
        check_reachable(place, name, write=True)
        return
    folder = place.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise _error(f"{name}={path}: {folder} is not a folder; choose another")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".k25-", dir=folder))
    except OSError as error:
        raise _error(f"{name}={path}: {folder} cannot be written ({error.strerror}); choose another") from None


def _regular(path: str) -> None:
    """A file with something in it, and no pipe, from which reading would wait."""
    local_only(path, "--image or --video", "copy it here")
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise _error(f"{path}: there is no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise _error(f"{path}: cannot be read ({reason}); check the path and its permissions") from None
    if not stat.S_ISREG(status.st_mode):
        raise _error(f"{path}: is not a regular file; give the path of one")
    if not status.st_size:
        raise _error(f"{path}: is empty (0 bytes); fetch it again")


def _image(path: str) -> None:
    """A file that begins as an image does; it is decoded later."""
    _regular(path)
    from PIL import Image

    try:
        with Image.open(path):
            pass
    except Exception as error:  # decoders raise nearly every type there is
        reason = "no image of a known kind" if isinstance(error, Image.UnidentifiedImageError) else error
        raise _error(f"{path}: cannot be read as an image ({reason}); give another file") from None


def _video(path: str) -> None:
    """A file that begins as a video or an animated image does."""
    _regular(path)
    import av

    try:
        with av.open(path) as container:
            found = bool(container.streams.video)
    except Exception as error:  # as above
        if isinstance(error, av.error.InvalidDataError):
            _image(path)
            return
        raise _error(f"{path}: cannot be read as a video ({error}); give another file") from None
    if not found:
        raise _error(f"{path}: holds no video stream; give another file")


def _port(host: str, port: int) -> None:
    """Nobody listens there yet, and this user may."""
    if not 0 <= port < 2**16:
        raise _error(f"port={port} must lie in [0, 65536); change --port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        raise _error(f"{host}:{port}: cannot listen there ({error.strerror}); change --host or --port") from None
