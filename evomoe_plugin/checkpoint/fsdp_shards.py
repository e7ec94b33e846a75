"""Checkpoints of `--use-sharded-state`: one file a rank, consolidated in memory."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from evomoe_plugin.config.errors import OptionError

SHARD = re.compile(r"-shard(\d+)\.pt$")


def shard_path(path: str, rank: int) -> str:
    """The file of one rank of the checkpoint `path`, which may itself be the file of a rank."""
    whole = SHARD.sub(".pt", path)
    return f"{whole.removesuffix('.pt')}-shard{rank}.pt"


def world_size(state: dict) -> int:
    """The number of ranks that wrote the checkpoint that `state` is (a shard of)."""
    return state["cfg"]["distributed_training"]["distributed_world_size"]


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
        OptionError: a file is missing, or they are of different updates.
    """
    first = load(shard_path(path, 0))
    count = world_size(first)
    paths = [shard_path(path, rank) for rank in range(count)]
    for rank, shard in enumerate(paths):
        if not os.path.exists(shard):
            raise OptionError("checkpoint", SHARD.sub(".pt", path),
                              f"shard {rank} of {count} is missing: {shard}")
    states = [first, *(load(shard) for shard in paths[1:])]
    updates = [state["optimizer_history"][-1]["num_updates"] for state in states]
    if len(set(updates)) > 1:
        raise OptionError("checkpoint", SHARD.sub(".pt", path),
                          "its shards are of different updates "
                          f"({', '.join(map(str, updates))}): take an earlier checkpoint")
    whole = dict(first)
    whole["model"] = _model(states)
    if first.get("last_optimizer_state"):
        whole["last_optimizer_state"] = _optimizer(states)
    return whole


def _model(states: list[dict]) -> dict[str, torch.Tensor]:
    first = states[0]["model"]
    weights: dict[str, torch.Tensor] = {}
    flat = set()
    for index, (path, key, parameter) in enumerate(flat_parameters(states[0])):
        flat.add(key)
        values = _split([state["model"][key] for state in states], states, index)
        for name, value in zip(parameter["names"], values, strict=True):
            weights[_join(path, name)] = value
    # What is not FSDP's is the same on all ranks: persistent buffers.
    weights.update((name, value) for name, value in first.items() if name not in flat)
    for module in states[0]["fsdp_metadata"]["param_metadata"]:
        for source, target in module["shared_param_info"]:
            path = module["fsdp_path"]
            weights[_join(path, target)] = weights[_join(path, source)]
    return weights


def _optimizer(states: list[dict]) -> dict[str, Any]:
    optimizers = [state["last_optimizer_state"] for state in states]
    whole = dict(optimizers[0], state={}, param_id_map={}, uncollected_local_ids=[])
    ids = itertools.count()
    for local, (_, key, parameter) in enumerate(flat_parameters(states[0])):
        if not key.split(".")[-1].startswith("flat_param_"):
            raise OptionError("not_fsdp_flatten_parameters", "in the checkpoint",
                              "the optimizer's state cannot be consolidated: resume as it was "
                              "written, or with --reset-optimizer")
        own = [next(ids) for _ in parameter["names"]]
        whole["param_id_map"].update(dict.fromkeys(own, local))
        for name, value in optimizers[0]["state"].get(local, {}).items():
            if torch.is_tensor(value) and value.dim() > 0:
                values = _split([o["state"][local][name] for o in optimizers], states, local)
            else:
                values = [value] * len(own)
            for i, part in zip(own, values, strict=True):
                whole["state"].setdefault(i, {})[name] = part
    whole["param_groups"] = [
        dict(optimizers[0]["param_groups"][0], params=list(whole["param_id_map"]))
    ]
    return whole


def _split(shards: list[torch.Tensor], states: list[dict], index: int) -> list[torch.Tensor]:
    """The parameters, or their moments, that the shards of a flat parameter hold together."""
    pieces = []
    for shard, state in zip(shards, states, strict=True):
        _, _, parameter = next(itertools.islice(flat_parameters(state), index, None))
        flat = shard.reshape(-1)
        pieces.append(flat[: flat.numel() - parameter["padding"]])
    whole = torch.cat(pieces).split(parameter["numels"])
    return [part.view(shape) for part, shape in zip(whole, parameter["shapes"], strict=True)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
