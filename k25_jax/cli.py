"""The command `k25`: train, sweep, data, generate, chat, serve, eval, convert, params, preflight, report, demo."""

import argparse
import dataclasses
import json
import logging
import pathlib
import sys

from k25_jax.data import console

TRAIN_HELP = """several processes: on a TPU pod, the same command on every worker. Elsewhere set for each process
  JAX_COORDINATOR_ADDRESS  HOST:PORT of process 0, at a port that is free
  JAX_NUM_PROCESSES        how many there are
  JAX_PROCESS_ID           which one this is, from 0
or, on one machine, python launch/local.py --processes=N -- k25 train ... All need the same --workdir, and data.lanes
a multiple of N. When one was lost, start all again, or another number: they go on after the last checkpoint."""
CHECKPOINT_HELP = "a run of ours or a public checkpoint; default: the tiny model that comes with the package"
EVAL_HELP = """benchmarks: aime, hmmt, gpqa, mmlu_pro, mmmu, mmmu_pro, mmmu_pro_vision, mathvista, ocrbench, docvqa, infovqa,
charxiv_reasoning, charxiv_descriptive, videomme. Every answer is kept as it comes: the same command goes on where it was
ended, and more --questions or samples add to what is there. Tasks of tool_use need bubblewrap."""
MODES = ("plain", "thinking", "instant")
MODE_HELP = "how answers begin; default: thinking for the public Kimi weights, else plain"
COMMANDS = "train a model, ask it questions, count its parameters, convert its weights"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors that a user can mend are one line on stderr and status 2."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("train", "sweep", "params", "preflight", "data"):
        args.parser.error(f"unknown argument {rest[0]}")
    args.overrides = [override(item, args.parser) for item in rest]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what it raises later
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except user_errors() as error:
        print(f"k25 {args.command}: error: {error}", file=sys.stderr)
        return 2


def override(item: str, parser: argparse.ArgumentParser) -> str:
    """`--config.train.steps=5` or `train.steps=5` to `train.steps=5`."""
    text = item.removeprefix("--").removeprefix("config.")
    key, equals, _ = text.partition("=")
    if not equals or not ("." in key or item.startswith("--config.")):
        parser.error(f"unknown argument {item}; overrides read --config.section.key=value")
    return text


def user_errors() -> tuple[type[Exception], ...]:
    """What is the fault of the input or the disk, by class; anything else is a bug and shows its traceback."""
    from k25_jax.checkpoint.store import CheckpointError
    from k25_jax.config import ConfigError
    from k25_jax.data.packing import PackingError
    from k25_jax.data.records import DataError
    from k25_jax.evals.protocol import AnswererError
    from k25_jax.report.metrics import MetricsError
    from k25_jax.sampling.sample import PromptError
    from k25_jax.serving.limits import ServerError
    from k25_jax.text.chat import ChatError
    from k25_jax.text.tokenizer import TokenizerError
    from k25_jax.train.loop import BadSteps
    from k25_jax.vision.image import ImageError
    from k25_jax.vision.patchpack import PackError
    from k25_jax.vision.video import VideoError

    return (
        CheckpointError, ConfigError, PackingError, DataError, MetricsError, PromptError, ServerError, ChatError,
        TokenizerError, BadSteps, ImageError, PackError, VideoError, AnswererError, OSError,
    )  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = Parser(prog="k25", description=f"Kimi K2.5 in JAX: {COMMANDS}.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.set_defaults(run=run, parser=added)
        return added

    train = command("train", run_train, "run an experiment file, or resume it")
    train.formatter_class, train.epilog = argparse.RawDescriptionHelpFormatter, TRAIN_HELP
    train.add_argument("--config", required=True, metavar="FILE[:ARG]", help="experiment file with get_config(arg)")
    train.add_argument("--workdir", default="", help="where the run lives; default runs/<name>")
    train.add_argument("--json", action="store_true", help="print the last metrics as JSON")

    add_sweep(command("sweep", run_sweep, "run all points of an experiment file's get_hyper(), then its report"))

    data = commands.add_parser("data", help="build, inspect or check a data set", allow_abbrev=False)
    console.add_commands(data)

    params = command("params", run_params, "count parameters by component; allocates nothing")
    what = params.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:ARG]", help="experiment file")
    what.add_argument("--preset", help="k25_1t, moonlight_16b, 1b, 100m or tiny")
    params.add_argument("--json", action="store_true", help="print JSON")

    add_preflight(command("preflight", run_preflight, "compile a step for chips that are not here; does it fit?"))

    generate = command("generate", run_generate, "continue a prompt of text, images and video")
    add_sampling(generate)
    text = generate.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="the user's message; default: read standard input")
    text.add_argument("--prompt_ids", help="token ids, comma separated; media_pad once for each image or video chunk")
    generate.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    generate.add_argument("--video", action="append", default=[], help="video file; may be repeated")
    generate.add_argument("--raw", action="store_true", help="continue --prompt as it is, without the chat template")
    generate.add_argument("--json", action="store_true", help='print {"tokens", "logprobs", "text"}')

    chat = command("chat", run_chat, "talk to a model; /image FILE, /video FILE, /reset, /quit")
    add_sampling(chat)
    add_serve(command("serve", run_serve, "answer requests in the form of OpenAI's API"))

    convert = command("convert", run_convert, "write a checkpoint in the public format")
    convert.add_argument("--checkpoint", required=True, help="a run of ours or a public checkpoint")
    convert.add_argument("--output", required=True, help="folder to write")
    convert.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    convert.add_argument("--quantise", choices=("int4", "fp8"), help="int4: routed experts; fp8: the layers' matrices")

    add_eval(command("eval", run_eval, "ask a checkpoint or a server the questions of tasks, and score its answers"))

    report = command("report", run_report, "write report.html of a run: curves and configuration")
    report.add_argument("--workdir", required=True, help="the run's folder")

    demo = command("demo", run_demo, "train a tiny K2.5, kill and resume it, evaluate it, write a report")
    demo.add_argument("--workdir", default="runs/demo")
    demo.add_argument(
        "--steps", type=int, default=0, help="training steps; default: those of experiments/pretrain/demo.py"
    )
    return parser


def add_preflight(parser: argparse.ArgumentParser) -> None:
    """The flags of `k25 preflight`."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="experiment file")
    topologies = "v5p-1024 as gcloud has it, v5p:8x8x8, 2xv5p-1024 (two slices), or cpu, gpu of here"
    parser.add_argument("--topology", required=True, help=topologies)
    parser.add_argument("--rows", type=int, default=0, help="rows in a step; default data.batch_size")
    parser.add_argument("--layout", action="store_true", help="only list every array's sharding and bytes a device")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """The flags of `k25 sweep`."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="experiment file with get_hyper()")
    parser.add_argument("--workdir", required=True, help="where the runs live, a folder each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its share of the cores; default 1")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in their names, and no report")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The flags of `k25 eval`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EVAL_HELP
    parser.add_argument("--checkpoint", default="base", help=CHECKPOINT_HELP)
    parser.add_argument("--url", default="", help="ask a server instead, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="the model's name at --url")
    parser.add_argument("--api_key_env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    parser.add_argument("--suite", choices=("categories",), help="all rendered tasks; the default")
    task = "a rendered task such as words:test, may be repeated; or a benchmark, with --data"
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help=task)
    parser.add_argument("--data", default="", metavar="FILE", help="the benchmark's file, as published")
    parser.add_argument("--questions", type=int, help="of each task, at most; default 128 of rendered tasks, else all")
    parser.add_argument("--k", type=int, help="samples of each question; default 1, or as the benchmark has it")
    parser.add_argument("--temperature", type=float, help="default 0 for rendered tasks, 1.0 for benchmarks")
    parser.add_argument("--top_p", type=float, help="default 0.95")
    parser.add_argument("--max_tokens", type=int, help="of an answer; default: as the benchmark has it")
    parser.add_argument("--context", type=int, help="tokens of prompt and answer; default 262144, or the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="requests that a checkpoint answers at once; default 32")
    parser.add_argument("--concurrency", type=int, default=16, help="requests that a server has at once; default 16")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for a request; default 3600")
    parser.add_argument("--retries", type=int, default=5, help="more tries of a failed request; default 5")
    parser.add_argument("--workdir", default="", help="where answers and scores are kept; default below runs/evals")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags shared by generate and chat."""
    parser.add_argument("--checkpoint", default="base", help=CHECKPOINT_HELP)
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--mode", default="", choices=MODES, help=MODE_HELP)
    parser.add_argument("--max_tokens", "--max-tokens", "--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default 1.0")
    parser.add_argument("--top_p", "--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    parser.add_argument("--ignore_eos", action="store_true", help="go on after the end token, up to --max_tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--max_image_patches", type=int, default=16384, help="larger images are scaled down")
    parser.add_argument("--max_frame_patches", type=int, default=4096, help="the same for frames of a video")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second taken from a video")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flags of `k25 serve`."""
    parser.add_argument("--checkpoint", default="base", help=CHECKPOINT_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only; another needs an API key")
    parser.add_argument("--port", type=int, default=8000, help="0 picks one that is free; default 8000")
    parser.add_argument("--api_key_env", default="", metavar="NAME", help="environment variable that holds the API key")
    parser.add_argument("--api_key_file", default="", metavar="FILE", help="file that holds the API key")
    parser.add_argument(
        "--model_name", default="", help="what requests call the model; default: the checkpoint's folder"
    )
    parser.add_argument("--mode", default="", choices=MODES, help=f"where a request does not say: {MODE_HELP}")
    parser.add_argument("--slots", type=int, default=32, help="answers that are drawn at once; default 32")
    parser.add_argument("--pages", type=int, default=1024, help="pages of 16 tokens in the cache; default 1024")
    parser.add_argument(
        "--max_length", type=int, default=0, help="tokens of a prompt and its answer; default: the model's"
    )
    parser.add_argument(
        "--max_tokens", type=int, default=0, help="tokens of an answer, at most; default: no further limit"
    )
    parser.add_argument("--concurrency", type=int, default=256, help="requests that may be open; others get 429")
    parser.add_argument("--grace_seconds", type=float, default=30.0, help="for open requests when the server stops")
    parser.add_argument("--media_root", default="", metavar="FOLDER", help="images and videos may be files below it")
    parser.add_argument("--max_pixels", type=int, default=2**25, help="of an image or frame; larger ones are refused")
    parser.add_argument("--max_image_patches", type=int, default=1024, help="larger images are scaled down")
    parser.add_argument("--max_frame_patches", type=int, default=256, help="the same for frames of a video")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second taken from a video")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


# ------------------------------------------------------------------------------------------------------------- commands
def run_train(args) -> None:
    """Train, alone or with other processes; the first prints where the run lives."""
    from k25_jax.config import load_experiment
    from k25_jax.sharding.processes import joined
    from k25_jax.train.loop import train

    experiment = load_experiment(args.config, args.overrides)
    workdir = pathlib.Path(args.workdir or f"runs/{experiment.name}")
    with joined() as index:
        metrics = train(experiment, workdir)
    if index == 0:
        print(json.dumps(metrics) if args.json else f"finished: {workdir} (k25 report --workdir={workdir})")


def run_sweep(args) -> int:
    """Status 1 when a run failed."""
    from k25_jax.train.sweep import sweep

    return 1 if sweep(args.config, pathlib.Path(args.workdir), args.overrides, args.jobs, args.only) else 0


def run_eval(args) -> None:
    """Print a table, or JSON."""
    from k25_jax.report.evals import evaluate_command

    evaluate_command(args)


def run_params(args) -> None:
    """A table, or one JSON object."""
    from k25_jax.config import load_experiment, preset
    from k25_jax.models.count import count_params

    config = load_experiment(args.config, args.overrides).model if args.config else preset(args.preset)
    counts = count_params(config)
    if args.json:
        print(json.dumps(counts))
        return
    for name, number in counts.items():
        print(f"{name:16s}{number:22,d}{100 * number / counts['total']:9.2f} %")


def run_preflight(args) -> int:
    """A report, or where every array lies. Status 1 when the step does not fit."""
    from k25_jax.config import load_experiment
    from k25_jax.preflight import aot, table
    from k25_jax.preflight.topology import parse_topology

    topology = parse_topology(args.topology)
    experiment = aot.with_rows(load_experiment(args.config, args.overrides), args.rows)
    if args.layout:
        tensors = aot.layout(experiment, topology)
        rows = [dataclasses.asdict(tensor) for tensor in tensors]
        print(json.dumps(rows) if args.json else table.render_layout(tensors))
        return 0
    report = aot.preflight(experiment, topology, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(dataclasses.asdict(report)) if args.json else table.render(report))
    return 0 if report.fits else 1


def run_generate(args) -> int:
    """Print the answer as it comes, or JSON at the end."""
    from k25_jax.sampling.console import generate

    return generate(args)


def run_chat(args) -> int:
    """Read a line, answer, repeat."""
    from k25_jax.sampling.console import chat

    return chat(args)


def run_serve(args) -> int:
    """Answer requests until a signal comes."""
    from k25_jax.serving.serve import serve

    return serve(args)


def run_convert(args) -> None:
    """Write a model in the public format, and say what was left."""
    from k25_jax.checkpoint.convert import convert

    for line in convert(args.checkpoint, args.output, args.dtype, args.quantise):
        print(line)


def run_report(args) -> None:
    """Curves and configuration of a run."""
    from k25_jax.report.run import write_run_report

    print(f"wrote {write_run_report(args.workdir)}")


def run_demo(args) -> int:
    """The whole demonstration."""
    from k25_jax.demo import demo

    return demo(pathlib.Path(args.workdir), args.steps)


if __name__ == "__main__":
    sys.exit(main())
