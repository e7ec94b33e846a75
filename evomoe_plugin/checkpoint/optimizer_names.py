"""The parameter names of an optimizer's entries in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evomoe_plugin.checkpoint.optimizer_layout import PARAMETER_NAMES, fsdp_layout
from evomoe_plugin.config.errors import OptionError


def make_plain(state: dict[str, Any]) -> None:
    """Change the state of a run under FSDP to that of one without, which every run can read: an
    entry of the optimizer's for each parameter, named in the order of `state["model"]`."""
    optimizer = state.get("last_optimizer_state") or {}
    if "param_id_map" in optimizer:
        named = fsdp_layout(state).by_name(optimizer)
        state[PARAMETER_NAMES] = names = [name for name in state["model"] if name in named]
        kept = {
            key: value
            for key, value in optimizer.items()
            if key not in ("param_id_map", "uncollected_local_ids")
        }
        state["last_optimizer_state"] = dict(
            kept,
            state={i: named[name] for i, name in enumerate(names)},
            param_groups=[dict(optimizer["param_groups"][0], params=list(range(len(names))))],
        )
    state.pop("fsdp_metadata", None)


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
    if not optimizer["state"]:
        return []
    wanted = [_shape(optimizer["state"].get(i, {})) for i in range(count)]
    given = [
        (name, value.shape) for name, value in state["model"].items() if value.is_floating_point()
    ]
    found = _first_fit(wanted, given)
    last = _first_fit(wanted[::-1], given[::-1])
    # Every other way in which shapes fit lies between the first and the last.
    if found is None or last is None or found != last[::-1]:
        raise OptionError(
            "checkpoint",
            path,
            "does not name the parameters of its optimizer's state: start a run "
            "from it instead, with --moe-expert-parallel-size and "
            "--moe-ep-checkpoint sharded",
        )
    return found


def _shape(entry: Mapping[str, Any]) -> torch.Size | None:
    return next(
        (value.shape for value in entry.values() if torch.is_tensor(value) and value.dim()), None
    )


def _first_fit(
    wanted: Sequence[torch.Size | None], given: Sequence[tuple[str, torch.Size]]
) -> list[str] | None:
    """Names of the first of `given` that have the shapes `wanted`, in order; None fits anything."""
    left, found = iter(given), []
    for want in wanted:
        name = next((name for name, shape in left if want in (None, shape)), None)
        if name is None:
            return None
        found.append(name)
    return found
