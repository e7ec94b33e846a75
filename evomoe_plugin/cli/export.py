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
        "--format NAME",
        "auto",
        "class of transformers: auto (one that computes the same, without code of this package; "
        "else evomoe), evomoe (with code of this package), or a model_type by name: mixtral, "
        "olmoe, qwen2_moe, qwen3_moe, llama, mistral, qwen2, qwen3, phi, stablelm, gpt2",
    )
    flag(parser, "--max-shard-size SIZE", "5GB", "of a file of weights; 0.5GB, 200MB")
    flag(
        parser,
        "--without-eval-capacity",
        False,
        "leave out the experts' capacity in evaluation, which the exported model does not support",
    )


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.checkpoint.output import check_output
    from evomoe_plugin.export.folder import EVOMOE, check_format, export
    from evomoe_plugin.export.shards import parse_size
    from evomoe_plugin.generation.loading import load_trained_model

    check_output("DIR", args.out, makes_folders=True)
    check_format(args.format)
    parse_size("max_shard_size", args.max_shard_size)
    trained = load_trained_model("CKPT", args.checkpoint, args.data)
    done = export(trained, args.out, args.without_eval_capacity, args.format, args.max_shard_size)
    code = ", trust_remote_code=True" if done.format == EVOMOE else ""
    kind = f"{done.format}, with its code" if code else f"{done.format}, a class of transformers"
    print(f"format: {kind}" + (f", because {done.why}" if done.why else ""))
    print(f"{args.out}: AutoModelForCausalLM.from_pretrained({args.out!r}{code}) loads it")
    if done.tokenizer_code:
        print(f"AutoTokenizer needs trust_remote_code=True: {done.tokenizer_code}")
    return 0
