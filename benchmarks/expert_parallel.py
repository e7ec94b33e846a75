"""Compare expert parallelism with fully sharded experts.

One MoE layer on several gloo ranks of this machine, forward and backward: experts fully sharded
(all-gathered before each pass, gradients reduce-scattered), and expert parallel (tokens are sent
to their experts). Both are timed in turn, round by round, in the same processes; ratios are taken
within a round. Bytes are those sent by one rank. Rank 0 also measures the constants of
docs/scaling.md: latency and bandwidth of each collective, and matmul FLOP/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from evomoe_plugin.dispatch.all_to_all import Exchange, Meter
from evomoe_plugin.dispatch.parallel_ffn import ParallelExpertFFN
from evomoe_plugin.dispatch.process_groups import expert_groups
from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.patches import apply_all
from evomoe_plugin.routing.plan import RoutingPlan, plan_from_mask


def main() -> None:
    """Print the tables; write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="tokens per rank"
    )
    parser.add_argument(
        "--top-k", "--picks", type=int, nargs="+", default=[1, 2], help="experts per token"
    )
    parser.add_argument("--chunks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    context = mp.get_context("spawn")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=run, args=(rank, store.port, args)) for rank in range(args.ranks)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit("error: a rank failed")


def run(rank: int, port: int, args: argparse.Namespace) -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("localhost", port, is_master=False),
        rank=rank,
        world_size=args.ranks,
    )
    apply_all()
    constants = measure_constants(args)
    meter = Meter()
    subjects = {"fully sharded": sharded(args), "expert parallel": expert_parallel(args, meter)}
    rows = [
        row
        for tokens in args.tokens
        for top_k in args.top_k
        for row in compare(subjects, meter, tokens, top_k, args)
    ]
    if rank == 0:
        show(args, constants, rows)
    dist.barrier()
    dist.destroy_process_group()


def sharded(args: argparse.Namespace) -> nn.Module:
    """All experts, fully sharded."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    torch.manual_seed(0)
    return FullyShardedDataParallel(
        ExpertFFN(args.experts, args.width, args.ffn, nn.functional.gelu),
        compute_dtype=torch.float32,
    )


def expert_parallel(args: argparse.Namespace, meter: Meter) -> nn.Module:
    """This rank's experts, with all-to-all."""
    torch.manual_seed(0)
    groups = expert_groups(args.ranks)
    return ParallelExpertFFN(
        args.experts,
        args.width,
        args.ffn,
        nn.functional.gelu,
        groups=groups,
        exchange=partial(Exchange, groups.exchange, meter=meter),
        chunks=args.chunks,
    )


def compare(
    subjects: dict[str, nn.Module], meter: Meter, tokens: int, top_k: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time both layouts on the same tokens, with balanced routing."""
    plan = even_plan(tokens, top_k, args.experts)
    x = torch.randn(tokens, args.width, requires_grad=True)
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    waits = []
    for round_ in range(args.rounds + 1):
        for name, experts in subjects.items():
            dist.barrier()
            meter.reset()
            start = time.perf_counter()
            experts(x, plan).sum().backward()
            taken = time.perf_counter() - start
            experts.zero_grad()
            x.grad = None
            if round_:  # the first round is warm-up
                seconds[name].append(taken)
                if meter.seconds:
                    waits.append(meter.seconds)
    others = (args.ranks - 1) / args.ranks
    parameters = ExpertFFN.num_parameters(args.experts, args.width, args.ffn)
    sent = {
        # All-gather for both passes, one reduce-scatter.
        "fully sharded": 3 * 4 * parameters * others,
        # Dispatch and combine in both passes.
        "expert parallel": 4 * 4 * plan.num_pairs * args.width * others,
    }
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["fully sharded"], strict=True)]
        rows.append(
            {
                "tokens": tokens,
                "top_k": top_k,
                "layout": name,
                "mib_sent": sent[name] / 2**20,
                "seconds": statistics.median(times),
                "ratio": statistics.median(ratios),
                "ratio_spread": [min(ratios), max(ratios)],
                "wait_seconds": statistics.median(waits) if name == "expert parallel" else None,
            }
        )
    return rows


def even_plan(tokens: int, top_k: int, experts: int) -> RoutingPlan:
    """Route token t to the `top_k` experts starting at t modulo E."""
    token_ids, offsets = torch.arange(tokens).unsqueeze(1), torch.arange(top_k).unsqueeze(0)
    mask = torch.zeros(tokens, experts, dtype=torch.bool)
    mask[token_ids, (token_ids + offsets) % experts] = True
    return plan_from_mask(mask, mask.float() / top_k)


def measure_constants(args: argparse.Namespace) -> dict[str, float]:
    """Latency (s) and bandwidth (B/s sent per rank) of collectives; matmul FLOP/s."""
    constants = {}
    small, large = 1024, 2**22  # elements
    for name, collective, share in collectives(args.ranks):
        times = {size: timed(partial(collective, size)) for size in (small, large)}
        constants[f"{name}_latency"] = times[small]
        constants[f"{name}_bandwidth"] = 4 * large * share / times[large]
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    constants["flops"] = 2 * 1024**3 / timed(lambda: a @ b)
    return constants


def collectives(ranks: int) -> list[tuple[str, Callable[[int], Any], float]]:
    """Name, a call that moves this many elements in total, and the share sent per rank."""

    def all_to_all(size: int) -> None:
        rows = torch.zeros(size)
        dist.all_to_all_single(torch.empty_like(rows), rows)

    def gather(size: int) -> None:
        part = torch.zeros(size // ranks)
        dist.all_gather([torch.empty_like(part) for _ in range(ranks)], part)

    def scatter(size: int) -> None:
        parts = list(torch.zeros(size).chunk(ranks))
        dist.reduce_scatter(torch.empty_like(parts[0]), parts)

    share = (ranks - 1) / ranks
    return [
        ("all_to_all", all_to_all, share),
        ("all_gather", gather, share),
        ("reduce_scatter", scatter, share),
    ]


def timed(call: Callable[[], Any], times: int = 9) -> float:
    """Median seconds, after one warm-up call."""
    taken = []
    for _ in range(times + 1):
        dist.barrier()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def show(args: argparse.Namespace, constants: dict[str, float], rows: list[dict]) -> None:
    """Print the results."""
    print(
        f"{args.ranks} gloo ranks with one thread each, E={args.experts} D={args.width} "
        f"F={args.ffn}, fp32, {args.chunks} chunks, torch {torch.__version__}, "
        f"{args.rounds} rounds, forward and backward of one layer's experts\n"
    )
    print(
        "| tokens per rank | experts per token | layout | MiB sent | s | relative to sharded "
        "| range | s waiting |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_spread"]
        waited = "" if row["wait_seconds"] is None else f"{row['wait_seconds']:.4f}"
        print(
            f"| {row['tokens']} | {row['top_k']} | {row['layout']} | {row['mib_sent']:.2f} "
            f"| {row['seconds']:.4f} | {row['ratio']:.2f} | {low:.2f}–{high:.2f} | {waited} |"
        )
    print("\n| constant | value |\n|---|---|")
    for name, value in constants.items():
        unit = "ms" if name.endswith("latency") else "GB/s" if "bandwidth" in name else "GFLOP/s"
        print(f"| {name} | {value * 1000 if unit == 'ms' else value / 1e9:.2f} {unit} |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {
                    "arguments": vars(args),
                    "torch": torch.__version__,
                    "constants": constants,
                    "rows": rows,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
