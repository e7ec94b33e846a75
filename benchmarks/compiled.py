"""Does torch.compile make a training step faster?

Parts of the model are compiled, one kind at a time: norms, the attention block with its residual,
gates (with dynamic shapes, since tokens per expert vary), and whole layers, in which routing causes
graph breaks. Each variant is a separate model; forward and backward passes are timed in turn, round
by round, in one process, and ratios are taken within a round. On a CPU, CPU time is measured, which
other programs disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from speed.training import Sizes, build, sample


def _norms(layer: Any) -> None:
    layer.self_attn_layer_norm.compile()
    layer.final_layer_norm.compile()


def _attention(layer: Any) -> None:
    layer._attend = torch.compile(layer._attend)


def _gate(layer: Any) -> None:
    layer.moe.gate.forward = torch.compile(layer.moe.gate.forward, dynamic=True)


def _whole(layer: Any) -> None:
    layer.compile(dynamic=True)


VARIANTS: dict[str, Callable[[Any], None] | None] = {
    "plain": None,
    "norms": _norms,
    "attention": _attention,
    "gates": _gate,
    "whole layers": _whole,
}


class Subject:
    """A model with compiled parts."""

    def __init__(self, sizes: Sizes, compile_part: Callable[[Any], None] | None, device: str):
        torch._dynamo.reset()
        run = build(sizes, ("--moe-gate", "top_k", "--moe-top-k", sizes.top_k))
        self.model, self.criterion = run.model.to(device).train(), run.criterion.train()
        for layer in self.model.decoder.layers if compile_part else ():
            compile_part(layer)
        self.sample, self.device = sample(sizes, device), device

    def seconds(self) -> float:
        """Time of forward and backward pass."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        start = clock()
        loss, *_ = self.criterion(self.model, self.sample)
        loss.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        end = clock()
        self.model.zero_grad()
        return end - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="4x256x8", metavar="LAYERSxWIDTHxEXPERTS")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = Sizes(*map(int, args.sizes.split("x")), batch=args.batch, length=args.length)
    subjects, first, failed = {}, {}, {}
    for name in args.variants:
        subject = Subject(sizes, VARIANTS[name], args.device)
        try:
            first[name] = subject.seconds()
            subject.seconds()  # may recompile for changed shapes
        except Exception as error:  # compiler errors have many types
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            subjects[name] = subject
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(args.rounds):
        for name, subject in subjects.items():
            times[name].append(subject.seconds())
    print(
        f"{sizes.name}; {args.device}, {args.threads} threads, torch {torch.__version__}, "
        f"{args.rounds} rounds\n"
    )
    print("| compiled | first step, s | forward + backward, ms | relative to plain | range |")
    print("|---|---|---|---|---|")
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["plain"], strict=True)]
        print(
            f"| {name} | {first[name]:.1f} | {1e3 * statistics.median(taken):.0f} "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f}–{max(ratios):.3f} |"
        )
    for name, error in failed.items():
        print(f"\n{name}: torch.compile fails, {error}")


if __name__ == "__main__":
    main()
