"""`evomoe checkpoint`: inspect, verify and reshard checkpoints."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evomoe_plugin.checkpoint.checkpoint_file import MainFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help, description=help)
        added.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's main file")
        return added

    action("inspect", "summarise a checkpoint")
    action("verify", "read all of a checkpoint and list its faults; the exit status is 1 if there "
                     "are any")
    sharded = action("reshard", "write a checkpoint with its experts in files beside it")
    one = action("consolidate", "write a checkpoint as one file")
    for parser in (sharded, one):
        parser.add_argument("out", metavar="OUT", help="the main file to write")
        parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    sharded.add_argument("--size", type=int, required=True, metavar="R",
                         help="number of expert files: the --moe-expert-parallel-size to come; "
                              "runs of other sizes read them too")


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
    from evomoe_plugin.checkpoint.reshard import check_checkpoint_output, consolidate, reshard
    from evomoe_plugin.config.errors import OptionError

    if args.action in ("reshard", "consolidate"):
        check_checkpoint_output("OUT", args.out, args.overwrite)
    if args.action == "reshard" and args.size < 1:
        raise OptionError("size", args.size, "give 1 or more")
    try:
        main = read_main_file("CKPT", args.checkpoint)
    except OptionError as error:
        if args.action != "verify" or not os.path.exists(args.checkpoint):
            raise
        print(f"{args.checkpoint}: {error.arguments[2]}")
        return 1
    if args.action == "inspect":
        return _inspect(main)
    if args.action == "verify":
        return _verify(main)
    if args.action == "reshard":
        reshard(main, args.out, args.size)
        print(f"{args.out}: update {main.update}, experts in {args.size} files beside it")
    else:
        consolidate(main, args.out)
        print(f"{args.out}: update {main.update}, one file")
    return 0


def _inspect(main: MainFile) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from evomoe_plugin.checkpoint.inspect import summary

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, found in summary(main):
        table.add_row(Text(name), Text(found))
    Console(highlight=False).print(table)
    return 0


def _verify(main: MainFile) -> int:
    from evomoe_plugin.checkpoint.verify import faults

    found = list(faults(main))
    for fault in found:
        print(f"{main.path}: {fault}")
    if not found:
        print(f"{main.path}: no faults (update {main.update})")
    return 1 if found else 0
