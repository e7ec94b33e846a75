"""Compare `--ddp-backend fsdp2` with `fully_sharded` and one rank: memory, time and collectives.

Runs of fairseq-train on gloo ranks of this machine, in turn, round by round, each in processes of
its own. A rank's memory is the peak of its process, less what it had when it was forked;
time is that of an update on rank 0, wall-clock and CPU; collectives are those of one update of
rank 0, with the bytes of their largest tensor.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fairseq_cli.train
import numpy as np
import torch
import torch.distributed.fsdp
from fairseq.data import Dictionary, indexed_dataset
from processes import ROOT, fork
from torch.utils._python_dispatch import TorchDispatchMode

import evomoe_plugin
from evomoe_plugin.trainer.moe_trainer import MoETrainer

MODEL = """--user-dir evomoe_plugin --task language_modeling --arch transformer_lm_gpttiny_moe
--decoder-layers 4 --decoder-embed-dim 256 --decoder-ffn-embed-dim 1024 --moe-expert-count 8
--decoder-attention-heads 4 --share-decoder-input-output-embed --moe-gate top_k
--criterion moe_cross_entropy --tokens-per-sample 128 --batch-size 4 --optimizer fused_adamw
--lr 0.001 --clip-norm 1.0 --num-workers 0 --no-save --disable-validation --log-interval 100
--dropout 0 --min-params-to-wrap 0""".split()
LAYOUTS = {
    "one rank": (1, ["--update-freq", "2"]),
    "fully_sharded": (2, ["--ddp-backend", "fully_sharded"]),
    "fsdp2": (2, ["--ddp-backend", "fsdp2"]),
}


class Collectives(TorchDispatchMode):
    """Counts collectives, and adds up the bytes of the largest tensor of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [
                x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)
            ]
            name = func.overloadpacket.__name__.strip("_")
            self.calls[name] += 1
            lists = [x for x in args if isinstance(x, list)]
            largest = max((x.numel() * x.element_size() for x in tensors), default=0)
            total = max(
                (sum(t.numel() * t.element_size() for t in flat(x)) for x in lists), default=0
            )
            self.bytes[name] += max(largest, total)
        return func(*args, **(kwargs or {}))


def flat(nested: Any) -> list[torch.Tensor]:
    """The tensors of nested lists."""
    return [x for x in torch.utils._pytree.tree_leaves(nested) if isinstance(x, torch.Tensor)]


def write_data(folder: Path) -> None:
    """A random text of 512 words."""
    dice, dictionary = random.Random(0), Dictionary()
    for word in range(512):
        dictionary.add_symbol(f"w{word}", n=10)
    dictionary.finalize()
    dictionary.save(str(folder / "dict.txt"))
    builder = indexed_dataset.make_builder(str(folder / "train.bin"), impl="mmap", vocab_size=512)
    for _ in range(400):
        builder.add_item(torch.tensor([dice.randrange(4, 500) for _ in range(127)] + [2]))
    builder.finalize(str(folder / "train.idx"))


def train(data: Path, ranks: int, given: list[str], updates: int) -> dict[str, Any]:
    """Run the ranks; what rank 0 measured, with the largest memory of a rank."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    reads, writes = zip(*(os.pipe() for _ in range(ranks)), strict=True)

    def rank_main(rank: int) -> None:
        more = []
        if ranks > 1:
            more = f"""--distributed-world-size {ranks} --distributed-rank {rank}
            --distributed-no-spawn --distributed-init-method tcp://localhost:{port}""".split()
        found = measured(updates)
        sys.argv = ["fairseq-train", str(data), *MODEL, *given, *more]
        sys.argv += ["--max-update", str(updates)]
        fairseq_cli.train.cli_main()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found["mib"] = peak - found["before"]
        os.write(writes[rank], repr(found).encode())

    children = []
    for rank in range(1, ranks):
        child = os.fork()
        if child == 0:
            try:
                fork(lambda rank=rank: rank_main(rank), data / f"log{rank}")  # type: ignore[misc]
            finally:
                os._exit(0)
        children.append(child)
    fork(lambda: rank_main(0), data / "log0")
    for child in children:
        os.waitpid(child, 0)
    found = [eval(os.read(read, 2**16)) for read in reads]  # what we wrote
    for end in (*reads, *writes):
        os.close(end)
    return {**found[0], "mib": max(f["mib"] for f in found)}


def measured(updates: int) -> dict[str, Any]:
    """Have the trainer of this process add what it measures to the result."""
    found: dict[str, Any] = {"seconds": [], "cpu": [], "calls": {}, "bytes": {}}
    step, found["before"] = MoETrainer.train_step, current_mib()

    def timed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        done = trainer.get_num_updates()
        if done == 1:  # counted, not timed; the first update sets buffers up
            with Collectives() as seen:
                result = step(trainer, *args, **kwargs)
            found["calls"], found["bytes"] = dict(seen.calls), dict(seen.bytes)
            return result
        start, used = time.perf_counter(), time.process_time()
        result = step(trainer, *args, **kwargs)
        if done > 1:
            found["seconds"].append(time.perf_counter() - start)
            found["cpu"].append(time.process_time() - used)
        return result

    MoETrainer.train_step = timed  # type: ignore[method-assign]
    return found


def current_mib() -> float:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.chdir(ROOT)
    evomoe_plugin.register()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for _ in range(args.rounds):
            for name, (ranks, given) in LAYOUTS.items():
                dtype = ["--bf16"] if args.bf16 else []
                results[name].append(train(Path(folder), ranks, given + dtype, args.updates))
    print("| layout | MiB per rank | s per update | CPU s per update | collectives | MiB in them |")
    print("|---|---|---|---|---|---|")
    for name, found in results.items():
        cells = [
            spread([f["mib"] for f in found], ".0f"),
            *(spread([s for f in found for s in f[key]], ".3f") for key in ("seconds", "cpu")),
            ", ".join(f"{n} {kind}" for kind, n in sorted(found[0]["calls"].items())) or "–",
            f"{sum(found[0]['bytes'].values()) / 2**20:.1f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def spread(values: list[float], form: str) -> str:
    """Median, and the lowest and highest."""
    middle, *ends = (float(f(values)) for f in (statistics.median, min, max))
    return f"{middle:{form}} ({ends[0]:{form}}–{ends[1]:{form}})"


if __name__ == "__main__":
    np.random.seed(0)
    main()
