"""Checkpoints of `--use-sharded-state`: one file a rank, consolidated in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.config.errors import OptionError

SHARD = re.compile(r"-shard(\d+)\.pt$")


def shard_path(path: str, rank: int) -> str:
    """The file of one rank of the checkpoint `path`, which may itself be the file of a rank."""
    whole = SHARD.sub(".pt", path)
    return f"{whole.removesuffix('.pt')}-shard{rank}.pt"


def world_size(state: dict) -> int:
    """The number of ranks that wrote the checkpoint that `state` is (a shard of)."""
    return state["cfg"]["distributed_training"]["distributed_world_size"]


def check_rank(state: dict, path: str) -> None:
    """Raise `OptionError` if the file of one rank holds the state of another."""
    found = SHARD.search(path)
    rank = state["cfg"]["distributed_training"]["distributed_rank"]
    if found is not None and int(found[1]) != rank:
        raise OptionError(
            "checkpoint", path, f"is shard {rank} under another's name: take another checkpoint"
        )


def flat_parameters(state: dict) -> Iterator[tuple[str, str, dict]]:
    """(path of its FSDP module, its name in the state dict, its metadata) of each FSDP parameter.

    The order is that of the optimizer.
    """
    for module in state["fsdp_metadata"]["param_metadata"]:
        for name, parameter in module["params"].items():
            yield module["fsdp_path"], _join(module["fsdp_path"], name), parameter


def consolidated(path: str, load: Callable[[str], dict]) -> dict:
    """The state of all shards, as one file for all ranks would hold it.

    Args:
        path: the file of any rank.
        load: reads one file.

    Raises:
        OptionError: a file is missing or another's, or they are of different updates.
    """
    first = load(shard_path(path, 0))
    count = world_size(first)
    paths, name = [shard_path(path, rank) for rank in range(count)], SHARD.sub(".pt", path)
    for rank, shard in enumerate(paths):
        if not os.path.exists(shard):
            raise OptionError("checkpoint", name, f"shard {rank} of {count} is missing: {shard}")
    states = [first, *(load(shard) for shard in paths[1:])]
    for state, shard in zip(states, paths, strict=True):
        check_rank(state, shard)
    updates = [state["optimizer_history"][-1]["num_updates"] for state in states]
    if len(set(updates)) > 1:
        numbers = ", ".join(map(str, updates))
        raise OptionError(
            "checkpoint",
            name,
            f"its shards are of different updates ({numbers}): take an earlier checkpoint",
        )
    try:
        whole = dict(first, model=_model(states))
        if first.get("last_optimizer_state"):
            whole["last_optimizer_state"] = _optimizer(states)
    except OptionError:
        raise
    except Exception as error:  # of shards whose names, shapes or kinds are not those of a run
        raise OptionError(
            "checkpoint", name, f"its shards do not fit together ({describe(error)})"
        ) from error
    return whole


def _model(states: list[dict]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    buffers = dict(states[0]["model"])  # not FSDP's, the same on all ranks
    for shards in zip(*map(flat_parameters, states), strict=True):
        path, key, parameter = shards[0]
        del buffers[key]
        values = _split([state["model"][key] for state in states], shards)
        for name, value in zip(parameter["names"], values, strict=True):
            weights[_join(path, name)] = value
    weights.update(buffers)
    # fairscale's `consolidate_shard_weights` does this for the last module alone.
    for module in states[0]["fsdp_metadata"]["param_metadata"]:
        for source, target in module["shared_param_info"]:
            path = module["fsdp_path"]
            weights[_join(path, target)] = weights[_join(path, source)]
    return weights


def _optimizer(states: list[dict]) -> dict[str, Any]:
    optimizers = [state["last_optimizer_state"] for state in states]
    whole = dict(optimizers[0], state={}, param_id_map={}, uncollected_local_ids=[])
    for local, shards in enumerate(zip(*map(flat_parameters, states), strict=True)):
        _, key, parameter = shards[0]
        if not key.split(".")[-1].startswith("flat_param_"):
            raise OptionError(
                "not_fsdp_flatten_parameters",
                "in the checkpoint",
                "the optimizer's state cannot be consolidated: resume as it was "
                "written, or with --reset-optimizer",
            )
        first = len(whole["param_id_map"])
        own = range(first, first + len(parameter["names"]))
        whole["param_id_map"].update(dict.fromkeys(own, local))
        for name, value in optimizers[0]["state"].get(local, {}).items():
            values = [value] * len(own)
            if torch.is_tensor(value) and value.dim() > 0:
                values = _split([o["state"][local][name] for o in optimizers], shards)
            for i, part in zip(own, values, strict=True):
                whole["state"].setdefault(i, {})[name] = part
    whole["param_groups"] = [
        dict(optimizers[0]["param_groups"][0], params=list(whole["param_id_map"]))
    ]
    return whole


def _split(
    values: list[torch.Tensor], shards: Sequence[tuple[str, str, dict]]
) -> list[torch.Tensor]:
    """The parameters, or their moments, that all ranks' shards of a flat parameter hold."""
    pieces = [
        value.reshape(-1)[: value.numel() - metadata["padding"]]
        for value, (_, _, metadata) in zip(values, shards, strict=True)
    ]
    _, _, first = shards[0]
    parts = torch.cat(pieces).split(first["numels"])
    return [part.view(shape) for part, shape in zip(parts, first["shapes"], strict=True)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
