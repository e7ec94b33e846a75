"""Speed of one MoE layer against bare matmuls and other implementations.

Forward and backward pass of a layer, with gradients of input and weights, which are discarded after
each step. All contenders get the same tokens, weights and routing, and take turns in one process;
those that need much memory run in a separate process, together with the limit. Ratios are taken
within a round.

- Limit: bare matmuls of the same FLOPs, all routed rows through one expert.
- Floor: the same matmuls for each expert's rows, with cold weights and written weight gradients.
- A contender's ratio is per FLOP: SwiGLU experts have three matrices of about two thirds the width.

Results are written as JSON after each case; `--resume` skips the cases in the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from speed import clock, peers, report
from speed.cases import Case, chosen
from speed.forks import forked
from speed.machine import machine
from speed.measure import CONTENDERS, DTYPES, Setting, in_own_process, nulls
from speed.results import Results, add_options, add_unattended

OURS = "Ours"


def measure(case: Case, setting: Setting, names: list[str], memory: bool) -> dict[str, Any]:
    """All results of a case: time ratios, memory, failures with reasons."""
    together = [name for name in names if not CONTENDERS[name].ALONE]
    groups = [together, *([name] for name in names if CONTENDERS[name].ALONE)]
    result: dict[str, Any] = {
        "name": case.name,
        "group": case.group,
        "gate": case.gate,
        "tokens": case.tokens,
        "width": case.width,
        "ffn": case.ffn_dim,
        "experts": case.experts,
        "top_k": case.top_k,
        "wanted": case.wanted,
        "null_share": case.null_share,
        "dtype": setting.dtype,
        "threads": setting.threads,
        "device": setting.device,
        "rows": {},
        "failed": {},
        "memory": {},
    }
    for group in groups:
        measured = in_own_process(case, setting, group)
        if "failed" in measured:
            result["failed"] |= dict.fromkeys(group, measured["failed"])
            continue
        result["failed"] |= measured["failed_each"]
        times, flops = measured["times"], measured["flops"]
        if group is together:
            add_bounds(result, measured)
        for name in group:
            if name in times:
                result["rows"][name] = ratios(times, flops, name)
    if memory:
        for name in names:
            if name not in result["failed"] and name not in ("Dense", "Routing"):
                result["memory"][name] = in_own_process(case, setting, [name], "memory")
    return result


def add_bounds(result: dict[str, Any], measured: dict[str, Any]) -> None:
    """Data of the case and its limit, and the share of our routing."""
    times, flops = measured["times"], measured["flops"]
    limit = clock.spread(times["Limit"])["median"]
    result |= {
        "pairs": measured["pairs"],
        "load_max": measured["load_max"],
        "rows_per_expert": measured["pairs"] / result["experts"],
        "limit_seconds": limit,
        "limit_gflops": flops["Limit"] / limit / 1e9,
    }
    result["rows"]["Floor"] = ratios(times, flops, "Floor")
    if "Routing" in times and OURS in times:
        result["routing_share"] = clock.spread(clock.ratios(times["Routing"], times[OURS]))


def ratios(times: dict[str, list], flops: dict[str, int], name: str) -> dict[str, Any]:
    """Ratios of a contender: time over limit and floor, per FLOP, and ours over it."""
    scale = flops["Limit"] / flops[name] if flops[name] else 1.0
    found = {
        "seconds": clock.spread([t for t in times[name] if t is not None]),
        "of_limit": clock.spread([scale * r for r in clock.ratios(times[name], times["Limit"])]),
        "of_floor": clock.spread([scale * r for r in clock.ratios(times[name], times["Floor"])]),
    }
    if OURS in times:
        found["ours_of_it"] = clock.spread(
            [r / scale for r in clock.ratios(times[OURS], times[name])]
        )
    return found


def measure_nulls(cases: list[Case], setting: Setting) -> dict[str, Any]:
    """Time of our layer and the loop against the pairs remaining with null experts."""
    measured = forked(lambda: nulls(cases, setting))
    result = {
        "dtype": setting.dtype,
        "threads": setting.threads,
        "device": setting.device,
        "rows": [],
        **({"failed": measured["failed"]} if "failed" in measured else {}),
    }
    if "failed" in measured:
        return result
    times, pairs = measured["times"], measured["pairs"]
    for case, left in zip(cases, pairs, strict=True):
        row = {"name": case.name, "null_share": case.null_share, "pairs_ratio": left / pairs[0]}
        for shown, name in (("ours", "Ours"), ("loop", "Loop")):
            bare = times[f"{name} {cases[0].null_share}"]
            row[shown] = clock.spread(clock.ratios(times[f"{name} {case.null_share}"], bare))
        result["rows"].append(row)
    return result


def progress(result: dict[str, Any]) -> str:
    """One line per case."""
    label = f"{result['name']}, {result['dtype']}, {result['threads']} threads"
    if "limit_seconds" not in result:
        return f"{label}: failed: {next(iter(result['failed'].values()), 'no contender')}"
    found = ", ".join(
        f"{report.LABELS[name]} {row['of_limit']['median']:.2f}"
        for name, row in sorted(result["rows"].items(), key=lambda x: x[1]["of_limit"]["median"])
        if name != "Routing"
    )
    return f"{label}: limit {result['limit_seconds'] * 1e3:.0f} ms; relative to it: {found}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few small cases")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="NAME",
        help="cases whose names contain one of these: table, 64/2, annealing",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; with cuda 1")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="default: all that run on the device"
    )
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    add_options(parser, "layer.json")
    add_unattended(parser)
    parser.add_argument("--plot", type=Path, help="also plot the ratios here (.svg, .png)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: give 1 or more")
    args.threads = args.threads or ([1, 2] if args.device == "cpu" else [1])
    args.contenders = args.contenders or [
        name for name, kind in CONTENDERS.items() if args.device in kind.DEVICES
    ]
    return args


def main() -> None:
    """Measure, print and write."""
    args = parse()
    if args.device == "cuda" and not forked(torch.cuda.is_available):
        raise SystemExit("error: --device cuda: torch finds no GPU here; leave it out")
    cases = chosen(args.cases, args.quick, args.device)
    peers.load()
    found = Results(args, {"machine": forked(lambda: machine(args.device)), "rounds": args.rounds})
    for threads in args.threads:
        for dtype in args.dtype:
            setting = Setting(dtype, threads, args.device, args.rounds)
            key = {"dtype": dtype, "threads": threads, "device": args.device}
            for case in cases:
                if found.is_late() or found.has(name=case.name, **key):
                    continue
                # Memory does not depend on the number of threads.
                memory = case.memory and not args.no_memory and threads == args.threads[0]
                result = measure(case, setting, args.contenders, memory)
                print(progress(result), flush=True)
                found.add(result)
            shares = [case for case in cases if case.null_share is not None]
            if len(shares) > 1 and not found.is_late() and not found.has("nulls", **key):
                found.add(measure_nulls(shares, setting), "nulls")
    results = found.part()
    text = "\n\n".join(
        [
            report.heading(found.numbers["machine"]),
            report.layers(results),
            report.nulls_table(found.part("nulls")),
        ]
    )
    print(f"\n{text}")
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.plot:
        from speed.plot import draw

        draw(results, args.plot)


if __name__ == "__main__":
    main()
