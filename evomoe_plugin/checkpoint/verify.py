"""Verify a checkpoint file: hashes, names, shapes, NaN/Inf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from evomoe_plugin.checkpoint.checkpoint_file import MainFile
from evomoe_plugin.checkpoint.expert_shards import (
    MODEL,
    OPTIMIZER,
    ExpertShards,
    Manifest,
    with_experts,
)
from evomoe_plugin.checkpoint.load import nan_or_inf
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import expert_slots, moe_layer_indices
from evomoe_plugin.config.options import ModelOptions, MoEOptions, stack_kind
from evomoe_plugin.config.stacks import stacks
from evomoe_plugin.dispatch.sharded_layers import is_expert_parameter


def faults(main: MainFile) -> Iterator[str]:
    """One line for each fault: altered expert files, wrong names or shapes, NaN/Inf.

    That the main file is what was written was verified when it was read.
    """
    yield from nan_or_inf(main.state["model"])
    optimizer = main.state.get("last_optimizer_state") or {"state": {}}
    for i, entry in optimizer["state"].items():
        for fault in nan_or_inf(entry):
            yield f"the optimizer's state of parameter {i}: {fault}"
    yield from _faults_of_layers(main)
    if main.manifest is not None:
        yield from _faults_of_shards(main, main.manifest, optimizer)


def _faults_of_layers(main: MainFile) -> Iterator[str]:
    """Compare the experts with the run's options."""
    if main.option("model", "moe_expert_count") is None:
        return
    saved = main.state["cfg"]["model"]  # the gate's options are among them
    defaults = MoEOptions() if "encoder_layers" in saved else ModelOptions()
    parts = stacks(cast(ModelOptions, SimpleNamespace(**{**vars(defaults), **saved})))
    wanted = {}
    for part in parts:
        indices = moe_layer_indices(part, part.decoder_layers)
        for layer, count in zip(indices, expert_slots(part, len(indices)), strict=True):
            wanted[stack_kind(part), layer] = count
    found: dict[tuple[str, int], set[int]] = {}
    for name, weight in main.weights().items():
        if is_expert_parameter(name):
            path = name.partition(".moe.experts.")[0].split(".")
            found.setdefault((path[0], int(path[-1])), set()).add(weight.shape[0])
    for kind, layer in sorted(wanted.keys() | found.keys()):
        label = f"{kind} layer {layer}" if len(parts) > 1 else f"layer {layer}"
        counts, expected = found.get((kind, layer)), wanted.get((kind, layer))
        if counts is None:
            yield f"has no experts of {label}"
        elif expected is None:
            yield f"has experts of {label}, which by its options is no MoE layer"
        elif counts != {expected}:
            yield (
                f"has {', '.join(map(str, sorted(counts)))} experts in {label}, "
                f"its options say {expected}"
            )


def _faults_of_shards(
    main: MainFile, manifest: Manifest, optimizer: Mapping[str, Any]
) -> Iterator[str]:
    if manifest.update != main.update:
        yield f"is of update {main.update}, its experts are of update {manifest.update}"
    try:
        with_experts(main.state["model"], dict.fromkeys(manifest.weights()))
    except OptionError as error:
        yield error.arguments[2]
    for name, entry in manifest.optimizer.items():
        if entry.index in optimizer["state"]:
            yield f"has the optimizer's state of {name} twice"
        for moment in manifest.moments(name):
            shape = manifest.tensors[f"{OPTIMIZER}/{name}/{moment}"].shape
            weight = manifest.tensors.get(f"{MODEL}/{name}")
            if weight is None or weight.shape != shape:
                yield f"has {moment} of {name} of shape {shape}, not that of the weight"
    shards = ExpertShards(main.path, manifest, check=False)
    whole = list(shards.faults_of_folder())
    yield from whole
    for rank, file in enumerate(manifest.files):
        if any(file.name in fault for fault in whole):
            continue
        found = list(shards.faults_of_file(rank))
        yield from found
        if not found:
            for key in manifest.tensors:
                for fault in nan_or_inf({key: shards.rows_of_file(key, rank)}):
                    yield f"{file.name}: {fault}"
