"""`evomoe generate`: continue prompts with a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from evomoe_plugin.generation.options import GenerationOptions

    default = {f.name: f.default for f in dataclasses.fields(GenerationOptions)}
    parser.add_argument("--path", required=True, metavar="CKPT",
                        help="the checkpoint, of any layout that fairseq-eval-lm reads")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="text to continue; repeatable")
    parser.add_argument("--prompts-file", metavar="FILE",
                        help="one prompt per line, UTF-8; empty lines are skipped")
    parser.add_argument("--data", metavar="DIR",
                        help="the folder that evomoe prepare wrote, with dict.txt and the "
                             "tokenizer (default: the one that the checkpoint was trained with)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        default=default["max_new_tokens"],
                        help="most tokens after each prompt (default: %(default)s)")
    parser.add_argument("--beam", type=int, default=default["beam"], metavar="N",
                        help="beam width; 1 takes the most probable token at each step "
                             "(default: %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T",
                        help="sample, from logits divided by this")
    parser.add_argument("--top-k", type=int, metavar="K",
                        help="sample among the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P",
                        help="sample among the fewest tokens whose probability reaches P")
    parser.add_argument("--seed", type=int, default=default["seed"], metavar="N",
                        help="seed of sampling; the batch size has no influence "
                             "(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=default["batch_size"], metavar="N",
                        help="prompts at a time; the tokens do not depend on it "
                             "(default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="use the CPU, even if there is a GPU")


def run(args: argparse.Namespace) -> int:
    import torch

    from evomoe_plugin.generation.generate import generate
    from evomoe_plugin.generation.loading import load_trained_model
    from evomoe_plugin.generation.options import GenerationOptions

    texts = _prompts(args.prompt, args.prompts_file)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(GenerationOptions)}
    options = GenerationOptions(**given)
    trained = load_trained_model("path", args.path, args.data)
    prompts = [trained.codec.encode(text) for text in texts]
    if unknown := sum(prompt.count(trained.dictionary.unk()) for prompt in prompts):
        print(f"warning: {unknown} tokens of the prompts are not in {trained.folder}/dict.txt",
              file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    done = generate(trained, prompts, options, device)
    for number, found in enumerate(done.continuations, 1):
        if len(prompts) > 1:
            print(f"--- {number}")
        print(trained.codec.decode(found.prompt + found.new))
    sys.stdout.flush()
    print(f"{done.new_tokens:,} new tokens in {done.seconds:.2f} s: "
          f"{done.new_tokens / done.seconds:,.1f} tokens per second; "
          f"{done.tokens / done.seconds:,.1f} with the prompts", file=sys.stderr)
    if done.routed_tokens:
        print(f"{done.pairs / done.routed_tokens:.2f} of {done.experts / done.routed_tokens:.4g} "
              "experts per token were used in each MoE layer, on average", file=sys.stderr)
    return 0


def _prompts(given: list[str], path: str | None) -> list[str]:
    from evomoe_plugin.config.errors import OptionError

    texts = list(given)
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise OptionError("prompts_file", path, f"is not UTF-8 ({error.reason} at byte "
                                                    f"{error.start}): convert it") from None
        except OSError as error:
            raise OptionError("prompts_file", path, f"cannot be read: {error.strerror}") from None
        texts += [line.removesuffix("\r") for line in lines if line.strip()]
    if not texts:
        raise OptionError("prompt", "(not given)", "give --prompt TEXT, or --prompts-file FILE "
                                                   "with a prompt a line")
    return texts
