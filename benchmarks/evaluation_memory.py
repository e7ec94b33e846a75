"""Memory of ranks that evaluate a model with most of its weights in experts.

A model of `--experts` experts in each of four layers is trained for one update, then evaluated by
fairseq-eval-lm: on one rank, on two that hold it whole, and on two that shard its experts; from
one file and from sharded files. Peaks are of a rank's anonymous memory (what is mapped from the
checkpoint's file can be dropped), sampled 100 times a second; a model with two tiny experts shows
what the program itself takes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from processes import ROOT, call

import evomoe_plugin
from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
from evomoe_plugin.checkpoint.reshard import reshard
from evomoe_plugin.experts import ExpertFFN

LAYERS, WIDTH, FFN = 4, 512, 2048


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("evaluation-memory"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = args.folder.absolute()
    data = make_data(folder)
    tiny = train(data, folder / "tiny", 2, 8)
    whole = train(data, folder / "whole", args.experts, FFN)
    sharded = folder / "sharded.pt"
    evomoe_plugin.register()
    reshard(read_main_file("CKPT", str(whole)), str(sharded), 2)
    (program, *_), _, _ = evaluate(data, tiny, 1)
    experts = LAYERS * ExpertFFN.num_parameters(args.experts, WIDTH, FFN) * 4 / 2**20
    print(
        f"All experts: {experts:.0f} MiB. The program, without a model: {program:.0f} MiB.\n\n"
        "| ranks | experts | checkpoint | peak of each rank beyond the program, MiB | perplexity "
        "| s |\n|---|---|---|---|---|---|"
    )
    for ranks, size, path in (
        (1, 1, whole),
        (2, 1, whole),
        (2, 2, whole),
        (1, 1, sharded),
        (2, 2, sharded),
    ):
        peaks, perplexity, seconds = evaluate(data, path, ranks, size)
        print(
            f"| {ranks} | {'sharded' if size > 1 else 'all on each rank'} "
            f"| {'sharded' if path == sharded else 'one file'} "
            f"| {', '.join(f'{peak - program:.0f}' for peak in peaks)} | {perplexity} "
            f"| {seconds:.1f} |",
            flush=True,
        )


def make_data(folder: Path) -> Path:
    """4,000 random words to evaluate, and as many to train on."""
    data = folder / "data"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        dice = random.Random(1)
        for split in ("train", "valid"):
            words = " ".join(f"w{dice.randrange(200)}" for _ in range(4000))
            (folder / f"{split}.txt").write_text(words + "\n")
        command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source"]
        for split in ("train", "valid"):
            command += [f"--{split}pref", str(folder / f"{split}.txt")]
        call([*command, "--destdir", str(data)])
    return data


def train(data: Path, save_dir: Path, experts: int, ffn: int) -> Path:
    """The checkpoint after one update, without state of the optimizer."""
    path = save_dir / "checkpoint_last.pt"
    if not path.exists():
        options = (
            f"--user-dir evomoe_plugin --task language_modeling --arch transformer_lm_gpttiny_moe "
            f"--decoder-layers {LAYERS} --decoder-embed-dim {WIDTH} --decoder-ffn-embed-dim {ffn} "
            f"--moe-freq 1 --moe-expert-count {experts} --moe-gate top_k --moe-top-k 2 "
            f"--criterion moe_cross_entropy --optimizer sgd --lr 0.1 --max-update 1 "
            f"--tokens-per-sample 128 --batch-size 4 --disable-validation --num-workers 0 "
            f"--save-dir {save_dir}"
        )
        call([sys.executable, "-m", "fairseq_cli.train", str(data), *options.split()])
    return path


def evaluate(data: Path, path: Path, ranks: int, size: int = 1) -> tuple[list[float], str, float]:
    """Peak of each rank's anonymous memory in MiB, the perplexity printed, and the seconds."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    options = (
        f"--user-dir evomoe_plugin --path {path} --gen-subset valid --tokens-per-sample 128 "
        f"--batch-size 4 --num-workers 0 --moe-expert-parallel-size {size}"
    )
    launched = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    began = time.perf_counter()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fairseq_cli.eval_lm", str(data), *options.split()],
            cwd=ROOT,
            env={**os.environ, **({**launched, "RANK": str(rank)} if ranks > 1 else {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    peaks = [0.0] * ranks
    while any(process.poll() is None for process in started):
        for rank, process in enumerate(started):
            peaks[rank] = max(peaks[rank], anonymous_mib(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{outputs[0][-3000:]}\nerror: the evaluation failed")
    (perplexity,) = re.findall(r"Perplexity: (\S+)", "".join(outputs))
    return peaks, perplexity, seconds


def anonymous_mib(pid: int) -> float:
    """Of a process, 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    main()
