"""Time of the optimizer step, with fairseq's adam and with fused_adamw.

From gradients to updated weights, as in fairseq's trainer: divide by the sample size, clip, step.
Models are those of the whole-step benchmark; for each the optimizers are timed in turn, round by
round, in one process; ratios are taken within a round. For comparison, the time of forward and
backward pass is given, and the largest weight difference after the last round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from speed.training import Sizes, build, sample

OPTIMIZERS = ("adam", "fused_adamw")
GIVEN = ("--adam-betas", "(0.9, 0.98)", "--clip-norm", 1.0, "--moe-gate", "top_k")


class Subject:
    """A model with one of the optimizers."""

    def __init__(self, sizes: Sizes, name: str, device: str):
        run = build(sizes, (*GIVEN, "--optimizer", name))
        self.model, self.criterion = run.model.to(device), run.criterion.train()
        self.trainer = run.trainer()
        self.sample = sample(sizes, device)
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.gradients: list[torch.Tensor] = []

    def passes(self) -> None:
        """Forward and backward."""
        self.trainer.zero_grad()
        loss, self.sample_size, _ = self.criterion(self.model.train(), self.sample)
        loss.backward()
        self.gradients = [p.grad.clone() for p in self.model.parameters()]

    def begin(self) -> None:
        """Set the gradients of the backward pass."""
        for p, grad in zip(self.model.parameters(), self.gradients, strict=True):
            p.grad.copy_(grad)

    def end(self) -> None:
        """Divide, clip and step, as the trainer does."""
        optimizer = self.trainer.optimizer
        optimizer.multiply_grads(1 / self.sample_size)
        self.trainer.clip_grad_norm(1.0)
        optimizer.step()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Time of `work`."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start


def measure(sizes: Sizes, rounds: int, device: str) -> dict[str, Any]:
    """A row of the table."""
    subjects = {name: Subject(sizes, name, device) for name in OPTIMIZERS}
    for subject in subjects.values():
        subject.passes()
    passes = [subjects["adam"].seconds(subjects["adam"].passes) for _ in range(3)]
    for p, grad in zip(subjects["fused_adamw"].gradients, subjects["adam"].gradients, strict=True):
        p.copy_(grad)
    ends: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for _ in range(rounds + 1):
        for name, subject in subjects.items():
            subject.begin()
            ends[name].append(subject.seconds(subject.end))
    ratios = [b / a for a, b in zip(*(times[1:] for times in ends.values()), strict=True)]
    one, other = (dict(subject.model.named_parameters()) for subject in subjects.values())
    return {
        "sizes": sizes.name,
        "parameters": sum(p.numel() for p in one.values()),
        "passes": min(passes),
        "adam": statistics.median(ends["adam"][1:]),
        "fused_adamw": statistics.median(ends["fused_adamw"][1:]),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "difference": max(float((one[n] - other[n]).abs().max()) for n in one),
    }


def main() -> None:
    """Print the table; write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["4x256x8", "4x256x32", "2x512x16"],
        metavar="LAYERSxWIDTHxEXPERTS",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        measure(Sizes(*map(int, text.split("x"))), args.rounds, args.device) for text in args.sizes
    ]
    print(
        f"{args.device}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds\n"
    )
    print(
        "| model | parameters | forward + backward, ms | adam, ms | fused_adamw, ms "
        "| fused / adam | range | largest weight difference |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['sizes']} | {row['parameters']:,} | {1e3 * row['passes']:.0f} "
            f"| {1e3 * row['adam']:.1f} | {1e3 * row['fused_adamw']:.1f} | {row['ratio']:.2f} "
            f"| {row['spread'][0]:.2f}–{row['spread'][1]:.2f} | {row['difference']:.0e} |"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"arguments": vars(args), "torch": torch.__version__, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
