"""Public benchmarks, read from files that the user has, in the formats in which they were published (K2.5 §4).

`load_benchmark("aime", "aime_2025.jsonl")` gives a `TaskSet`; nothing is downloaded.
"""

import difflib
import importlib
import pathlib

from k25_jax.config import ConfigError

# Name -> (module, class).
BENCHMARKS = {
    "aime": ("mathematics", "Aime"),
    "hmmt": ("mathematics", "Hmmt"),
    "gpqa": ("knowledge", "Gpqa"),
    "mmlu_pro": ("knowledge", "MmluPro"),
    "mmmu": ("mmmu", "Mmmu"),
    "mmmu_pro": ("mmmu", "MmmuPro"),
    "mmmu_pro_vision": ("mmmu", "MmmuProVision"),
    "mathvista": ("mathvista", "MathVista"),
    "ocrbench": ("ocr", "OcrBench"),
    "docvqa": ("ocr", "DocVqa"),
    "infovqa": ("ocr", "InfoVqa"),
    "charxiv_reasoning": ("charxiv", "CharXivReasoning"),
    "charxiv_descriptive": ("charxiv", "CharXivDescriptive"),
    "videomme": ("videomme", "VideoMme"),
}


def benchmark_class(name: str) -> type:
    """The class of a benchmark, with its `k` and `max_tokens`; raises ConfigError for an unknown name."""
    if name not in BENCHMARKS:
        nearest = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"no benchmark {name!r}; did you mean {nearest!r}? There are: {', '.join(BENCHMARKS)}")
    module, kind = BENCHMARKS[name]
    return getattr(importlib.import_module(f"k25_jax.evals.benchmarks.{module}"), kind)


def load_benchmark(name: str, path: str | pathlib.Path):
    """A `Benchmark` over a file; raises DataError for a file that will not do."""
    return benchmark_class(name)(path)
