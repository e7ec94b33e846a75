"""Profile a training step by part of the model.

Updates of fairseq's trainer on tokens that its dataset reads from a file, under torch's profiler.
Every operation is attributed to the part of the model that called it; backward operations to the
part of their forward operation. Two settings are profiled in turn, round by round, in one process:
`before` with fairseq's attention, loss and adam, `after` with their replacements. Profiling slows
down small operations: compare parts with each other, not with seconds of other benchmarks.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary, iterators
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models import decoder as decoder_file
from evomoe_plugin.trainer.moe_trainer import MoETrainer

SETTINGS = {
    "before": ["--moe-attention", "stock", "--moe-vocab-chunk", 0, "--optimizer", "adam"],
    "after": ["--optimizer", "fused_adamw"],
}
MARK, BACKWARD = "part: ", "autograd::engine::evaluate_function"
PARTS = (
    "gate",
    "sort",
    "gather",
    "matmul",
    "activation",
    "combine",
    "experts, other",
    "dense FFN",
    "attention",
    "norms",
    "vocabulary",
    "optimizer",
    "data",
    "other",
)
# Within an MoE layer parts are distinguished by operation.
OPERATIONS = {
    "matmul": (
        "mm",
        "addmm",
        "addmm_",
        "bmm",
        "baddbmm",
        "baddbmm_",
        "_grouped_mm",
        "_scaled_grouped_mm",
    ),
    "sort": ("sort", "argsort", "topk", "bincount", "nonzero"),
    "gather": ("index_select", "index", "gather", "take"),
    "combine": (
        "index_add_",
        "index_add",
        "scatter_add_",
        "scatter_add",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "embedding_bag",
        "index_put_",
        "_index_put_impl_",
    ),
    "activation": (
        "gelu",
        "gelu_backward",
        "relu",
        "silu",
        "silu_backward",
        "sigmoid",
        "threshold_backward",
    ),
}
PART_OF_OPERATION = {f"aten::{name}": part for part, names in OPERATIONS.items() for name in names}


class Subject:
    """A run."""

    def __init__(self, args: argparse.Namespace, data: str, setting: list[Any]):
        torch.manual_seed(0)
        given = list(
            map(
                str,
                [
                    data,
                    "--task",
                    "language_modeling",
                    "--arch",
                    "transformer_lm_moe",
                    "--decoder-layers",
                    args.layers,
                    "--decoder-embed-dim",
                    args.width,
                    "--decoder-ffn-embed-dim",
                    args.ffn,
                    "--decoder-attention-heads",
                    args.heads,
                    "--dropout",
                    args.dropout,
                    "--attention-dropout",
                    args.dropout,
                    "--share-decoder-input-output-embed",
                    "--activation-fn",
                    "gelu",
                    "--tokens-per-sample",
                    args.length,
                    "--batch-size",
                    args.batch,
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
                    "--criterion",
                    "moe_cross_entropy",
                    "--moe-freq",
                    1,
                    "--moe-expert-count",
                    args.experts,
                    "--moe-gate",
                    "top_k",
                    *args.precision,
                    *setting,
                    *args.given,
                ],
            )
        )
        with mock.patch("sys.argv", ["fairseq-train", *given]):
            parsed = options.parse_args_and_arch(options.get_training_parser(), given)
        cfg = convert_namespace_to_omegaconf(parsed)
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model)
        self.criterion = task.build_criterion(cfg.criterion)
        self.trainer = MoETrainer(cfg, task, model, self.criterion)
        self.trainer.lr_step_begin_epoch(1)
        epoch = self.trainer.get_train_iterator(epoch=1)
        self.batches = iter(iterators.GroupedIterator(epoch.next_epoch_itr(shuffle=True), 1))
        mark(model, self.trainer, self.criterion)

    def step(self) -> None:
        """Load a batch and train on it."""
        with record_function(MARK + "data"):
            samples = next(self.batches)
        with record_function(MARK + "other"):
            self.trainer.train_step(samples)


def marked(function: Callable, part: str) -> Callable:
    """`function`, with its operations attributed to `part`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + part):
            return function(*args, **kwargs)

    return wrapper


def mark(model: nn.Module, trainer: MoETrainer, criterion: nn.Module) -> None:
    """Mark the parts of the model for the profiler."""
    decoder = model.decoder
    for module in decoder.modules():
        part = {MoELayer: "experts, other", nn.LayerNorm: "norms"}.get(type(module))
        if part is not None:
            module.forward = marked(module.forward, part)
        if isinstance(module, MoELayer):
            module.gate.forward = marked(module.gate.forward, "gate")
    for layer in decoder.layers:
        layer.self_attn.forward = marked(layer.self_attn.forward, "attention")
        for name in ("fc1", "fc2"):
            dense = getattr(layer, name, None)
            if dense is not None:
                dense.forward = marked(dense.forward, "dense FFN")
    decoder.output_layer = marked(decoder.output_layer, "vocabulary")
    criterion.compute_loss = marked(criterion.compute_loss, "vocabulary")
    for owner, name, part in (
        (trainer.optimizer, "step", "optimizer"),
        (trainer, "clip_grad_norm", "optimizer"),
        (trainer, "zero_grad", "optimizer"),
        (trainer, "_prepare_sample", "data"),
    ):
        setattr(owner, name, marked(getattr(owner, name), part))


def ancestors(event: Any) -> Iterator[Any]:
    """The event and its callers, innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent


def by_part(events: list[Any], on_gpu: bool) -> Counter[str]:
    """Milliseconds per part."""
    events = sorted(events, key=lambda event: event.time_range.start)
    parts_of_forward: dict[int, str] = {}
    milliseconds: Counter[str] = Counter()
    for event in events:
        part, backward = "other", False
        for caller in ancestors(event):
            if caller.name.startswith(BACKWARD):
                part, backward = parts_of_forward.get(caller.sequence_nr, part), True
                break
            if caller.name.startswith(MARK):
                part = caller.name.removeprefix(MARK)
                break
        if not backward and event.sequence_nr >= 0:
            # Operations without gradient share the sequence number of the next one with it.
            parts_of_forward[event.sequence_nr] = part
        if part == "experts, other" or (
            part == "gate" and PART_OF_OPERATION.get(event.name) == "sort"
        ):
            part = PART_OF_OPERATION.get(event.name, part)
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        milliseconds[part] += spent / 1e3
    return milliseconds


def write_data(folder: str, args: argparse.Namespace) -> None:
    """Random tokens in the format of `fairseq-preprocess`, enough for all steps."""
    dictionary = Dictionary()
    for n in range(args.vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{n}")
    dictionary.save(str(Path(folder) / "dict.txt"))
    path = str(Path(folder) / "train")
    builder = MMapIndexedDatasetBuilder(f"{path}.bin", dtype=np.int32)
    generator = torch.Generator().manual_seed(1)
    for _ in range((args.rounds + 2) * args.batch):
        builder.add_item(torch.randint(4, args.vocabulary, (args.length,), generator=generator))
    builder.finalize(f"{path}.idx")


def main() -> None:
    """Print the table; write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--vocabulary", "--symbols", type=int, default=8192)
    parser.add_argument("--dropout", type=float, default=0.0, help="also of attention")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precision",
        nargs="*",
        default=["--cpu"],
        metavar="OPTION",
        help="fairseq's precision flags, such as ' --bf16'; --cpu: fp32 on the CPU",
    )
    parser.add_argument(
        "--given",
        nargs="*",
        default=[],
        metavar="OPTION",
        help="further options of fairseq-train for both, such as ' --moe-top-k' 1",
    )
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    args.precision = [option.strip() for option in args.precision]
    args.given = [option.strip() for option in args.given]
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available() and "--cpu" not in args.precision
    decoder_file.vocabulary_loss = marked(decoder_file.vocabulary_loss, "vocabulary")

    times: dict[str, list[Counter[str]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, args)
        subjects = {name: Subject(args, folder, given) for name, given in SETTINGS.items()}
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        for round_ in range(args.rounds + 1):
            for name, subject in subjects.items():
                if not round_:  # warm-up
                    subject.step()
                    continue
                with profile(activities=activities) as profiler:
                    subject.step()
                    if on_gpu:
                        torch.cuda.synchronize()
                times[name].append(by_part(list(profiler.events()), on_gpu))

    table = {
        name: {part: statistics.median(taken[part] for taken in rounds) for part in PARTS}
        for name, rounds in times.items()
    }
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {args.threads} threads"
    print(
        f"B={args.batch} length={args.length} layers={args.layers} D={args.width} F={args.ffn} "
        f"E={args.experts} V={args.vocabulary} dropout={args.dropout}, "
        f"{' '.join(args.precision + args.given)}, {device}, torch {torch.__version__}, medians "
        f"of {args.rounds} rounds\n"
    )
    print("| part | before, ms | share | after, ms | share | after / before |")
    print("|---|---|---|---|---|---|")
    sums = {name: sum(parts.values()) for name, parts in table.items()}
    for part in PARTS:
        before, after = table["before"][part], table["after"][part]
        ratio = f"{after / before:.2f}" if before > 0 else "–"
        print(
            f"| {part} | {before:.2f} | {before / sums['before']:.1%} | {after:.2f} "
            f"| {after / sums['after']:.1%} | {ratio} |"
        )
    print(
        f"| all | {sums['before']:.2f} | | {sums['after']:.2f} | "
        f"| {sums['after'] / sums['before']:.2f} |"
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {
                    "arguments": vars(args),
                    "device": device,
                    "torch": torch.__version__,
                    "milliseconds": table,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
