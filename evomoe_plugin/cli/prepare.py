"""`evomoe prepare`: text files to a folder that fairseq trains on."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial

from evomoe_plugin.cli.flags import defaults, flag, parsed
from evomoe_plugin.config.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from evomoe_plugin.data import options

    default = defaults(options.PrepareOptions)
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="file or folder (searched for .txt, .jsonl and .parquet files, and data sets that "
        "`datasets` saved); a JSON array as .json",
    )
    add = partial(flag, parser)
    add("--out DIR", str, "the folder to write", required=True)
    add("--overwrite", False, "replace a set of other options, once the new one is complete")
    add("--workers N", int, "processes, without influence on the result (default: the cores)")
    add("--source TEXT", default["source"], "origin and licence of the text, for the data card")

    add = partial(flag, parser.add_argument_group("reading"))
    add("--text-suffix .SUF", [], "also read files with this suffix as plain text; repeatable")
    add(
        "--exclude GLOB",
        [],
        "skip files and folders whose name, or path inside the INPUT, matches; repeatable",
    )
    add("--text-field NAME", default["text_field"], "field or column with the text")
    add(
        "--rows",
        default["rows"],
        "what rows hold: a text in that field, or a chat or a prompt with a response (docs/sft.md)",
        choices=options.ROWS,
    )
    add(
        "--documents-by",
        default["documents_by"],
        "unit of a document in plain text",
        choices=options.DOCUMENTS_BY,
    )
    add(
        "--document-start REGEX",
        str,
        "join lines of plain text, or rows, into documents that start where this matches",
    )
    add(
        "--encoding-errors",
        default["encoding_errors"],
        "handling of bytes that are not UTF-8",
        choices=options.ENCODING_ERRORS,
    )
    add("--max-bytes SIZE", _size, "stop after this much text of the INPUTs: 5M is 5,000,000 bytes")

    add = partial(flag, parser.add_argument_group("splits"))
    for split in ("valid", "test"):
        add(
            f"--{split}-fraction X",
            default[f"{split}_fraction"],
            f"share of the documents in {split}, chosen by a hash of their text",
        )
        add(f"--{split} INPUT", [], f"file or folder that is the {split} split instead; repeatable")
    add("--seed N", default["seed"], "seed of splits and the tokenizer's sample")

    add = partial(flag, parser.add_argument_group("tokenizer (default: train SentencePiece)"))
    add("--vocab-size N", int, f"entries of the dictionary (default: {options.DEFAULT_VOCAB_SIZE})")
    add(
        "--sample-bytes SIZE",
        default["sample_bytes"],
        "size of the sample of lines of the train split that the tokenizer is trained on",
        type=_size,
    )
    add("--sentencepiece-model FILE", str, "use this SentencePiece model")
    add(
        "--gpt2-bpe",
        str,
        "use GPT-2's byte-level BPE",
        nargs=2,
        metavar=("ENCODER_JSON", "VOCAB_BPE"),
    )
    add(
        "--tokenizer PATH",
        str,
        "use a tokenizer of Hugging Face, with its own token ids: the folder of a model, or a "
        "tokenizer.json",
    )

    from evomoe_plugin.data.pair_options import PairOptions

    default = defaults(PairOptions)
    group = parser.add_argument_group("parallel text, for --task translation (docs/encoders.md)")
    add = partial(flag, group)
    two = {"nargs": 2, "metavar": ("SRC", "TGT")}
    add("--pairs", str, "source and target, line by line, instead of INPUTs", **two)
    add("--valid-pairs", str, "files of the valid split, instead of --valid-fraction", **two)
    add("--test-pairs", str, "files of the test split, instead of --test-fraction", **two)
    add("--langs", str, "names of the languages (default: the suffixes of the files)", **two)
    add("--separate-vocabularies", False, "a vocabulary for each language (default: a joint one)")
    add("--min-length N", default["min_length"], "train on sentences of at least N tokens")
    add("--max-length N", int, "train on sentences of at most N tokens (default: no limit)")
    add("--max-length-ratio X", float, "and with at most X tokens to one of the other language")
    add = partial(flag, parser.add_argument_group("GLUE, for --task sentence_prediction"))
    add(
        "--glue",
        str,
        "a task of GLUE and the folder with its files (.tsv or .parquet), instead of INPUTs",
        nargs=2,
        metavar=("TASK", "DIR"),
    )
    add("--tokenizer-of DIR", str, "with --glue: the folder that the model was trained with")
    parser.set_defaults(flags={action.dest: action.default for action in parser._actions})


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.data.glue import GlueOptions
    from evomoe_plugin.data.options import PrepareOptions
    from evomoe_plugin.data.pair_options import PairOptions

    for kind, options in (("pairs", PairOptions), ("glue", GlueOptions)):
        if getattr(args, kind):
            _check_flags(args, options, f"is not of --{kind}: leave it out")
            return _run_pairs(args) if kind == "pairs" else _run_glue(args)
    _check_flags(args, PrepareOptions, "is of parallel text or GLUE: give --pairs or --glue too")
    from evomoe_plugin.config.errors import INTERRUPTED
    from evomoe_plugin.data import PrepareOptions, prepare

    try:
        card = prepare(parsed(PrepareOptions, args))
    except KeyboardInterrupt:
        print(f"interrupted: {args.out} is unchanged; the same command resumes", file=sys.stderr)
        return INTERRUPTED
    print(
        f"{args.out}: {card.splits['train']['tokens']:,} tokens to train on, "
        f"{card.tokenizer['rows']:,} dictionary entries; details in DATA_CARD.md"
    )
    print(
        f"next: fairseq-train {args.out} --user-dir evomoe_plugin --task language_modeling "
        "--arch transformer_lm_gpttiny_moe …"
    )
    return 0


def _check_flags(args: argparse.Namespace, options: type, reason: str) -> None:
    """Raise `OptionError` for a flag that is given and not one of the fields of `options`."""
    for name, value in args.flags.items():
        given = getattr(args, name, value)
        if name not in (*defaults(options), "help", "workers") and given not in (value, []):
            shown = " ".join(given) if isinstance(given, list) else given
            raise OptionError("INPUT" if name == "inputs" else name, shown, reason)


def _run_glue(args: argparse.Namespace) -> int:
    from evomoe_plugin.data.glue import GlueOptions, prepare_glue

    card = prepare_glue(parsed(GlueOptions, args))
    print(
        f"{args.out}: {card.splits['train']['documents']:,} examples to train on; details in "
        "DATA_CARD.md"
    )
    print(f"next:\n{card.usage.replace('DATA', args.out, 1)}")
    return 0


def _run_pairs(args: argparse.Namespace) -> int:
    from evomoe_plugin.data.pair_options import PairOptions
    from evomoe_plugin.data.pairs import prepare_pairs

    options = parsed(PairOptions, args)
    card = prepare_pairs(options)
    joint = " --share-all-embeddings" * (not options.separate_vocabularies)
    source, target = options.languages
    print(
        f"{args.out}: {card.splits['train']['documents']:,} pairs to train on, "
        f"{card.tokenizer['rows']:,} dictionary entries; details in DATA_CARD.md"
    )
    print(
        f"next: fairseq-train {args.out} --user-dir evomoe_plugin --task translation "
        f"--source-lang {source} --target-lang {target} --arch transformer_tiny_moe{joint} …"
    )
    return 0


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500K, 5M or 2G")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2] or " "))
