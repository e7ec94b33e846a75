"""Does the time of EvoMoE's whole run match its FLOPs, relative to a dense MoE run?

Two real runs of fairseq's trainer, alternating by update in one process: EvoMoE (one expert before
the spawn, then all, annealed from dense to sparse, then top-1), and the gate `dense`, every expert
on every token, with the same sizes, tokens and optimizer. An update is everything the trainer does:
forward, backward, gradient norm, fused AdamW, logging; the spawn is part of its update.

The prediction is the ratio of matmul FLOPs that the runs log for routed pairs, attention and
vocabulary (`mflops_per_token`). It is compared with the ratio of seconds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch._dynamo  # noqa: F401  imported once, before forking; torch's optimizers import it
from speed import clock
from speed.forks import forked
from speed.machine import machine
from speed.measure import Setting, start
from speed.report import heading, table
from speed.results import Results, add_options
from speed.training import Sizes, build, sample

SIZES = Sizes(2, 256, 16, batch=8, length=256, vocabulary=8192)
QUICK = Sizes(2, 128, 8, batch=4, length=128, vocabulary=2048)
UPDATES = 40
# Shares of the run at the spawn and the end of annealing: a quarter each, then top-1.
SPAWN, HARD = 0.25, 0.5


def evomoe_options(updates: int) -> list[Any]:
    """Options for the three phases."""
    spawn, hard = int(SPAWN * updates), int(HARD * updates)
    return [
        "--moe-gate",
        "dense_to_sparse",
        "--moe-spawn-updates",
        spawn,
        "--moe-temperature-start",
        2.0,
        "--moe-temperature-end",
        0.1,
        "--moe-temperature-updates",
        hard - spawn,
        "--moe-hard-updates",
        hard - spawn,
    ]


def phase(update: int, updates: int) -> str:
    """Phase of EvoMoE's run."""
    if update < int(SPAWN * updates):
        return "one expert"
    return "annealing" if update < int(HARD * updates) else "top-1"


def run(sizes: Sizes, updates: int, setting: Setting) -> dict[str, Any]:
    """Both runs: seconds and logged MFLOPs per token of every update."""
    start(setting)
    batch = sample(sizes)
    common = ["--max-update", updates, "--cpu"]
    options = {"evomoe": evomoe_options(updates), "dense": ["--moe-gate", "dense"]}
    warm = {name: build(sizes, [*common, *given]).trainer() for name, given in options.items()}
    for trainer in warm.values():  # warm-up: first steps import and compile
        trainer.train_step([batch])
    trainers = {name: build(sizes, [*common, *given]).trainer() for name, given in options.items()}
    del warm
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    mflops: dict[str, list[float]] = {name: [] for name in trainers}
    for update in range(updates):
        for name in sorted(trainers, reverse=update % 2 == 1):
            begin = time.perf_counter()
            logged = trainers[name].train_step([batch])
            seconds[name].append(time.perf_counter() - begin)
            mflops[name].append(float(logged["mflops_per_token"]))
    return {
        "seconds": seconds,
        "mflops": mflops,
        "phases": [phase(update, updates) for update in range(updates)],
    }


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time and FLOPs of EvoMoE over dense MoE, for each phase and the whole run."""
    rows = []
    for name in (*dict.fromkeys(runs[0]["phases"]), "whole run"):
        taken, predicted = [], []
        for one in runs:
            chosen = [i for i, at in enumerate(one["phases"]) if name in (at, "whole run")]
            sums = {
                (kind, which): sum(one[kind][which][i] for i in chosen)
                for kind in ("seconds", "mflops")
                for which in ("evomoe", "dense")
            }
            taken.append(sums["seconds", "evomoe"] / sums["seconds", "dense"])
            predicted.append(sums["mflops", "evomoe"] / sums["mflops", "dense"])
        rows.append(
            {
                "phase": name,
                "time_ratio": clock.spread(taken),
                "predicted_ratio": sum(predicted) / len(predicted),
                "updates": len(chosen),
            }
        )
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = [
        "phase",
        "updates",
        "time / dense MoE",
        "range over runs",
        "predicted by FLOPs",
        "time / prediction",
    ]
    return table(
        columns,
        [
            [
                row["phase"],
                str(row["updates"]),
                f"{row['time_ratio']['median']:.3f}",
                f"{row['time_ratio']['min']:.3f}–{row['time_ratio']['max']:.3f}",
                f"{row['predicted_ratio']:.3f}",
                f"{row['time_ratio']['median'] / row['predicted_ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small runs")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--updates", type=int, default=UPDATES, help="per run (default: 40)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    add_options(parser, "whole_run.json")
    args = parser.parse_args()
    if args.updates < 8:
        parser.error(f"--updates {args.updates}: give 8 or more, so that no phase is empty")
    sizes = QUICK if args.quick else SIZES
    found = Results(args, {"machine": forked(lambda: machine("cpu")), "rounds": args.rounds})
    for threads in args.threads:
        if found.has(name=sizes.name, updates=args.updates, threads=threads):
            continue
        runs = []
        for _ in range(args.rounds):
            one = forked(lambda threads=threads: run(sizes, args.updates, Setting(threads=threads)))
            if "failed" in one:
                raise SystemExit(f"error: {one['failed']}")
            runs.append(one)
            whole = compare(runs)[-1]
            print(
                f"{sizes.name}, {threads} threads, run {len(runs)}: EvoMoE takes "
                f"{whole['time_ratio']['median']:.3f} of dense MoE's time; predicted "
                f"{whole['predicted_ratio']:.3f}",
                flush=True,
            )
        found.add(
            {
                "name": sizes.name,
                "updates": args.updates,
                "threads": threads,
                "rows": compare(runs),
                "runs": runs,
            }
        )
    print(f"\n{heading(found.numbers['machine'])}")
    for result in found.part():
        print(
            f"\n{result['name']}, fp32, {result['updates']} updates, {result['threads']} "
            f"threads\n\n{text(result['rows'])}"
        )


if __name__ == "__main__":
    main()
