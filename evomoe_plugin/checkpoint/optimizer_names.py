"""Which parameters the entries of an optimizer's state in a file are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evomoe_plugin.checkpoint.optimizer_layout import fsdp_layout
from evomoe_plugin.config.errors import OptionError

_REMEDY = ("start a run from it instead, with --moe-expert-parallel-size and --moe-ep-checkpoint "
           "sharded")


def plain_optimizer_state(path: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state with an entry for each parameter, in the order of `state["model"]`.

    Args:
        path: of the file, for messages.
        state: of a run without files of experts, whichever way it kept the optimizer's.
    Raises:
        OptionError: it does not say which entry is of which parameter.
    """
    optimizer = state["last_optimizer_state"]
    if "param_id_map" in optimizer:
        named = fsdp_layout(state).by_name(optimizer)
        names = [name for name in state["model"] if name in named]
        kept = {key: value for key, value in optimizer.items()
                if key not in ("param_id_map", "uncollected_local_ids")}
        groups = [dict(optimizer["param_groups"][0], params=list(range(len(names))))]
        return dict(kept, param_groups=groups,
                    state={i: named[name] for i, name in enumerate(names)})
    return optimizer


def optimizer_names(path: str, state: Mapping[str, Any]) -> list[str]:
    """Names of the entries of a `plain_optimizer_state`, by their order.

    A file lists parameters in the order of the optimizer, among buffers, second names and frozen
    ones. The names are those of the only way in which shapes fit.

    Raises:
        OptionError: there is more than one way, or none.
    """
    optimizer = state["last_optimizer_state"]
    count = sum(len(group["params"]) for group in optimizer["param_groups"])
    shapes = [_shape(optimizer["state"].get(i, {})) for i in range(count)]
    names = [name for name, value in state["model"].items() if value.is_floating_point()]
    if not optimizer["state"]:
        return []
    found = _only_way(shapes, [tuple(state["model"][name].shape) for name in names])
    if found is None:
        raise OptionError("checkpoint", path,
                          f"does not tell which parameters its optimizer's state is of: {_REMEDY}")
    return [names[i] for i in found]


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    for value in entry.values():
        if torch.is_tensor(value) and value.dim():
            return tuple(value.shape)
    return None


def _only_way(
    wanted: Sequence[tuple[int, ...] | None], given: Sequence[tuple[int, ...]]
) -> list[int] | None:
    """Places of `wanted` in `given`, in order, if there is one way only; None fits anything."""
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
