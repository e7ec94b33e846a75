"""Summarise a checkpoint in a few lines."""

from __future__ import annotations

import math
import os

from evomoe_plugin.checkpoint import expert_files, fsdp_shards
from evomoe_plugin.checkpoint.checkpoint_file import MainFile
from evomoe_plugin.checkpoint.expert_shards import total_bytes
from evomoe_plugin.dispatch.sharded_layers import is_expert_parameter


def summary(main: MainFile) -> list[tuple[str, str]]:
    """Rows of a table: name and value."""
    tied = main.option("model", "share_decoder_input_output_embed")
    both = {"encoder", "decoder"} <= {name.partition(".")[0] for name in main.weights()}
    counts, experts, dtypes = [0, 0], {}, set()  # of weights: outside of experts, in experts
    for name, weight in main.weights().items():
        of_experts = is_expert_parameter(name)
        if of_experts:
            path = name.partition(".moe.experts.")[0].split(".")
            experts[f"{path[0]} layer {path[-1]}" if both else f"layer {path[-1]}"] = weight.shape[
                0
            ]
        is_buffer = name.endswith((".version", "._float_tensor")) or weight.dtype == "float64"
        if "float" in weight.dtype and not is_buffer:
            dtypes.add(weight.dtype)
            if not (tied and name.endswith("output_projection.weight")):
                counts[of_experts] += math.prod(weight.shape)
    layers = ", ".join(f"{count} in {layer}" for layer, count in experts.items())
    return [
        ("file", main.path),
        ("form", _form(main)),
        ("update", str(main.update)),
        ("architecture", str(main.option("model", "_name") or main.option("model", "arch"))),
        ("written by", _written_by(main)),
        ("weights", f"{sum(counts):,}, of experts {counts[True]:,}"),
        ("experts", layers or "none"),
        ("dtypes", ", ".join(sorted(dtypes)) + " (weights)"),
        ("optimizer state", _optimizer(main)),
        ("size", _sizes(main)),
    ]


def _has_file_per_rank(main: MainFile) -> bool:
    return bool(fsdp_shards.SHARD.search(main.path)) or not os.path.isfile(main.path)


def _form(main: MainFile) -> str:
    if main.manifest is not None:
        return f"experts in {main.manifest.size} files beside it ({main.manifest.tag})"
    if _has_file_per_rank(main):
        return f"--use-sharded-state, {fsdp_shards.world_size(main.state)} files"
    return "one file"


def _written_by(main: MainFile) -> str:
    count = main.option("distributed_training", "distributed_world_size") or 1
    backend = main.option("distributed_training", "ddp_backend")
    parts = [f"{count} rank{'s' if count != 1 else ''}"]
    if count != 1:
        parts.append(str(backend))
    size = main.option("model", "moe_expert_parallel_size") or 1
    if size != 1:
        parts.append(f"experts over {size}")
    return ", ".join(parts)


def _optimizer(main: MainFile) -> str:
    optimizer = main.state.get("last_optimizer_state")
    if not optimizer:
        return "no"
    name = main.option("optimizer", "_name") or "yes"
    count = sum(len(group["params"]) for group in optimizer["param_groups"])
    return f"{name}, {count} parameters"


def _sizes(main: MainFile) -> str:
    if _has_file_per_rank(main):
        count = fsdp_shards.world_size(main.state)
        return _mib(
            sum(os.path.getsize(fsdp_shards.shard_path(main.path, rank)) for rank in range(count))
        )
    size = os.path.getsize(main.path)
    if main.manifest is None:
        return _mib(size)
    held = sum(file.bytes for file in main.manifest.files)
    folder = os.path.basename(expert_files.of(main.path))
    return (
        f"{_mib(size + held)}, of it {_mib(held)} in {folder} "
        f"({_mib(total_bytes(main.manifest))} of tensors)"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
