"""What does a step cost before the spawn, when one expert of each layer works?

A GPT whose experts have not been spawned yet, with several numbers of experts, beside fairseq's own
dense model of the same sizes: forward and backward, and the optimizer's step, which is always over
all experts. The models are timed in turn, round after round, in one process; ratios are taken
within a round. FLOPs of the matrix products are counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import types
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.dataclass.utils import merge_with_parent
from fairseq.models import MODEL_DATACLASS_REGISTRY, build_model
from fairseq.optim.adam import FairseqAdam
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

import evomoe_plugin  # noqa: F401  registers the models

SYMBOLS = 1000


class Subject:
    """A model with its optimizer; `experts` 0 is fairseq's dense one."""

    def __init__(self, args: argparse.Namespace, experts: int):
        torch.manual_seed(0)
        given = {
            "decoder_layers": args.layers, "decoder_embed_dim": args.width,
            "decoder_ffn_embed_dim": args.ffn, "decoder_attention_heads": args.width // 64,
            "decoder_input_dim": args.width, "decoder_output_dim": args.width, "dropout": 0.0,
            "attention_dropout": 0.0, "share_decoder_input_output_embed": True,
            "activation_fn": "gelu",
        }
        if experts:
            given |= {"moe_expert_count": str(experts), "moe_spawn_updates": 10}
        self.model = build_model(config("transformer_lm_moe" if experts else "transformer_lm",
                                        given), task())
        self.optimizer = FairseqAdam(
            OmegaConf.create({"lr": [1e-4], "adam_betas": [0.9, 0.98], "adam_eps": 1e-8,
                              "weight_decay": 0.1, "use_old_adam": False, "tpu": False,
                              "fp16_adam_stats": False}),
            list(self.model.parameters()))
        self.tokens = torch.randint(4, SYMBOLS, (args.batch, args.length))

    def passes(self) -> None:
        """Forward and backward."""
        logits, _ = self.model(self.tokens)
        torch.nn.functional.cross_entropy(
            logits.view(-1, logits.size(-1)).float(), self.tokens.view(-1)).backward()

    def flops(self) -> int:
        """Of `passes`."""
        with FlopCounterMode(display=False) as counter:
            self.passes()
        self.optimizer.zero_grad()
        return counter.get_total_flops()

    def step(self) -> tuple[float, float]:
        """Seconds of both passes, and of the optimizer."""
        start = time.perf_counter()
        self.passes()
        between = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.optimizer.zero_grad()
        return between - start, end - between


def task() -> Any:
    """What `build_model` asks of a task."""
    dictionary = Dictionary()
    for n in range(SYMBOLS - len(dictionary)):
        dictionary.add_symbol(f"w{n}")
    return types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def config(arch: str, given: dict[str, Any]) -> Any:
    """Resolved options of an architecture."""
    run = OmegaConf.create({
        "common": {"seed": 1, "tpu": False}, "optimization": {"max_update": 100},
        "task": {"add_bos_token": False, "tokens_per_sample": 1024, "max_target_positions": None},
        "model": {"_name": arch, **given},
    })
    cfg = merge_with_parent(MODEL_DATACLASS_REGISTRY[arch](), run.model)
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    subjects = {experts: Subject(args, experts) for experts in (0, *args.experts)}
    flops = {experts: subject.flops() for experts, subject in subjects.items()}
    times: dict[int, list[tuple[float, float]]] = {experts: [] for experts in subjects}
    for round_ in range(args.rounds + 1):
        for experts, subject in subjects.items():
            taken = subject.step()
            if round_:  # the first round warms up
                times[experts].append(taken)

    print(f"B={args.batch} length={args.length} layers={args.layers} D={args.width} F={args.ffn}, "
          f"every second layer MoE, fp32, Adam, {args.threads} threads, torch {torch.__version__}, "
          f"{args.rounds} rounds\n")
    print("| experts | parameters | GFLOPs | forward + backward, s | of dense | spread "
          "| optimizer, s | of dense | whole step, of dense |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for experts, subject in subjects.items():
        passes, optimizer = zip(*times[experts], strict=True)
        dense_passes, dense_optimizer = zip(*times[0], strict=True)
        ratios = [a / b for a, b in zip(passes, dense_passes, strict=True)]
        steps = [sum(a) / sum(b) for a, b in zip(times[experts], times[0], strict=True)]
        row = {
            "experts": experts,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "gflops": flops[experts] / 1e9,
            "seconds": statistics.median(passes),
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "optimizer_seconds": statistics.median(optimizer),
            "optimizer_ratio": statistics.median(
                a / b for a, b in zip(optimizer, dense_optimizer, strict=True)),
            "step_ratio": statistics.median(steps),
        }
        rows.append(row)
        print(f"| {experts or 'dense'} | {row['parameters']:,} | {row['gflops']:.2f} "
              f"| {row['seconds']:.3f} | {row['ratio']:.3f} | {min(ratios):.3f}–{max(ratios):.3f} "
              f"| {row['optimizer_seconds']:.3f} | {row['optimizer_ratio']:.2f} "
              f"| {row['step_ratio']:.3f} |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "torch": torch.__version__, "rows": rows}, file,
                      indent=1)


if __name__ == "__main__":
    main()
