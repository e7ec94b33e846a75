"""The parameter names of an optimizer's entries in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evomoe_plugin.checkpoint.optimizer_layout import PARAMETER_NAMES, fsdp_layout
from evomoe_plugin.config.errors import OptionError

_REMEDY = ("start a run from it instead, with --moe-expert-parallel-size and --moe-ep-checkpoint "
           "sharded")


def make_optimizer_plain(state: dict[str, Any]) -> None:
    """Change the optimizer's state of a run under FSDP to an entry for each parameter, named in the
    order of `state["model"]`, as a run without FSDP writes it and every run can read."""
    optimizer = state["last_optimizer_state"]
    if "param_id_map" not in optimizer:
        return
    named = fsdp_layout(state).by_name(optimizer)
    state[PARAMETER_NAMES] = names = [name for name in state["model"] if name in named]
    kept = {key: value for key, value in optimizer.items()
            if key not in ("param_id_map", "uncollected_local_ids")}
    state["last_optimizer_state"] = dict(
        kept, state={i: named[name] for i, name in enumerate(names)},
        param_groups=[dict(optimizer["param_groups"][0], params=list(range(len(names))))])


def optimizer_names(path: str, state: Mapping[str, Any]) -> list[str]:
    """Names of the entries of an optimizer's state without FSDP, by their order.

    Files of fairseq, and those of before entries were saved with names, list parameters in the
    order of the optimizer, among buffers, second names and frozen ones. There, the names are those
    of the only way in which shapes fit.

    Raises:
        OptionError: there is more than one way, or none.
    """
    if PARAMETER_NAMES in state:
        return list(state[PARAMETER_NAMES])
    optimizer = state["last_optimizer_state"]
    count = sum(len(group["params"]) for group in optimizer["param_groups"])
    shapes = [_shape(optimizer["state"].get(i, {})) for i in range(count)]
    names = [name for name, value in state["model"].items() if value.is_floating_point()]
    if not optimizer["state"]:
        return []
    found = _only_way(shapes, [tuple(state["model"][name].shape) for name in names])
    if found is None:
        raise OptionError("checkpoint", path,
                          "does not name the parameters of its optimizer's state: " + _REMEDY)
    return [names[i] for i in found]


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    for value in entry.values():
        if torch.is_tensor(value) and value.dim():
            return tuple(value.shape)
    return None


def _only_way(
    wanted: Sequence[tuple[int, ...] | None], given: Sequence[tuple[int, ...]]
) -> list[int] | None:
    """Positions of `wanted` in `given`, in order, if they are unique; None fits anything."""
    def fits(i: int, j: int) -> bool:
        return wanted[i] is None or wanted[i] == given[j]

    # ways[i][j]: of the wanted from the i-th on among the given from the j-th on; 2 is many.
    ways = [[0] * (len(given) + 1) for _ in wanted] + [[1] * (len(given) + 1)]
    for i in reversed(range(len(wanted))):
        for j in reversed(range(len(given))):
            ways[i][j] = min(2, ways[i][j + 1] + (ways[i + 1][j + 1] if fits(i, j) else 0))
    if ways[0][0] != 1:
        return None
    places, j = [], 0
    for i in range(len(wanted)):
        while not (fits(i, j) and ways[i + 1][j + 1]):
            j += 1
        places.append(j)
        j += 1
    return places
