"""`evomoe checkpoint`: inspect, verify, reshard and import checkpoints."""

from __future__ import annotations

import argparse
import os

from evomoe_plugin.cli.flags import flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help, description=help)
        added.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's main file")
        return added

    action("inspect", "summarise a checkpoint")
    action(
        "verify",
        "read all of a checkpoint and list its faults; the exit status is 1 if there are any",
    )
    sharded = action("reshard", "write a checkpoint with its experts in files beside it")
    one = action("consolidate", "write a checkpoint as one file")
    branch = action(
        "import", "write a checkpoint of fairseq's moe branch (X-shared.pt, X-rank-0.pt, …) as one"
    )
    for parser in (sharded, one, branch):
        parser.add_argument("out", metavar="OUT", help="the main file to write")
        flag(parser, "--overwrite", False, "replace OUT if it exists")
    flag(
        sharded,
        "--size R",
        int,
        "number of expert files: the --moe-expert-parallel-size to "
        "come; runs of other sizes read them too",
        required=True,
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
    from evomoe_plugin.checkpoint.inspect import summary
    from evomoe_plugin.checkpoint.reshard import check_checkpoint_output, consolidate, reshard
    from evomoe_plugin.checkpoint.verify import faults
    from evomoe_plugin.config.errors import OptionError

    if args.action == "import":
        return _import(args)
    if args.action in ("reshard", "consolidate"):
        check_checkpoint_output("OUT", args.out, args.overwrite)
    if args.action == "reshard" and args.size < 1:
        raise OptionError("size", args.size, "give 1 or more")
    try:
        main = read_main_file("CKPT", args.checkpoint, tensors=args.action != "inspect")
    except OptionError as error:
        if args.action != "verify" or not os.path.exists(args.checkpoint):
            raise
        print(f"{args.checkpoint}: {error.arguments[2]}")
        return 1
    if args.action == "inspect":
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in summary(main):
            table.add_row(*row)
        Console(highlight=False, markup=False, emoji=False).print(table)
    elif args.action == "verify":
        found = list(faults(main))
        for line in found or (f"no faults (update {main.update})",):
            print(f"{main.path}: {line}")
        return 1 if found else 0
    elif args.action == "reshard":
        reshard(main, args.out, args.size)
        print(f"{args.out}: update {main.update}, experts in {args.size} files beside it")
    else:
        consolidate(main, args.out)
        print(f"{args.out}: update {main.update}, one file")
    return 0


def _import(args: argparse.Namespace) -> int:
    import torch

    from evomoe_plugin.checkpoint.atomic_files import write_files
    from evomoe_plugin.checkpoint.output import check_output
    from evomoe_plugin.evolve.import_moe_branch import import_moe_branch

    check_output("OUT", args.out, overwrite=args.overwrite)
    state = import_moe_branch("CKPT", args.checkpoint)
    write_files({args.out: lambda file: torch.save(state, file)})
    model = state["cfg"]["model"]
    print(
        f"{args.out}: {model['decoder_layers']} layers of width {model['decoder_embed_dim']}, "
        f"{model['moe_expert_count']} experts, gate {model['moe_gate']}"
    )
    return 0
