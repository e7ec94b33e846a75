"""`evomoe import-hf`: convert a Hugging Face model to a fairseq checkpoint."""

from __future__ import annotations

import argparse

from evomoe_plugin.cli.flags import flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="config.json and model.safetensors, or its parts; nothing in them is executed",
    )
    parser.add_argument(
        "out", metavar="OUT", help="the checkpoint; of a GPT-2, a folder for model.pt and dict.txt"
    )
    flag(
        parser,
        "--dict FILE",
        str,
        "dict.txt of a data set made with `evomoe prepare --tokenizer DIR`, or --gpt2-bpe: "
        "embeddings get as many rows as it has entries, those of a GPT-2 in its order (default: "
        "one row for each token id)",
    )
    flag(parser, "--overwrite", False, "replace OUT, or its model.pt and dict.txt, if they exist")


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.config.hf_config import model_type

    if model_type("DIR", args.folder) == "gpt2":
        return _import_gpt2(args)
    return _import(args)


def _import(args: argparse.Namespace) -> int:
    import torch

    from evomoe_plugin.checkpoint.atomic_files import write_files
    from evomoe_plugin.checkpoint.output import check_output
    from evomoe_plugin.data.dictionary import load_dictionary
    from evomoe_plugin.evolve.import_hf import import_hf

    check_output("OUT", args.out, overwrite=args.overwrite)
    dictionary = None if args.dict is None else load_dictionary("dict", args.dict)
    state = import_hf("DIR", args.folder, dictionary)
    write_files({args.out: lambda file: torch.save(state, file)})
    model, table = state["cfg"]["model"], state["model"]["decoder.embed_tokens.weight"]
    experts = "no experts"
    if model["moe_layers"] != "none":
        count, layers = model["moe_expert_count"], model["moe_layers"].split(",")
        experts = f"{count} experts in each of {len(layers)} layers"
    dtype = str(table.dtype).removeprefix("torch.")
    print(
        f"{args.out}: {model['decoder_layers']} layers of width {model['decoder_embed_dim']}, "
        f"{len(table):,} token ids, {experts}, {dtype}"
    )
    return 0


def _import_gpt2(args: argparse.Namespace) -> int:
    import io
    import os

    import torch

    from evomoe_plugin.checkpoint.atomic_files import write_files
    from evomoe_plugin.checkpoint.huggingface import import_gpt2
    from evomoe_plugin.checkpoint.output import check_output
    from evomoe_plugin.data.dictionary import load_dictionary

    dict_path, model_path = paths = [
        os.path.join(args.out, name) for name in ("dict.txt", "model.pt")
    ]
    for path in paths:
        check_output("OUT", path, overwrite=args.overwrite, makes_folders=True)
    dictionary = None if args.dict is None else load_dictionary("dict", args.dict)
    imported = import_gpt2(args.folder, dictionary)
    os.makedirs(args.out, exist_ok=True)
    imported.dictionary.save(rows := io.StringIO())
    write_files(
        {
            dict_path: lambda file: file.write(rows.getvalue().encode()),
            model_path: lambda file: torch.save(imported.state, file),
        }
    )
    model = imported.state["cfg"]["model"]
    print(
        f"{model_path}: {model['decoder_layers']} layers of width {model['decoder_embed_dim']}, "
        f"{len(imported.dictionary):,} token ids, {model['activation_fn']}"
    )
    if not imported.has_masked_rows:
        print(
            "<s>, <pad>, <unk> and unused rows of the dictionary are as likely as </s>: the last "
            "LayerNorm has (nearly) no bias, so no embedding has a low logit after every text"
        )
    if args.dict is None:
        print(
            f"data for it: `evomoe prepare … --tokenizer {args.folder} --out DATA`, then "
            "import again with --dict DATA/dict.txt; or text of --bpe gpt2 through "
            f"fairseq-preprocess --only-source --srcdict {dict_path}"
        )
    return 0
