"""`evomoe upcycle`: make an MoE checkpoint from a dense one."""

from __future__ import annotations

import argparse
from functools import partial

import evomoe_plugin
from evomoe_plugin.cli.flags import flag

_OWN = (
    "dense",
    "moe",
    "method",
    "rate",
    "rescale",
    "slices",
    "gate_init",
    "seed",
    "arch",
    "data",
    "subset",
    "tokens_per_sample",
    "max_update",
    "overwrite",
    "user_dir",
    "run",
    "verb",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    evomoe_plugin.register()
    from fairseq.dataclass.utils import gen_parser_from_dataclass

    from evomoe_plugin.evolve.upcycle import METHODS, SLICES
    from evomoe_plugin.models.config import CausalLMMoEConfig
    from evomoe_plugin.models.encoder_config import TransformerMoEConfig

    parser.usage = (
        "evomoe upcycle DENSE MOE [--method …] [--data DIR] [--user-dir DIR] [--moe-… options]"
    )
    parser.add_argument(
        "dense",
        metavar="DENSE",
        help="checkpoint of fairseq's transformer_lm, roberta or transformer, or of causal_lm, or "
        "a folder of Hugging Face",
    )
    parser.add_argument("moe", metavar="MOE", help="the checkpoint to write")
    add = partial(flag, parser)
    add("--overwrite", False, "replace MOE if it exists")
    add(
        f"--method {'|'.join(METHODS)}",
        "copy",
        "how experts are initialised: copies of the feed-forward network, copies with random "
        "weights masked, with noise, or with hidden units drawn anew, slices of it, or at random",
    )
    add(
        "--rate X",
        float,
        "mask: fraction of the weights; noise: fraction of their standard deviation; reinit: "
        "fraction of the hidden units (default: 0.3, 0.1, 0.5)",
    )
    add(
        "--rescale",
        False,
        "mask: divide the remaining weights by 1 - rate; slice: multiply an "
        "expert's output by the number of slices",
    )
    add(f"--slices {'|'.join(SLICES)}", "contiguous", "hidden units of a slice")
    add(
        "--gate-init default|zero|normal:STD",
        "default",
        "weights of the gates; default is their own initialisation",
    )
    add("--seed N", 1, "of all random numbers, and of the run to come")
    add("--data DIR", str, "data set to evaluate both models on; also gives the dictionary")
    add("--subset NAME", "valid", "which split of it")
    add("--tokens-per-sample N", int, "context in that evaluation (default: the dense run's)")
    add(
        "--arch NAME",
        str,
        "MoE architecture (default: transformer_lm_moe, causal_lm_moe, roberta_base_moe or "
        "transformer_moe, whichever is of the dense model's kind); sizes are the dense model's",
    )
    add("--max-update N", int, "length of the run to come; schedules are fractions of it")
    options = parser.add_argument_group("options of the MoE model, as in fairseq-train")
    # Suppress defaults so that explicit flags can be detected.
    options.argument_default = argparse.SUPPRESS
    parsed = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    gen_parser_from_dataclass(parsed, CausalLMMoEConfig(), delete_default=True)
    of_encoders = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    gen_parser_from_dataclass(of_encoders, TransformerMoEConfig(), delete_default=True)
    known = {action.dest for action in parsed._actions}
    sides = [a for a in of_encoders._actions if "coder_moe_" in a.dest and a.dest not in known]
    for action in [*parsed._actions, *sides]:
        if not action.dest.startswith(("moe_init_", "hf_config")):
            options._add_action(action)


def run(args: argparse.Namespace) -> int:
    import os

    from evomoe_plugin.checkpoint.output import check_output
    from evomoe_plugin.config.values import check_number
    from evomoe_plugin.evolve.convert import convert, write
    from evomoe_plugin.evolve.perplexity import perplexity
    from evomoe_plugin.evolve.upcycle import Recipe

    # fairseq seeds numpy too, which takes 32 bits.
    check_number(args, "seed", "[0, 4294967295]", "give 0 to 4294967295")
    check_number(args, "max_update", "[1, inf)", "give 1 or more, or leave it out")
    check_number(args, "tokens_per_sample", "[1, inf)", "give 1 or more")
    given = {name: value for name, value in vars(args).items() if name not in _OWN}
    recipe = Recipe(args.method, args.rate, args.rescale, args.slices, args.gate_init, args.seed)
    check_output("MOE", args.moe, overwrite=args.overwrite)
    converted = convert(
        args.dense,
        given,
        recipe,
        arch=args.arch,
        data=args.data,
        max_update=args.max_update,
        user_dir=args.user_dir,
    )
    measured = args.data, args.subset, args.tokens_per_sample
    before = None
    if args.data and not os.path.isdir(args.dense):
        before = perplexity(args.dense, *measured)
    write(converted.state, args.moe, args.overwrite)

    slots, widths = converted.upcycling.slots, converted.upcycling.widths
    experts, width = (
        "-".join(map(str, dict.fromkeys((min(of), max(of))))) for of in (slots, widths)
    )
    print(
        f"{args.moe}: {len(slots)} of {converted.upcycling.num_layers} layers with {experts} "
        f"experts of width {width} each, by {args.method}"
    )
    print(converted.logits)
    if before is not None:
        after = perplexity(args.moe, *measured)
        print(
            f"perplexity on {args.subset} of {args.data}: dense {before:.4f}, MoE {after:.4f} "
            f"({100 * (after / before - 1):+.2f} %)"
        )
    elif args.data:
        print(f"perplexity on {args.subset} of {args.data}: {perplexity(args.moe, *measured):.4f}")
    elif not converted.logits.equal:
        print("--data DIR evaluates both models, to show the effect on perplexity")
    return 0
