"""Does training with bf16 matmuls reach the loss of fp32?

The quickstart's model on its text, with several seeds, in fp32 and with --moe-matmul-dtype bf16:
training loss in windows of updates, and perplexity on the test split at the end. A seed determines
initial weights, order of the text and noise in both precisions. Runs with other seeds estimate the
noise: a window is within it if its mean difference is at most the largest difference between two
fp32 runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from processes import call
from quickstart_text import Recipe, flags, prepare, program

from evomoe_plugin.experts.precision import native_matmul_dtype
from evomoe_plugin.metrics.log import parse_log

DTYPES = ("same", "bf16")
NAMES = {"same": "fp32", "bf16": "bf16"}


@dataclass(frozen=True)
class Curve:
    """The results of a run."""

    dtype: str
    seed: int
    losses: list[float]
    """Mean cross-entropy of each window of updates, bits per token."""
    perplexity: float
    """On the test split, in the run's own precision."""
    tokens_per_second: float
    """Median over the logged intervals."""


def train(dtype: str, seed: int, recipe: Recipe, data: Path, folder: Path, window: int) -> Curve:
    """Train and evaluate one run."""
    save = folder / f"{NAMES[dtype]}-{seed}"
    output = call(
        [
            program("fairseq-train"),
            str(data),
            *flags(recipe.train),
            "--max-update",
            str(recipe.updates),
            "--save-dir",
            str(save),
            "--seed",
            str(seed),
            "--log-interval",
            str(window),
            "--moe-matmul-dtype",
            dtype,
            "--disable-validation",
            "--save-interval-updates",
            "0",
            "--no-save-optimizer-state",
        ]
    )
    intervals = [record.values for record in parse_log(output.splitlines(), save.name).intervals]
    evaluated = call(
        [
            program("fairseq-eval-lm"),
            str(data),
            *flags(recipe.evaluate),
            "--path",
            str(save / "checkpoint_last.pt"),
        ]
    )
    return Curve(
        dtype=dtype,
        seed=seed,
        losses=[values["inner_loss"] for values in intervals],
        perplexity=float(re.search(r"Perplexity: ([\d.]+)", evaluated).group(1)),
        tokens_per_second=statistics.median(values["wps"] for values in intervals[1:]),
    )


def standard_error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def table(curves: list[Curve], window: int) -> str:
    """Markdown: means over seeds, differences with standard errors, and the noise between seeds."""
    of = {d: [c for c in curves if c.dtype == d] for d in DTYPES}
    lines = [
        "| updates | fp32 | bf16 | difference, same seed | two seeds in fp32, largest difference |",
        "|---|---|---|---|---|",
    ]
    rows = [
        (f"{n * window + 1}–{(n + 1) * window}", "{:.3f}", lambda c, n=n: c.losses[n])
        for n in range(len(curves[0].losses))
    ]
    rows.append(("test perplexity", "{:.2f}", lambda c: c.perplexity))
    within = 0
    for name, form, read in rows:
        exact, rounded = ([read(c) for c in of[d]] for d in DTYPES)
        pairs = [b - a for a, b in zip(exact, rounded, strict=True)]
        mean, error = statistics.fmean(pairs), standard_error(pairs)
        noise = max(exact) - min(exact)
        within += abs(mean) <= noise
        numbers = [form.format(statistics.fmean(values)) for values in (exact, rounded)]
        numbers.append(f"{form.replace(':', ':+').format(mean)} ± {form.format(error)}")
        lines.append(f"| {name} | {' | '.join(numbers)} | {form.format(noise)} |")
    lines.append(f"\nWithin the noise of seeds: {within} of {len(rows)} rows.")
    return "\n".join(lines)


def speeds(curves: list[Curve]) -> str:
    """Markdown: tokens per second of each precision."""
    medians = {
        d: statistics.median(c.tokens_per_second for c in curves if c.dtype == d) for d in DTYPES
    }
    units = native_matmul_dtype(torch.bfloat16, "cpu") is torch.bfloat16
    return (
        f"Tokens per second, median: fp32 {medians['same']:.0f}, bf16 {medians['bf16']:.0f} "
        f"({medians['bf16'] / medians['same']:.2f} times); this CPU has "
        f"{'' if units else 'no '}bf16 matmul instructions."
    )


def main() -> None:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--window", type=int, default=100, help="updates to average over")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("bf16-runs"),
        help="for data, checkpoints and results (default: bf16-runs)",
    )
    parser.add_argument("--quick", action="store_true", help="small model and text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="per run")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="concurrent runs; more than 1 only with enough cores",
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    folder = args.folder.absolute()
    data = folder / ("data-quick" if args.quick else "data")
    prepare(data, args.quick)
    recipe = Recipe(updates=args.updates, quick=args.quick)
    start = time.perf_counter()
    # Alternate, so that a slowdown of the machine affects both precisions.
    plan = [(dtype, seed) for seed in args.seeds for dtype in DTYPES]
    with ThreadPoolExecutor(args.parallel) as pool:
        curves = list(pool.map(lambda run: train(*run, recipe, data, folder, args.window), plan))
    (folder / "results.json").write_text(
        json.dumps(
            {
                "arguments": {**vars(args), "folder": str(args.folder)},
                "torch": torch.__version__,
                "curves": [asdict(curve) for curve in curves],
            },
            indent=1,
        )
    )
    print(
        f"{args.updates} updates, seeds {args.seeds}, {args.threads} threads per run, "
        f"{args.parallel} concurrent, torch {torch.__version__}, "
        f"{time.perf_counter() - start:.0f} s\n"
    )
    print(table(curves, args.window))
    print(f"\n{speeds(curves)}")


if __name__ == "__main__":
    main()
