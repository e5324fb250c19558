"""The commands of `k25` and their flags."""

import argparse

from k25_jax.cli import checks, commands
from k25_jax.data import console

TRAIN_HELP = """several processes: on a TPU pod, the same command on every worker. Elsewhere set for each process
  JAX_COORDINATOR_ADDRESS  HOST:PORT of process 0, at a port that is free
  JAX_NUM_PROCESSES        how many there are
  JAX_PROCESS_ID           which one this is, from 0
or, on one machine, python launch/local.py --processes=N -- k25 train ... All need the same --workdir; data.lanes,
where it is given, is a multiple of N. When one was lost, start all again, or another number: they go on after the last
checkpoint, and then data.lanes must be given as it was, or as many as there were."""
CHECKPOINT_HELP = "a run of ours or a public checkpoint; default: the tiny model that comes with the package"
EVAL_HELP = """benchmarks: aime, hmmt, gpqa, mmlu_pro, mmmu, mmmu_pro, mmmu_pro_vision, mathvista, ocrbench, docvqa, infovqa,
charxiv_reasoning, charxiv_descriptive, videomme. Every answer is kept as it comes: the same command goes on where it was
ended, and more --questions or samples add to what is there. Tasks of tool_use need bubblewrap."""
MODES = ("plain", "thinking", "instant")
MODE_HELP = "how answers begin; default: thinking for the public Kimi weights, else plain"
CACHE_HELP = "compile anew, keep nothing; as does the environment variable K25_NO_CACHE=1"
CONFIG_HELP = "experiment file with get_config(arg), or one of `k25 experiments`"
COMMANDS = "train a model, ask it questions, count its parameters, convert its weights"


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the word that was probably meant."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else "choice"
            self.error(
                f"{action.option_strings[0] + ': ' if action.option_strings else ''}no {what} {value!r}"
                f"{meant(value, action.choices)} (there are {', '.join(map(str, action.choices))})"
            )

    @property
    def commands(self) -> dict[str, "Parser"]:
        """The parsers below this one, by name."""
        below = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return next(below, {})

    def check_flags(self, words: list[str]) -> None:
        """End with an error at the first flag that there is not, before argparse misses one that was misspelt."""
        parser = self
        for word in words:
            flag, equals, _ = word.partition("=")
            if word == "--":
                return
            if not word.startswith("-") and parser.commands:
                if word not in parser.commands:
                    return
                parser = parser.commands[word]
            elif word.startswith("--") and " " not in flag and flag not in parser._option_string_actions:
                if not (parser.get_default("overrides") and is_override(word)):
                    parser.error(f"unknown argument {word}{meant(flag, parser._option_string_actions)}")


def is_override(word: str) -> bool:
    """Whether this is meant for the experiment: `--config.train.steps=5`, `--train.steps=5` or `train.steps=5`."""
    key, equals, _ = word.removeprefix("--").partition("=")
    return key.startswith("config.") or ("." in key and bool(equals))


def override(words: list[str], parser: Parser) -> list[str]:
    """What argparse has left over as overrides, `train.steps=5` each."""
    items, found = list(words), []
    while items:
        item = items.pop(0)
        if not is_override(item):
            parser.error(f"unknown argument {item}; overrides read --config.section.key=value")
        if "=" not in item and items and not items[0].startswith("--"):
            item += f"={items.pop(0)}"  # --config.train.steps 5
        if "=" not in item:
            parser.error(f"{item} has no value; overrides read --config.section.key=value")
        found.append(item.removeprefix("--").removeprefix("config."))
    return found


def meant(word: str, options) -> str:
    """ "; did you mean ..?" """
    from k25_jax.config.checks import nearest

    return nearest(word, options)


def build_parser() -> Parser:
    """All commands and their flags."""
    parser = Parser(prog="k25", description=f"Kimi K2.5 in JAX: {COMMANDS}.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the versions of k25_jax and JAX")
    below = parser.add_subparsers(dest="command", metavar="command")

    def command(name: str, run, text: str, check=None, overrides: bool = False) -> Parser:
        added = below.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.set_defaults(run=run, check=check, parser=added, overrides=overrides)
        return added

    add_train(command("train", commands.run_train, "run an experiment file, or resume it", overrides=True))
    sweep = "run all points of an experiment file's get_hyper(), then its report"
    add_sweep(command("sweep", commands.run_sweep, sweep, checks.sweep, overrides=True))
    experiments = command(
        "experiments", commands.run_experiments, "list the experiment files of the package, or copy one"
    )
    experiments.add_argument("--copy", metavar="NAME", help="one to start from, such as pretrain/demo")
    experiments.add_argument("--output", metavar="FILE", help="where to; default: the same name, here")

    data = below.add_parser("data", help="build, inspect or check a data set; good traces as one", allow_abbrev=False)
    data.set_defaults(parser=data)
    console.add_commands(data)
    for action in data.commands.values():
        action.set_defaults(check=checks.data, overrides=True)
    data.commands["traces"].set_defaults(run=commands.run_data_traces, check=checks.traces, overrides=False)

    params = command("params", commands.run_params, "count parameters by component; allocates nothing", overrides=True)
    what = params.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE[:ARG]", help="experiment file")
    what.add_argument("--preset", help="k25_1t, moonlight_16b, 1b, 100m or tiny")
    params.add_argument("--json", action="store_true", help="print JSON")

    fits = "compile a step for chips that are not here; does it fit?"
    add_preflight(command("preflight", commands.run_preflight, fits, overrides=True))
    generate = "continue a prompt of text, images and video"
    add_generate(command("generate", commands.run_generate, generate, checks.generate))
    talk = "talk to a model; /image FILE, /video FILE, /reset, /quit"
    add_sampling(command("chat", commands.run_chat, talk, checks.sampling))
    add_serve(command("serve", commands.run_serve, "answer requests in the form of OpenAI's API", checks.serve))
    add_convert(command("convert", commands.run_convert, "write a checkpoint in the public format", checks.convert))
    ask = "ask a checkpoint or a server the questions of tasks, and score its answers"
    add_eval(command("eval", commands.run_eval, ask, checks.evaluate))

    page = "write report.html of a run: curves and configuration; or one trace as a page"
    add_report(command("report", commands.run_report, page, checks.report))
    demo = command("demo", commands.run_demo, "train a tiny K2.5, kill and resume it, evaluate it, write a report")
    demo.add_argument("--workdir", default="runs/demo")
    demo.add_argument("--steps", type=int, default=0, help="training steps; default: those of the experiment")
    demo.add_argument("--no_cache", action="store_true", help=CACHE_HELP)

    text = command("help", None, "what a command does, and its flags")
    text.add_argument("topic", nargs="*", metavar="command", help="such as: data build")
    return parser


def add_report(parser: Parser) -> None:
    """The flags of `k25 report`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", help="the run's folder")
    trace = "one trace instead, by its id or its place in the file, from 0 on; default the first"
    what.add_argument("--trace", metavar="FILE[:ID]", help=trace)
    parser.add_argument("--output", metavar="FILE", help="of --trace: the page to write; default trace.html")
    vocabulary = "of --trace: folder of the vocabulary; default that of the run that the file lies in, else bytes"
    parser.add_argument("--tokenizer", metavar="DIR", help=vocabulary)


def add_train(parser: Parser) -> None:
    """The flags of `k25 train`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, TRAIN_HELP
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help=CONFIG_HELP)
    parser.add_argument("--workdir", default="", help="where the run lives; default runs/<name>")
    parser.add_argument("--json", action="store_true", help="print the last metrics as JSON")
    parser.add_argument("--no_cache", action="store_true", help=CACHE_HELP)


def add_generate(parser: Parser) -> None:
    """The flags of `k25 generate`."""
    add_sampling(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="the user's message; default: read standard input")
    text.add_argument("--prompt_ids", help="token ids, comma separated; media_pad once for each image or video chunk")
    parser.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    parser.add_argument("--video", action="append", default=[], help="video file; may be repeated")
    parser.add_argument("--raw", action="store_true", help="continue --prompt as it is, without the chat template")
    parser.add_argument("--json", action="store_true", help='print {"tokens", "logprobs", "text"}')


def add_convert(parser: Parser) -> None:
    """The flags of `k25 convert`."""
    parser.epilog = (
        "One tensor is read and written at a time. Started on every host of a pod, with an --output that all share, they "
        "share out the files; on one of its hosts alone set JAX_PLATFORMS=cpu. Killed and started again, it goes on."
    )
    parser.add_argument("--checkpoint", required=True, help="a run of ours or a public checkpoint")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--quantise", choices=("int4", "fp8"), help="int4: routed experts; fp8: the layers' matrices")
    parser.add_argument(
        "--file_gb", type=float, default=5.0, help="size of a file at most; all processes share out the files"
    )


def add_preflight(parser: Parser) -> None:
    """The flags of `k25 preflight`."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="experiment file")
    topologies = "v5p-1024 as gcloud has it, v5p:8x8x8, 2xv5p-1024 (two slices), or cpu, gpu of here"
    parser.add_argument("--topology", required=True, help=topologies)
    what = (
        "the training step, or those of the sampling engine: how many requests of which length fit beside its weights"
    )
    parser.add_argument("--what", choices=("train", "sample"), default="train", help=what)
    rows = "rows in a step; default data.batch_size. For sample: requests at once, default 8 a device"
    parser.add_argument("--rows", type=int, default=0, help=rows)
    parser.add_argument("--length", type=int, default=0, help="for sample: tokens of a request; default 32768")
    parser.add_argument("--tensor", type=int, default=0, help="for sample: devices that share out heads and widths")
    parser.add_argument(
        "--suggest", action="store_true", help="where it does not fit, compile nearby settings till one does"
    )
    parser.add_argument("--layout", action="store_true", help="only list every array's sharding and bytes a device")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_sweep(parser: Parser) -> None:
    """The flags of `k25 sweep`."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="experiment file with get_hyper()")
    parser.add_argument("--workdir", required=True, help="where the runs live, a folder each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its share of the cores; default 1")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in their names, and no report")
    parser.add_argument("--no_cache", action="store_true", help=CACHE_HELP)


def add_eval(parser: Parser) -> None:
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
    parser.add_argument("--no_cache", action="store_true", help=CACHE_HELP)


def add_sampling(parser: Parser) -> None:
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
    parser.add_argument("--no_cache", action="store_true", help=CACHE_HELP)


def add_serve(parser: Parser) -> None:
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
    parser.add_argument("--no_cache", action="store_true", help=CACHE_HELP)
