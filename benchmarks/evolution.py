"""Does upcycling a dense model to an MoE model pay off?

On the quickstart's text, with equal tokens: a dense model; MoE models from scratch (top-2, Switch,
dense-to-sparse); MoE models upcycled with each method of `evomoe upcycle` from a dense model
trained for the first half; and EvoMoE, which spawns its experts during the run. Upcycled models
start with a new optimizer and a new learning rate schedule, so their control is a dense model
trained in two halves in the same way. All runs share model sizes, batch, and kind and peak of the
schedule; none is tuned.

Finished results are stored as JSON in the folder and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch._dynamo
from fairseq.data import Dictionary
from fairseq_cli import train
from processes import fork
from quickstart_text import prepare, unigram_perplexity

import evomoe_plugin
from evomoe_plugin.cli import main as evomoe
from evomoe_plugin.evolve.perplexity import perplexity
from evomoe_plugin.metrics.log import Record, parse_log

LAYERS, WIDTH, FFN, CONTEXT = 4, 128, 512, 128

# As in hydra_configs/small.
SIZES = (
    "--decoder-layers",
    str(LAYERS),
    "--decoder-embed-dim",
    str(WIDTH),
    "--decoder-ffn-embed-dim",
    str(FFN),
    "--decoder-attention-heads",
    "4",
    "--decoder-input-dim",
    str(WIDTH),
    "--decoder-output-dim",
    str(WIDTH),
    "--activation-fn",
    "gelu",
    "--share-decoder-input-output-embed",
    "--dropout",
    "0.1",
    "--attention-dropout",
    "0.1",
)
RECIPE = (
    "--user-dir",
    str(Path(evomoe_plugin.__file__).parent),
    "--cpu",
    "--task",
    "language_modeling",
    "--sample-break-mode",
    "none",
    "--tokens-per-sample",
    str(CONTEXT),
    "--optimizer",
    "adam",
    "--adam-betas",
    "(0.9, 0.98)",
    "--weight-decay",
    "0.1",
    "--clip-norm",
    "1.0",
    "--lr-scheduler",
    "cosine",
    "--warmup-init-lr",
    "1e-7",
    "--num-workers",
    "0",
    "--disable-validation",
    "--no-epoch-checkpoints",
    "--no-save-optimizer-state",
    "--log-format",
    "json",
)
DENSE = ("--arch", "transformer_lm", "--decoder-normalize-before", "--criterion", "cross_entropy")
MOE = (
    "--arch",
    "transformer_lm_moe",
    "--criterion",
    "moe_cross_entropy",
    "--moe-gate-loss-combine-method",
    "sum",
    "--moe-gate-loss-wt",
    "0.01",
)
EXPERTS = ("--moe-freq", "2", "--moe-expert-count", "8")
TOP_K = (
    "--moe-gate",
    "top_k",
    "--moe-top-k-weights",
    "renormalized",
    # The same for any k; for k = 1 it equals the gate switch with balance.
    "--moe-aux",
    "switch=1",
)
TOP_2 = (*EXPERTS, *TOP_K, "--moe-top-k", "2")
# Parameters and compute of TOP_2: twice the experts of half the width.
HALVES = (
    "--moe-freq",
    "2",
    "--moe-expert-count",
    "16",
    "--moe-expert-size-factor",
    "2",
    *TOP_K,
    "--moe-top-k",
    "4",
)
SWITCH = (
    *EXPERTS,
    "--moe-gate",
    "switch",
    "--moe-aux",
    "balance=1",
    "--moe-capacity-factor",
    "2.0",
)
# Annealing takes its default length, 30 % of the updates after the spawn.
DENSE_TO_SPARSE = (
    *EXPERTS,
    "--moe-gate",
    "dense_to_sparse",
    "--moe-temperature-start",
    "2.0",
    "--moe-temperature-end",
    "0.3",
    "--moe-aux",
    "none",
)

SECOND_HALF = 1000
"""Added to the seed after the dense half, so that the text is read in another order."""


@dataclass(frozen=True)
class Run:
    """One training recipe."""

    options: tuple[str, ...]
    """Options of fairseq-train."""
    model: tuple[str, ...] = ()
    """MoE options, also passed to `evomoe upcycle`."""
    share: float = 1.0
    """Share of the updates in this run; the others are in `dense_half`."""
    upcycle: tuple[str, ...] | None = None
    """Options of `evomoe upcycle`; none: start from scratch, or continue `dense_half`."""
    spawns: float | None = None
    """Share of the updates before experts are spawned."""


def upcycled(*how: str, model: tuple[str, ...] = TOP_2) -> Run:
    """A run that upcycles the dense half with a method."""
    return Run((*MOE, *model), model, 0.5, how)


RUNS = {
    "dense_half": Run(DENSE, share=0.5),
    "dense": Run(DENSE),
    "dense_restarted": Run(DENSE, share=0.5),
    "moe": Run((*MOE, *TOP_2)),
    "switch": Run((*MOE, *SWITCH)),
    "dts": Run((*MOE, *DENSE_TO_SPARSE)),
    "upcycled_copy": upcycled("--method", "copy"),
    "upcycled_mask": upcycled("--method", "mask"),
    "upcycled_noise": upcycled("--method", "noise"),
    "upcycled_reinit": upcycled("--method", "reinit"),
    "upcycled_slice": upcycled("--method", "slice", "--rescale", model=HALVES),
    "evomoe": Run((*MOE, *DENSE_TO_SPARSE, "--moe-spawn-method", "mask"), spawns=0.1),
    "evomoe_half": Run((*MOE, *DENSE_TO_SPARSE, "--moe-spawn-method", "mask"), spawns=0.5),
}


@dataclass(frozen=True)
class Cost:
    """Cost of training, including the dense half."""

    updates: int = 0
    tokens: int = 0
    tera_flops: float = 0.0
    """Analytic matmul FLOPs, three forward passes per step."""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time of the process, without imports."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class Result:
    """The result of a run with a seed."""

    run: str
    seed: int
    perplexity: float
    """On the test split."""
    cost: Cost
    million_flops: float
    """Analytic forward FLOPs per token, at the end."""
    experts_per_token: float | None = None
    """Routed pairs per token, mean over layers, at the end; None: a dense model."""
    load_max: float | None = None
    """Largest load over the mean load, mean over layers, at the end."""
    upcycled_perplexity: float | None = None
    """On the test split, before the first update after upcycling."""

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a result written by `write`."""
        values = json.loads(path.read_text())
        return cls(**{**values, "cost": Cost(**values["cost"])})

    def write(self, path: Path) -> None:
        """Write JSON atomically."""
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1))
        unfinished.replace(path)


@dataclass(frozen=True)
class Study:
    """Folder of results, and shared settings."""

    folder: Path
    data: Path
    settings: dict[str, object]
    """As recorded in the results' folder."""
    done: dict[tuple[str, int], Result] = field(default_factory=dict)

    def check_settings(self) -> None:
        """Exit with the difference if the folder has results of other settings."""
        path = self.folder / "settings.json"
        if path.exists():
            before = json.loads(path.read_text())
            for name, value in self.settings.items():
                if before[name] != value:
                    sys.exit(
                        f"error: --folder {self.folder}: its results have {name} "
                        f"{before[name]}, not {value}; give this value, or another folder"
                    )
        else:
            path.write_text(json.dumps(self.settings, indent=1))

    def result(self, name: str, seed: int, log: Callable[[str], None] = print) -> Result:
        """The result of a run, which is trained if missing."""
        if (name, seed) not in self.done:
            path = self.folder / f"{name}-{seed}.json"
            if not path.exists():
                self._make(name, seed).write(path)
            self.done[name, seed] = result = Result.read(path)
            log(
                f"{name}, seed {seed}: perplexity {result.perplexity:.2f}, "
                f"{result.cost.cpu_seconds:.0f} CPU s"
            )
        return self.done[name, seed]

    def _make(self, name: str, seed: int) -> Result:
        run = RUNS[name]
        updates = round(run.share * self.settings["updates"])
        follows = run.upcycle is not None or name == "dense_restarted"
        before = self.result("dense_half", seed).cost if follows else Cost()
        start, start_perplexity = self._checkpoint("dense_half", seed) if follows else None, None
        saved = self._checkpoint(name, seed).parent
        if saved.exists():  # an interrupted run; resuming would lose its time
            shutil.rmtree(saved)
        saved.mkdir(parents=True)
        if run.upcycle is not None:
            start, start_perplexity = self._upcycle(run, seed, start, saved / "upcycled.pt")
        options = [
            *RECIPE,
            *SIZES,
            *run.options,
            "--max-update",
            str(updates),
            "--batch-size",
            str(self.settings["batch_size"]),
            "--lr",
            str(self.settings["lr"]),
            "--warmup-updates",
            str(updates // 10),
            "--log-interval",
            str(max(1, updates // 20)),
            "--seed",
            str(seed + SECOND_HALF * follows),
            "--save-dir",
            str(saved),
        ]
        if run.spawns is not None:
            options += ["--moe-spawn-updates", str(round(run.spawns * updates))]
        if start is not None:
            options += ["--finetune-from-model", str(start)]
        ended = fork(lambda: self._train(options), saved / "train.log")
        intervals = parse_log(ended.output.splitlines(), name).intervals
        if not intervals or intervals[-1].update != updates:
            sys.exit(f"error: {saved}/train.log: does not end with update {updates}")
        last = intervals[-1].values
        tokens, flops = self._work(intervals)
        return Result(
            run=name,
            seed=seed,
            perplexity=self._perplexity(self._checkpoint(name, seed)),
            cost=before
            + Cost(updates, tokens, flops / 1e12, ended.wall_seconds, ended.cpu_seconds),
            million_flops=last.get("mflops_per_token", self._dense_flops() / 1e6),
            experts_per_token=last.get("experts_per_token"),
            load_max=last.get("load_max"),
            upcycled_perplexity=start_perplexity,
        )

    def _checkpoint(self, name: str, seed: int) -> Path:
        return self.folder / "checkpoints" / f"{name}-{seed}" / "checkpoint_last.pt"

    def _train(self, options: list[str]) -> None:
        """Run fairseq-train; call in a separate process."""
        sys.argv = ["fairseq-train", str(self.data), *options]
        train.cli_main()

    def _perplexity(self, checkpoint: Path) -> float:
        """On the test split."""
        ended = fork(
            lambda: print(
                "perplexity", perplexity(str(checkpoint), str(self.data), "test", CONTEXT)
            ),
            checkpoint.with_suffix(".evaluated.log"),
        )
        return float(re.search(r"^perplexity ([\d.]+)$", ended.output, re.M).group(1))

    def _upcycle(self, run: Run, seed: int, dense: Path, path: Path) -> tuple[Path, float]:
        """The upcycled checkpoint, and its perplexity."""
        command = ["upcycle", str(dense), str(path), *run.upcycle, *run.model, "--seed", str(seed)]
        fork(lambda: evomoe(command), path.with_suffix(".log"))
        return path, self._perplexity(path)

    def _work(self, intervals: list[Record]) -> tuple[int, float]:
        """Tokens and FLOPs of a run."""
        tokens, flops, update = 0.0, 0.0, 0
        for record in intervals:
            in_interval = record.values["wpb"] * (record.update - update)
            per_token = record.values.get("mflops_per_token", self._dense_flops() / 1e6) * 1e6
            tokens += in_interval
            flops += 3 * per_token * in_interval
            update = record.update
        return round(tokens), flops

    def _dense_flops(self) -> int:
        """Forward FLOPs per token, as counted by `models/accounting.py`."""
        vocabulary = len(Dictionary.load(str(self.data / "dict.txt")))
        layer = 8 * WIDTH**2 + 4 * WIDTH * CONTEXT + 4 * WIDTH * FFN
        return LAYERS * layer + 2 * WIDTH * vocabulary


def spread(values: Iterable[float], digits: int) -> str:
    """Mean, and the sample standard deviation of two or more values."""
    values = list(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(by_run: dict[str, list[Result]]) -> str:
    """Markdown, one row per run, best perplexity first."""
    lines = [
        "| run | test perplexity | per seed | before the first update | experts per token "
        "| max/mean load | MFLOPs per token | total TFLOPs | min CPU s | min wall s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rs in sorted(
        by_run.items(), key=lambda item: statistics.mean(r.perplexity for r in item[1])
    ):
        cells = [
            name,
            spread((r.perplexity for r in rs), 2),
            ", ".join(f"{r.perplexity:.2f}" for r in rs),
        ]
        for attribute, digits in (
            ("upcycled_perplexity", 2),
            ("experts_per_token", 2),
            ("load_max", 2),
        ):
            known = [getattr(r, attribute) for r in rs]
            cells.append("–" if None in known else spread(known, digits))
        cells += [
            f"{statistics.mean(r.million_flops for r in rs):.2f}",
            f"{statistics.mean(r.cost.tera_flops for r in rs):.2f}",
            # Other programs can only add time.
            f"{min(r.cost.cpu_seconds for r in rs):.0f}",
            f"{min(r.cost.wall_seconds for r in rs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(by_run: dict[str, list[Result]], control: str) -> str:
    """Markdown: perplexity minus that of the control with the same seed."""
    base = {r.seed: r.perplexity for r in by_run[control]}
    lines = [f"| run | minus {control}, same seed | per seed |", "|---|---|---|"]
    rows = {
        name: [r.perplexity - base[r.seed] for r in rs if r.seed in base]
        for name, rs in by_run.items()
        if name not in (control, "dense_half")
    }
    for name, values in sorted(rows.items(), key=lambda item: statistics.mean(item[1])):
        lines.append(
            f"| {name} | {spread(values, 2)} | "
            + ", ".join(f"{value:+.2f}" for value in values)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run missing results sequentially, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs",
        nargs="+",
        default=list(RUNS),
        choices=RUNS,
        metavar="RUN",
        help=f"of {', '.join(RUNS)} (default: all)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--updates", type=int, default=400, help="total updates of each run")
    parser.add_argument("--batch-size", type=int, default=8, help=f"sequences of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of every run and half")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("evolution-study"),
        help="for data, checkpoints and results (default: evolution-study)",
    )
    parser.add_argument("--quick", action="store_true", help="small part of the text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.updates < 20 or args.updates % 20:
        parser.error(f"--updates {args.updates}: give a multiple of 20")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    folder = args.folder.absolute()
    data = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(
        folder,
        data,
        {
            "updates": args.updates,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "quick": args.quick,
            "threads": args.threads,
            "torch": torch.__version__,
        },
    )
    study.check_settings()
    prepare(data, args.quick)
    by_run: dict[str, list[Result]] = {name: [] for name in args.runs}
    for seed in args.seeds:
        for name in args.runs:
            by_run[name].append(study.result(name, seed, lambda line: print(line, flush=True)))
    tokens = max(r.cost.tokens for rs in by_run.values() for r in rs)
    print(
        f"\n{args.updates} updates, {tokens:,} tokens, {args.threads} threads, torch "
        f"{torch.__version__}, unigram model: {unigram_perplexity(data):.1f}\n"
    )
    print(table(by_run))
    for control in ("dense_restarted", "moe"):
        if control in by_run:
            print("\n" + paired(by_run, control))


if __name__ == "__main__":
    main()
