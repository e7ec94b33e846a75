"""Editing parameters by name between updates, whichever way the run keeps them.

A parameter may be held once (fp32, memory-efficient half precision), twice (half precision with
fp32 masters, flat or one by one), or in pieces on all ranks (FSDP); and of experts a rank may hold
some only. What is edited is what the optimizer updates; half-precision copies follow, and moments
are edited and reset where asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.checkpoint.parameter_storage import Storage, storages
from evomoe_plugin.dispatch.sharded_layers import (
    all_gather_rows,
    expert_groups_of,
    is_expert_parameter,
)

Edit = Callable[[Tensor], Tensor]
"""Changes a whole parameter, all experts', given in fp32, in place. Returns a bool mask that
broadcasts to its shape: the elements whose moments are reset."""

MomentEdit = Callable[[Tensor], None]
"""Changes a whole moment, of the parameter's shape and in its own precision, in place; or means of
one over other dimensions than the first."""


@torch.no_grad()
def edit_parameters(
    trainer: Any, edits: Mapping[str, Edit], moment_edits: Mapping[str, MomentEdit] | None = None
) -> None:
    """Edit parameters, and set the optimizer's state of chosen elements to zero.

    All ranks must call it with the same edits; under FSDP they gather one flat parameter at a
    time, and of experts that are divided over ranks one parameter at a time. Moments are all state
    that has an element's place, as Adam's. Adafactor's means over rows and over columns are edited
    like moments, and not reset, since no element has a place in them; counts of steps stay.

    Args:
        trainer: fairseq's, between updates.
        edits: by the parameters' names in the checkpoint.
        moment_edits: for some of these names, what happens to each moment before any of it is
            reset. They change whole rows of a moment, which of Adafactor's means are the same.
    Raises:
        KeyError: a name is not that of a trained parameter.
    """
    optimizer = trainer.optimizer
    groups = expert_groups_of(trainer.get_model())
    unknown = set(edits)
    for storage in storages(trainer):
        wanted = [name for name in storage.names if name in edits]
        if wanted:
            unknown -= set(wanted)
            state = optimizer.optimizer.state.get(storage.owner, {})
            _edit_moments(storage, moment_edits or {}, state, groups)
            _edit_factors(storage, moment_edits or {}, state)
            _edit_storage(storage, edits, state, groups)
    if unknown:
        raise KeyError(f"no trained parameter: {', '.join(sorted(unknown))}")


def _edit_moments(
    storage: Storage, edits: Mapping[str, MomentEdit], state: Mapping[str, Any], groups: Any
) -> None:
    if not any(name in edits for name in storage.names):
        return
    for own in storage.moments(state).values():
        whole, start = storage.gathered(own)
        for name, shape, begin, end in storage.pieces():
            if name in edits:
                held = whole[begin:end].view(shape)
                value, rows = _all_experts(name, held, groups)
                edits[name](value)
                if value is not held:
                    held.copy_(value[rows])
        own.copy_(whole[start : start + own.numel()])


def _edit_factors(
    storage: Storage, edits: Mapping[str, MomentEdit], state: Mapping[str, Any]
) -> None:
    """Edit Adafactor's means of squared gradients over rows [E, ...] and over columns (arXiv
    1804.04235), which only parameters by themselves have, and never divided experts."""
    rows, columns = state.get("exp_avg_sq_row"), state.get("exp_avg_sq_col")
    (name, *others) = storage.names
    if rows is None or others or name not in edits:
        return
    before = rows.mean(0)
    edits[name](rows)
    if rows.dim() > 1:
        edits[name](columns)
    elif before > 0:
        # Of a matrix [E, F] the columns are means over experts, and of one mean with the rows.
        columns.mul_(rows.mean(0) / before)


def _edit_storage(
    storage: Storage, edits: Mapping[str, Edit], state: Mapping[str, Any], groups: Any
) -> None:
    own = storage.owner.data.view(-1)
    whole, start = storage.gathered(own)
    moments = storage.moments(state).values()
    for i, (name, shape, begin, end) in enumerate(storage.pieces()):
        if name not in edits:
            continue
        # A copy in any case: what is held may be of less precision.
        value, rows = _all_experts(
            name, whole[begin:end].view(shape).to(torch.float32, copy=True), groups)
        reset = edits[name](value).expand(value.shape)[rows]
        value = value[rows]
        if storage.copies:
            storage.copies[i].data.copy_(value)
        low, high = max(begin, start), min(end, start + own.numel())
        if low >= high:  # lies on other ranks
            continue
        own[low - start : high - start].copy_(value.reshape(-1)[low - begin : high - begin])
        reset = reset.reshape(-1)[low - begin : high - begin]
        for moment in moments:
            moment[low - start : high - start].masked_fill_(reset.to(moment.device), 0)
    if storage.module is not None and storage.module.has_full_params:
        storage.module._free_full_params()  # they are of before


def _all_experts(name: str, held: Tensor, groups: Any) -> tuple[Tensor, slice]:
    """The rows of all experts, and where those that are held here lie in them."""
    if groups is None or not is_expert_parameter(name):
        return held, slice(None)
    return all_gather_rows(held, groups), groups.own(groups.size * held.size(0))
