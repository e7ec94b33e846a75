"""`evomoe prepare`: text files to a folder that fairseq trains on."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from evomoe_plugin.data.options import (
        DEFAULT_VOCAB_SIZE,
        DOCUMENTS_BY,
        ENCODING_ERRORS,
        PrepareOptions,
    )

    default = {f.name: f.default for f in dataclasses.fields(PrepareOptions)}
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="file or folder (searched for .txt, .jsonl and .parquet files)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace a set made with other options, once the new one is complete")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes; the result does not depend on them (default: the cores)")
    parser.add_argument("--source", default=default["source"], metavar="TEXT",
                        help="origin and licence of the text, for the data card")

    reading = parser.add_argument_group("reading")
    reading.add_argument("--text-suffix", action="append", default=[], metavar=".SUF",
                         help="also read files with this suffix as plain text; repeatable")
    reading.add_argument("--exclude", action="append", default=[], metavar="GLOB",
                         help="skip files and folders whose name, or path inside the INPUT, "
                              "matches; repeatable")
    reading.add_argument("--text-field", default=default["text_field"], metavar="NAME",
                         help="field or column with the text (default: %(default)s)")
    reading.add_argument("--documents-by", default=default["documents_by"], choices=DOCUMENTS_BY,
                         help="unit of a document in plain text (default: %(default)s)")
    reading.add_argument("--document-start", metavar="REGEX",
                         help="join lines of plain text, or rows, into documents that start where "
                              "this matches")
    reading.add_argument("--encoding-errors", default=default["encoding_errors"],
                         choices=ENCODING_ERRORS,
                         help="handling of bytes that are not UTF-8 (default: %(default)s)")
    reading.add_argument("--max-bytes", type=_size, metavar="SIZE",
                         help="stop after this much text of the INPUTs: 5M is 5,000,000 bytes")

    splits = parser.add_argument_group("splits")
    for split in ("valid", "test"):
        splits.add_argument(f"--{split}-fraction", type=float, metavar="X",
                            default=default[f"{split}_fraction"],
                            help=f"share of the documents in {split}, chosen by a hash of their "
                                 "text (default: %(default)s)")
        splits.add_argument(f"--{split}", action="append", default=[], metavar="INPUT",
                            help=f"file or folder that is the {split} split instead; repeatable")
    splits.add_argument("--seed", type=int, default=default["seed"], metavar="N",
                        help="seed of splits and the tokenizer's sample (default: %(default)s)")

    tokenizer = parser.add_argument_group("tokenizer (default: train SentencePiece)")
    tokenizer.add_argument("--vocab-size", type=int, metavar="N",
                           help=f"entries of the dictionary (default: {DEFAULT_VOCAB_SIZE})")
    tokenizer.add_argument("--sample-bytes", type=_size, default=default["sample_bytes"],
                           metavar="SIZE", help="size of the sample of lines of the train split "
                                                "that the tokenizer is trained on (default: 10M)")
    tokenizer.add_argument("--sentencepiece-model", metavar="FILE",
                           help="use this SentencePiece model")
    tokenizer.add_argument("--gpt2-bpe", nargs=2, metavar=("ENCODER_JSON", "VOCAB_BPE"),
                           help="use GPT-2's byte-level BPE")


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.config.errors import INTERRUPTED
    from evomoe_plugin.data import PrepareOptions, prepare

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(PrepareOptions)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    try:
        card = prepare(PrepareOptions(**given))
    except KeyboardInterrupt:
        print(f"interrupted: {args.out} is unchanged; the same command resumes",
              file=sys.stderr)
        return INTERRUPTED
    print(f"{args.out}: {card.splits['train']['tokens']:,} tokens to train on, "
          f"{card.tokenizer['rows']:,} dictionary entries; details in DATA_CARD.md")
    print(f"next: fairseq-train {args.out} --user-dir evomoe_plugin --task language_modeling "
          "--arch transformer_lm_gpttiny_moe …")
    return 0


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500K, 5M or 2G")
    return int(float(match[1]) * _UNITS[match[2]])
