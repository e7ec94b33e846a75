"""Is the cost of a dense-to-sparse layer proportional to its routed pairs?

One MoE layer, forward and backward, at several points of the annealing: the temperature is set so
that the gate selects 16, 8, 4, 2 and 1 experts per token on average, with the resulting imbalance.
The points are timed in turn, round by round, in one process; ratios are taken within a round. Peak
memory is measured in a separate process for each point.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
from torch.nn.functional import gelu

from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.gates.registry import option_fields
from evomoe_plugin.layer import MoELayer, build_layer
from evomoe_plugin.routing import stats as st


def build(args: argparse.Namespace, wanted: float) -> tuple[MoELayer, torch.Tensor, float]:
    """A layer that routes each token to `wanted` experts on average, its input, and that mean."""
    torch.manual_seed(0)
    x_TD = torch.randn(args.tokens, args.width)
    options = {
        **vars(MoEOptions()),
        **{name: option.default for name, option in option_fields().items()},
        "max_update": None,
        "moe_expert_ffn_dim": args.ffn,
        "moe_temperature_schedule": "constant",
        "moe_gate_noise": "none",
    }
    if wanted == 1:
        options["moe_hard_updates"] = 0
    layer = build_layer(LayerInfo(args.width, args.experts), types.SimpleNamespace(**options), gelu)
    gate = layer.gate
    low, high = 1e-3, 1e3
    for _ in range(40):
        gate.temperature_start = (low * high) ** 0.5
        with torch.no_grad():
            probs_TE = torch.softmax(gate.score(x_TD) / gate.temperature_start, 1)
            mean = (probs_TE > gate.threshold).sum(1).double().mean().item()
        low, high = (
            (low, gate.temperature_start) if mean > wanted else (gate.temperature_start, high)
        )
    gate.temperature_start = high
    return layer, x_TD.requires_grad_(), float(pairs(layer, x_TD)) / args.tokens


def pairs(layer: MoELayer, x_TD: torch.Tensor) -> int:
    """Routed pairs of one forward pass."""
    with torch.no_grad():
        return int(layer(x_TD)[2][st.PAIRS])


def step(layer: MoELayer, x_TD: torch.Tensor) -> None:
    """One forward and backward pass; gradients are discarded."""
    y_TD, aux, _ = layer(x_TD)
    (y_TD.sum() + aux.sum()).backward()
    layer.zero_grad()
    x_TD.grad = None


def peak_memory(args: argparse.Namespace, wanted: float) -> float:
    """MiB that one step needs beyond the layer and its input; call in a new process."""
    layer, x_TD, _ = build(args, wanted)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
    before = resident("VmRSS")
    step(layer, x_TD)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) / 1024


def in_own_process(args: argparse.Namespace, wanted: float) -> float:
    """`peak_memory` in a new process."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "width", "ffn", "experts")]
    command = [sys.executable, __file__, *sizes, f"--memory={wanted}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the table; write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--memory", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory is not None:
        print(peak_memory(args, args.memory))
        return

    points = [args.experts / 2**i for i in range(args.experts.bit_length())]
    layers = {wanted: build(args, wanted) for wanted in points}
    times: dict[float, list[float]] = {wanted: [] for wanted in points}
    for round_ in range(args.rounds + 1):
        for wanted, (layer, x_TD, _) in layers.items():
            start = time.perf_counter()
            step(layer, x_TD)
            if round_:  # the first round is warm-up
                times[wanted].append(time.perf_counter() - start)

    print(
        f"T={args.tokens} D={args.width} F={args.ffn} E={args.experts}, fp32, "
        f"{args.threads} threads, torch {torch.__version__}, {args.rounds} rounds\n"
    )
    print(
        "| experts per token | seconds per step | time / dense | range | pairs / dense "
        "| peak memory, MiB |"
    )
    print("|---|---|---|---|---|---|")
    dense_mean = layers[points[0]][2]
    rows = []
    for wanted in points:
        ratios = [t / dense for t, dense in zip(times[wanted], times[points[0]], strict=True)]
        row = {
            "experts_per_token": layers[wanted][2],
            "seconds": statistics.median(times[wanted]),
            "time_ratio": statistics.median(ratios),
            "time_ratio_spread": [min(ratios), max(ratios)],
            "pairs_ratio": layers[wanted][2] / dense_mean,
            "peak_mib": in_own_process(args, wanted),
        }
        rows.append(row)
        print(
            f"| {row['experts_per_token']:.2f} | {row['seconds']:.3f} | {row['time_ratio']:.3f} "
            f"| {min(ratios):.3f}–{max(ratios):.3f} | {row['pairs_ratio']:.3f} "
            f"| {row['peak_mib']:.0f} |",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"arguments": vars(args), "torch": torch.__version__, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
