"""Cost of an update in the dense phase, before the spawn, against a dense model's.

Updates of fairseq's own trainer: forward and backward, gradient norm, Adam, log. A GPT whose
experts are not spawned yet, with several numbers of experts, beside fairseq's dense model of the
same sizes. Each MoE layer multiplies expert 0 only; the other experts have gradients of zero, which
the norm and the optimizer go over. Models are timed in turn, round after round, in one process;
ratios are taken within a round. Seconds are CPU time, which other programs on the machine disturb
least. FLOPs of matmuls are counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch.utils.flop_counter import FlopCounterMode

from evomoe_plugin.trainer.moe_trainer import MoETrainer

ROWS = 1000  # of the vocabulary


class Subject:
    """A run with so many experts a layer; 0 is fairseq's dense model."""

    def __init__(self, args: argparse.Namespace, data: str, experts: int):
        self.experts = experts
        torch.manual_seed(0)
        given = [
            data,
            "--task",
            "language_modeling",
            "--decoder-layers",
            args.layers,
            "--decoder-embed-dim",
            args.width,
            "--decoder-ffn-embed-dim",
            args.ffn,
            "--decoder-attention-heads",
            args.width // 64,
            "--decoder-input-dim",
            args.width,
            "--decoder-output-dim",
            args.width,
            "--dropout",
            0,
            "--attention-dropout",
            0,
            "--share-decoder-input-output-embed",
            "--activation-fn",
            "gelu",
            "--tokens-per-sample",
            args.length,
            "--max-target-positions",
            args.length,
            "--optimizer",
            "adam",
            "--adam-betas",
            "(0.9, 0.98)",
            "--weight-decay",
            0.1,
            "--lr",
            1e-4,
            "--clip-norm",
            1.0,
            "--max-update",
            1_000_000,
            *args.precision,
            "--arch",
            "transformer_lm_moe" if experts else "transformer_lm",
            "--criterion",
            "cross_entropy",  # fairseq's for all: only the layers differ
        ]
        if experts:
            given += ["--moe-expert-count", experts, "--moe-spawn-updates", 100_000]
        given = list(map(str, given))
        with mock.patch("sys.argv", ["fairseq-train", *given]):
            parsed = options.parse_args_and_arch(options.get_training_parser(), given)
        cfg = convert_namespace_to_omegaconf(parsed)
        task = tasks.setup_task(cfg.task)
        self.model = task.build_model(cfg.model)
        self.trainer = MoETrainer(cfg, task, self.model, task.build_criterion(cfg.criterion))
        self.trainer.lr_step_begin_epoch(1)
        tokens = torch.randint(4, ROWS, (args.batch, args.length + 1))
        sample = {
            "id": torch.arange(args.batch),
            "nsentences": args.batch,
            "ntokens": args.batch * args.length,
            "target": tokens[:, 1:].contiguous(),
            "net_input": {
                "src_tokens": tokens[:, :-1].contiguous(),
                "src_lengths": torch.full((args.batch,), args.length),
            },
        }
        self.samples = [sample] * args.update_freq

    @property
    def name(self) -> str:
        return str(self.experts or "dense")

    def flops(self) -> int:
        """Of an update."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    def step(self) -> tuple[float, float]:
        """CPU seconds of forward and backward passes, and of all else."""
        passes = 0.0

        def timed(*args: Any, upstream: Callable = self.trainer.task.train_step, **kwargs: Any):
            nonlocal passes
            start = time.process_time()
            output = upstream(*args, **kwargs)
            passes += time.process_time() - start
            return output

        with mock.patch.object(self.trainer.task, "train_step", timed):
            start = time.process_time()
            self.trainer.train_step(self.samples)
            return passes, time.process_time() - start - passes


def write_dictionary(folder: str) -> None:
    """All that the task reads of its data."""
    dictionary = Dictionary()
    for n in range(ROWS - len(dictionary)):
        dictionary.add_symbol(f"w{n}")
    dictionary.save(str(Path(folder) / "dict.txt"))


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--update-freq", type=int, default=1, metavar="N", help="micro-batches of an update"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["--cpu"],
        metavar="OPTION",
        help="fairseq's options of it, as ' --bf16'; --cpu: fp32 on the CPU",
    )
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    args.precision = [option.strip() for option in args.precision]
    torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as folder:
        write_dictionary(folder)
        subjects = [Subject(args, folder, experts) for experts in (0, *args.experts)]
    flops = [subject.flops() for subject in subjects]
    times: list[list[tuple[float, float]]] = [[] for _ in subjects]
    for round_ in range(args.rounds + 1):
        for subject, taken in zip(subjects, times, strict=True):
            step = subject.step()
            if round_:  # the first round warms up
                taken.append(step)

    print(
        f"B={args.batch} length={args.length} update_freq={args.update_freq} "
        f"layers={args.layers} D={args.width} F={args.ffn}, every second layer MoE, "
        f"{' '.join(args.precision)}, Adam, {args.threads} threads, torch {torch.__version__}, "
        f"{args.rounds} rounds\n"
    )
    print(
        "| experts | parameters | GFLOPs | step, CPU s | of dense | spread | forward + backward, "
        "of dense | all else, CPU s | of dense |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for subject, count, taken in zip(subjects, flops, times, strict=True):
        ratios = [sum(a) / sum(b) for a, b in zip(taken, times[0], strict=True)]
        row = {
            "experts": subject.name,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "gflops": count / 1e9,
            "seconds": statistics.median(map(sum, taken)),
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "passes_ratio": statistics.median(
                a / b for (a, _), (b, _) in zip(taken, times[0], strict=True)
            ),
            "other_seconds": statistics.median(other for _, other in taken),
            "other_ratio": statistics.median(
                a / b for (_, a), (_, b) in zip(taken, times[0], strict=True)
            ),
        }
        rows.append(row)
        print(
            f"| {row['experts']} | {row['parameters']:,} | {row['gflops']:.2f} "
            f"| {row['seconds']:.3f} | {row['ratio']:.3f} "
            f"| {min(ratios):.3f}–{max(ratios):.3f} | {row['passes_ratio']:.3f} "
            f"| {row['other_seconds']:.3f} | {row['other_ratio']:.2f} |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"arguments": vars(args), "torch": torch.__version__, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
