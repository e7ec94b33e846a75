"""Compare the routing systems after a short run on the same text.

Every configuration of hydra_configs/small trains on the quickstart's text (Python's standard
library, prepared by `evomoe prepare`) for the same number of updates, with its own recipe; then
`fairseq-eval-lm` measures its perplexity on the test split. The baseline is an add-one smoothed
unigram model of the training split. Short runs of small models show that a system trains, and its
cost, not which one is best.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from processes import ROOT, call
from quickstart_text import prepare, program, unigram_perplexity

from evomoe_plugin.metrics.log import parse_log

RUNS = sorted(path.stem for path in (ROOT / "hydra_configs/small").glob("*.yaml"))


@dataclass(frozen=True)
class Result:
    """The results of a run."""

    run: str
    perplexity: float
    """On the test split."""
    experts_per_token: float
    """Routed pairs per token, mean over layers, at the end."""
    load_max: float
    """Largest load over the mean load, mean over layers, at the end."""
    tokens_per_second: float
    """Median over the logged intervals, without the first."""
    million_flops: float
    """Analytic forward FLOPs per token, at the end."""


def train_and_evaluate(run: str, data: Path, folder: Path, given: Iterable[str]) -> Result:
    """Train and evaluate a small run."""
    output = call(
        [
            program("fairseq-hydra-train"),
            "--config-dir",
            str(ROOT / "hydra_configs"),
            "--config-name",
            f"small/{run}",
            f"task.data={data}",
            "common.log_format=json",
            "dataset.disable_validation=true",
            f"hydra.run.dir={folder / run}",
            "checkpoint.save_interval_updates=0",
            *given,
        ]
    )
    intervals = parse_log(output.splitlines(), run).intervals
    evaluated = call(
        [
            program("fairseq-eval-lm"),
            str(data),
            "--user-dir",
            "evomoe_plugin",
            "--path",
            str(folder / run / "checkpoints/checkpoint_last.pt"),
            "--gen-subset",
            "test",
            "--tokens-per-sample",
            "128",
            "--batch-size",
            "16",
        ]
    )
    last = intervals[-1].values
    speeds = sorted(record.values["wps"] for record in intervals[1:])
    return Result(
        run=run,
        perplexity=float(re.search(r"Perplexity: ([\d.]+)", evaluated).group(1)),
        experts_per_token=last["experts_per_token"],
        load_max=last["load_max"],
        tokens_per_second=speeds[len(speeds) // 2],
        million_flops=last["mflops_per_token"],
    )


def table(results: Iterable[Result], unigram: float) -> str:
    """Markdown."""
    lines = [
        "| run | test perplexity | experts per token | max/mean load | tokens/s "
        "| MFLOPs per token |",
        "|---|---|---|---|---|---|",
        f"| unigram model | {unigram:.1f} | – | – | – | – |",
    ]
    lines += [
        f"| {r.run} | {r.perplexity:.1f} | {r.experts_per_token:.2f} | {r.load_max:.2f} "
        f"| {r.tokens_per_second:.0f} | {r.million_flops:.2f} |"
        for r in sorted(results, key=lambda r: r.perplexity)
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all sequentially, so that speeds are comparable, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs",
        nargs="+",
        default=RUNS,
        choices=RUNS,
        metavar="RUN",
        help="of hydra_configs/small (default: all)",
    )
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("small-runs"),
        help="for data, checkpoints and results (default: small-runs)",
    )
    parser.add_argument("--quick", action="store_true", help="small part of the text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--given", nargs="*", default=[], metavar="FIELD=VALUE", help="overrides for all runs"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    folder = args.folder.absolute()
    data = folder / ("data-quick" if args.quick else "data")
    prepare(data, args.quick)
    unigram, results = unigram_perplexity(data), []
    given = [
        f"optimization.max_update={args.updates}",
        f"lr_scheduler.warmup_updates={max(1, args.updates // 10)}",
        *args.given,
    ]
    for run in args.runs:
        start = time.perf_counter()
        results.append(train_and_evaluate(run, data, folder, given))
        print(
            f"{run}: perplexity {results[-1].perplexity:.1f} after {args.updates} updates, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        # Saved after each run, in case a later one fails.
        (folder / "results.json").write_text(
            json.dumps(
                {
                    "updates": args.updates,
                    "threads": args.threads,
                    "torch": torch.__version__,
                    "unigram_perplexity": unigram,
                    "runs": [asdict(r) for r in results],
                },
                indent=1,
            )
        )
    print(f"\n{args.updates} updates, {args.threads} threads, torch {torch.__version__}\n")
    print(table(results, unigram))


if __name__ == "__main__":
    main()
