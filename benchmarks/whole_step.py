"""Tokens per second of a whole training step, compared with Hugging Face's models.

A GPT with an MoE layer in every block against Mixtral and OLMoE of transformers, with equal numbers
of layers, experts and tokens, and the same width, batch and optimizer (torch's fused AdamW). A step
is forward, backward, optimizer, gradients discarded; trainers and data loading are excluded. The
models take turns, round by round; those with Hugging Face's eager experts, which need much memory,
run in a separate process. The limit is the bare matmuls of our step.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch._dynamo  # imported once, before forking; torch's optimizers import it
from speed import clock, peers
from speed.forks import forked
from speed.machine import machine
from speed.measure import DTYPES, Setting, start, why
from speed.models import BareMatmuls, models
from speed.report import heading, table
from speed.results import Results, add_options, add_unattended
from speed.training import Sizes

LARGE = (Sizes(4, 1024, 16, batch=16, length=1024),)
"""On a GPU, which smaller ones do not keep busy."""
CASES = (Sizes(4, 256, 8), Sizes(4, 256, 8, batch=4, length=512), Sizes(2, 512, 16))
QUICK = (Sizes(2, 128, 8, batch=4, length=128, vocabulary=2048),)


def measure(sizes: Sizes, setting: Setting) -> dict[str, Any]:
    """Tokens per second of all models."""
    kinds = models(setting.dtype)
    together = [label for label, kind in kinds.items() if not kind.ALONE]
    result: dict[str, Any] = {
        "name": sizes.name,
        "dtype": setting.dtype,
        "threads": setting.threads,
        "device": setting.device,
        "tokens": sizes.tokens,
        "rows": {},
        "failed": {},
    }
    for group in (together, *([label] for label, kind in kinds.items() if kind.ALONE)):
        measured = forked(lambda group=group: times(sizes, setting, group))
        if "failed" in measured:
            result["failed"] |= dict.fromkeys(group, measured["failed"])
            continue
        result["failed"] |= measured["failed_each"]
        found = measured["times"]
        if group is together:
            limit = clock.spread(found["limit"])["median"]
            result |= {
                "limit_tokens_per_second": sizes.tokens / limit,
                "limit_gflops": measured["flops"] / limit / 1e9,
            }
        for label in group:
            if label in found:
                taken = [t for t in found[label] if t is not None]
                result["rows"][label] = {
                    "tokens_per_second": clock.spread([sizes.tokens / t for t in taken]),
                    "of_limit": clock.spread(clock.ratios(found[label], found["limit"])),
                }
                if "ours" in found:
                    result["rows"][label]["ours_of_it"] = clock.spread(
                        clock.ratios(found["ours"], found[label])
                    )
    return result


def times(sizes: Sizes, setting: Setting, group: list[str]) -> dict[str, Any]:
    """Seconds per step in each round."""
    start(setting)
    limit = BareMatmuls(sizes, DTYPES[setting.dtype], setting.device)
    steps, failed = {"limit": limit.step}, {}
    for label in group:
        try:
            model = models(setting.dtype)[label](sizes, setting.dtype, setting.device)
            model.step()
        except Exception as error:  # other packages raise any type; reported
            failed[label] = why(error)
        else:
            steps[label] = model.step
    return {
        "failed_each": failed,
        "flops": limit.flops,
        "times": clock.take_turns(steps, setting.rounds, setting.device, "limit"),
    }


def progress(result: dict[str, Any]) -> str:
    """One line per case."""
    speeds = {label: row["tokens_per_second"]["median"] for label, row in result["rows"].items()}
    limit = result.get("limit_tokens_per_second", 0)
    return (
        f"{result['name']}, {result['dtype']}, {result['threads']} threads: limit {limit:.0f} "
        "tokens/s; " + ", ".join(f"{label} {speed:.0f}" for label, speed in speeds.items())
    )


def text(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows, notes = [], []
    for result in results:
        case = f"{result['name']}, {result['dtype']}, {result['threads']} threads"
        if "limit_gflops" in result:
            rows.append([case, "limit", f"{result['limit_tokens_per_second']:.0f}", "1", "–"])
        for label, row in result["rows"].items():
            speed, of = row["tokens_per_second"], row["of_limit"]
            rows.append(
                [
                    case,
                    label,
                    f"{speed['median']:.0f} ({speed['min']:.0f}–{speed['max']:.0f})",
                    f"{of['median']:.2f} ({of['min']:.2f}–{of['max']:.2f})",
                    f"{of['median'] / result['rows']['ours']['of_limit']['median']:.2f}"
                    if "ours" in result["rows"]
                    else "–",
                ]
            )
        notes += [f"- {case}, {label}: {reason}." for label, reason in result["failed"].items()]
    found = table(["case", "model", "tokens/s", "time / limit", "time / ours"], rows)
    return "\n\n".join([found, "\n".join(notes)]) if notes else found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="NAME",
        help="cases whose names contain one of these, such as 'D 512'",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; with cuda 1")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    add_options(parser, "whole_step.json")
    add_unattended(parser)
    args = parser.parse_args()
    args.threads = args.threads or ([1, 2] if args.device == "cpu" else [1])
    if args.device == "cuda" and not forked(torch.cuda.is_available):
        raise SystemExit("error: --device cuda: torch finds no GPU here; leave it out")
    known = CASES if args.device == "cpu" else (*LARGE, *CASES)
    if args.quick:
        known = QUICK
    cases = [
        sizes for sizes in known if not args.cases or any(name in sizes.name for name in args.cases)
    ]
    if not cases:
        parser.error(
            f"--cases {' '.join(args.cases)}: matches none of "
            f"{'; '.join(sizes.name for sizes in known)}"
        )
    peers.load()
    found = Results(args, {"machine": forked(lambda: machine(args.device)), "rounds": args.rounds})
    for threads in args.threads:
        for dtype in args.dtype:
            for sizes in cases:
                key = dict(name=sizes.name, dtype=dtype, threads=threads, device=args.device)
                if found.is_late() or found.has(**key):
                    continue
                result = measure(sizes, Setting(dtype, threads, args.device, args.rounds))
                print(progress(result), flush=True)
                found.add(result)
    tables = f"{heading(found.numbers['machine'])}\n\n{text(found.part())}"
    print(f"\n{tables}")
    if args.markdown:
        args.markdown.write_text(tables + "\n")


if __name__ == "__main__":
    main()
