"""`evomoe plot`: draw a training run from its log."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from evomoe_plugin.cli.flags import flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "logs",
        nargs="+",
        metavar="LOG",
        help="the output of fairseq-train --log-format json, saved to a file; "
        "several are drawn into one picture",
    )
    flag(
        parser, "--out FILE.png", str, "the picture to write; .svg and .pdf work too", required=True
    )
    flag(
        parser,
        "--experts",
        False,
        "draw the load of each expert instead, of a run with --moe-log-experts",
    )
    flag(parser, "--smoothing W", 0.6, "weight of the loss's moving average, 0 for none")


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.metrics import read_log
    from evomoe_plugin.metrics.plot import plot

    logs = [read_log(path) for path in args.logs]
    for log, name in zip(logs, names(args.logs), strict=True):
        log.name = name
    if args.experts:
        from evomoe_plugin.metrics.expert_plot import plot_experts

        plot_experts(logs, args.out)
    else:
        plot(logs, args.out, args.smoothing)
    print(
        f"{args.out}: {len(logs[0].intervals)} intervals up to update "
        f"{logs[0].intervals[-1].update}"
        if len(logs) == 1
        else f"{args.out}: {len(logs)} runs"
    )
    return 0


def names(paths: Sequence[str]) -> list[str]:
    """Label each run: the file's name, with as many of its folders as make it unique."""
    parts = [Path(os.path.splitext(path)[0]).parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(p[-depth:]) for p in parts]
        if len(set(short)) == len(short):
            return short
    return list(paths)
