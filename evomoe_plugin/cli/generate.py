"""`evomoe generate`: a checkpoint goes on from prompts."""

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
                        help="what to go on from; repeatable")
    parser.add_argument("--prompts-file", metavar="FILE",
                        help="a prompt a line, UTF-8; empty lines are passed over")
    parser.add_argument("--data", metavar="DIR",
                        help="the folder that evomoe prepare wrote, with dict.txt and the "
                             "tokenizer (default: the one that the checkpoint was trained with)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        default=default["max_new_tokens"],
                        help="tokens after each prompt, at most (default: %(default)s)")
    parser.add_argument("--beam", type=int, default=default["beam"], metavar="N",
                        help="width of the beam; 1 takes the most probable token each time "
                             "(default: %(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T",
                        help="draw tokens, from logits divided by this")
    parser.add_argument("--top-k", type=int, metavar="K",
                        help="draw tokens, among the K most probable")
    parser.add_argument("--top-p", type=float, metavar="P",
                        help="draw tokens, among the fewest whose probability reaches P")
    parser.add_argument("--seed", type=int, default=default["seed"], metavar="N",
                        help="of what is drawn; the same in any batch (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=default["batch_size"], metavar="N",
                        help="prompts at a time; they get the same tokens at any "
                             "(default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")


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
              "experts a token worked in an MoE layer, on average", file=sys.stderr)
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
