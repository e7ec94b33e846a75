"""`evomoe generate`: continue prompts with a checkpoint."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from evomoe_plugin.cli.flags import add_data, defaults, flag, parsed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from evomoe_plugin.generation.options import GenerationOptions

    add, default = partial(flag, parser), defaults(GenerationOptions)
    add(
        "--path CKPT",
        str,
        "the checkpoint, of any layout that fairseq-eval-lm reads",
        required=True,
    )
    add("--prompt TEXT", [], "text to continue; repeatable")
    add("--prompts-file FILE", str, "one prompt per line, UTF-8; empty lines are skipped")
    add("--chat", False, "prompts are a user's messages, in the chat template of the tokenizer")
    add_data(parser)
    add("--max-new-tokens N", default["max_new_tokens"], "most tokens after each prompt")
    add("--beam N", default["beam"], "beam width; 1 takes the most probable token at each step")
    add("--temperature T", float, "sample, from logits divided by this")
    add("--top-k K", int, "sample among the K most probable tokens")
    add("--top-p P", float, "sample among the fewest tokens whose probability reaches P")
    add("--seed N", default["seed"], "seed of sampling; the batch size has no influence")
    add(
        "--batch-size N", default["batch_size"], "prompts at a time; the tokens do not depend on it"
    )
    add(
        "--moe-expert-parallel-size R",
        1,
        "shard the experts over R processes: those of torchrun or Slurm, or else R that it starts",
    )
    add("--cpu", False, "use the CPU, even if there is a GPU")


def run(args: argparse.Namespace) -> int:
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.distributed import utils as distributed_utils
    from omegaconf import OmegaConf

    from evomoe_plugin.checkpoint.reading import plain_config
    from evomoe_plugin.config.run_checks import check_run
    from evomoe_plugin.launch.environment import process_count

    # Plain: the enumerations of fairseq's classes cannot be sent to other processes.
    cfg = OmegaConf.create(plain_config(OmegaConf.structured(FairseqConfig)))
    cfg.model = cfg.task = None  # of the checkpoint
    cfg.common.cpu, cfg.common.user_dir = args.cpu, args.user_dir
    cfg.common_eval.path = args.path
    cfg.eval_lm.moe_expert_parallel_size = args.moe_expert_parallel_size
    parallel = cfg.distributed_training
    parallel.distributed_world_size = 1
    if process_count(parallel) == 1:
        parallel.distributed_world_size = max(1, args.moe_expert_parallel_size)
    if process_count(parallel) == 1:
        check_run(cfg, 1)
        _generate(cfg, args)
    else:
        distributed_utils.call_main(cfg, _generate, args=args)
    return 0


def _generate(cfg: Any, args: argparse.Namespace) -> None:
    """Continue the prompts on each rank; the first prints all texts."""
    import torch
    import torch.distributed as dist
    from fairseq import utils

    from evomoe_plugin.generation.generate import generate
    from evomoe_plugin.generation.loading import load_trained_model
    from evomoe_plugin.generation.options import GenerationOptions

    utils.import_user_module(cfg.common)
    texts = _prompts(args.prompt, args.prompts_file)
    trained = load_trained_model("path", args.path, args.data, args.moe_expert_parallel_size)
    if args.chat:
        starts, prompts, stops = trained.codec.encode_chat(texts)
    else:
        starts, prompts, stops = None, [trained.codec.encode(text) for text in texts], []
    prints = not dist.is_initialized() or dist.get_rank() == 0
    unknown = sum(prompt.count(trained.dictionary.unk()) for prompt in prompts)
    if unknown and prints:
        print(
            f"warning: {unknown} tokens of the prompts are not in {trained.folder}/dict.txt",
            file=sys.stderr,
        )
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    options = parsed(GenerationOptions, args)
    done = generate(trained, prompts, options, device, starts, stops)
    if not prints:
        return
    for number, found in enumerate(done.continuations, 1):
        if len(prompts) > 1:
            print(f"--- {number}")
        print(trained.codec.decode(found.new if args.chat else found.prompt + found.new))
    sys.stdout.flush()
    new = sum(len(found.new) for found in done.continuations)
    print(
        f"{new:,} new tokens in {done.seconds:.2f} s: {new / done.seconds:,.1f} tokens per "
        f"second; {(new + sum(map(len, prompts))) / done.seconds:,.1f} with the prompts",
        file=sys.stderr,
    )
    if done.routed_tokens:
        print(
            f"{done.pairs / done.routed_tokens:.2f} of {done.experts / done.routed_tokens:.4g} "
            "experts per token were used in each MoE layer, on average",
            file=sys.stderr,
        )


def _prompts(given: list[str], path: str | None) -> list[str]:
    from evomoe_plugin.config.errors import OptionError

    texts = list(given)
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise OptionError(
                "prompts_file",
                path,
                f"is not UTF-8 ({error.reason} at byte {error.start}): convert it",
            ) from None
        except OSError as error:
            raise OptionError("prompts_file", path, f"cannot be read: {error.strerror}") from None
        texts += [line.removesuffix("\r") for line in lines if line.strip()]
    if not texts:
        raise OptionError(
            "prompt",
            "(not given)",
            "give --prompt TEXT, or --prompts-file FILE with a prompt a line",
        )
    return texts
