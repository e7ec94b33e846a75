"""`evomoe export`: a checkpoint to a folder that transformers loads."""

from __future__ import annotations

import argparse

from evomoe_plugin.cli.flags import add_data, flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="the checkpoint, of any layout that fairseq-eval-lm reads",
    )
    parser.add_argument("out", metavar="DIR", help="the folder to write; it must not exist")
    add_data(parser)
    flag(
        parser,
        "--without-eval-capacity",
        False,
        "leave out the experts' capacity in evaluation, which the exported model does not support",
    )


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.checkpoint.output import check_output
    from evomoe_plugin.export.folder import export
    from evomoe_plugin.generation.loading import load_trained_model

    check_output("DIR", args.out, makes_folders=True)
    trained = load_trained_model("CKPT", args.checkpoint, args.data)
    export(trained, args.out, args.without_eval_capacity)
    print(
        f"{args.out}: AutoModelForCausalLM.from_pretrained({args.out!r}, "
        "trust_remote_code=True) loads it"
    )
    return 0
