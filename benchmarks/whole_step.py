"""The whole training step of the 1.04T model, compiled by the real TPU compiler without a TPU (row i of the bounds).

K2.5 at its real size, rows of 4096 tokens, MuonClip, DEP, three repeats of the pipeline: `k25 preflight` (k25_jax.preflight)
in a process of its own for each topology, v5p-512 (256 chips) with 1024 rows a step and v5p-1024 (512 chips) with 2048.
Figures are the memory of a chip at the peak, the time to compile, and the memory of the process that compiles; beside
them what the state and the batch take alone. Needs the `preflight` extra: pip install -e ".[preflight]". With --json one
JSON line. Other flags go to `k25 preflight`: --config.optim.name=adamw.
"""

import argparse
import json
import subprocess
import sys

ROWS = {"v5p-512": 1024, "v5p-1024": 2048}  # four a chip
BOUNDS = {"peak_hbm_gb": 95.0, "compile_s": 900.0, "rss_gb": 16.0}


def compiled(topology: str, rows: int, more: list[str]) -> dict:
    """The report of `k25 preflight`; its progress goes to standard error."""
    command = [sys.executable, "-m", "k25_jax.cli", "preflight", "--config=experiments/pretrain/k25_1t.py", "--json"]
    command += [f"--topology={topology}", f"--rows={rows}", "--config.train.accumulate=1", *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main():
    about, _, _ = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    parser.add_argument("--topology", action="append", choices=ROWS, help="only this one; may be given again")
    args, more = parser.parse_known_args()
    reports = {name: compiled(name, ROWS[name], more) for name in args.topology or ROWS}
    keys = (*BOUNDS, "argument_gb", "mfu_bound", "step_seconds_bound", "chips")
    rows = {name: {key: report[key] for key in keys} for name, report in reports.items()}
    ok = all(report["fits"] for report in reports.values())
    ok &= all(row[key] <= bound for row in rows.values() for key, bound in BOUNDS.items())
    figure = max(row["peak_hbm_gb"] for row in rows.values())
    if args.json:
        line = {"name": "whole_step", "figure": figure, "bound": BOUNDS["peak_hbm_gb"], "ok": bool(ok)}
        print(json.dumps(line | {"bounds": BOUNDS, "topologies": rows}))
        return
    for name, row in rows.items():
        print(
            f"{name:9s} {row['chips']} chips: {row['peak_hbm_gb']:.1f} GB a chip at the peak, "
            f"{row['peak_hbm_gb'] / row['argument_gb']:.1f} times state and batch ({row['argument_gb']:.1f} GB); compiled in "
            f"{row['compile_s']:.0f} s and {row['rss_gb']:.1f} GB; MFU at most {row['mfu_bound']:.0%}"
        )
    print(
        "bounds: {peak_hbm_gb:.0f} GB a chip, {compile_s:.0f} s, {rss_gb:.0f} GB; {}".format(
            "ok" if ok else "NOT met", **BOUNDS
        )
    )


if __name__ == "__main__":
    main()
