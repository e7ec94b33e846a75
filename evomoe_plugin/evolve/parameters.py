"""Edit parameters by name between updates, in every layout of a run.

A parameter may be stored once (fp32, memory-efficient half precision), twice (half precision with
fp32 masters, flat or per parameter) or sharded (FSDP, sharded experts). The edit applies to what
the optimizer updates; half-precision copies follow, moments are edited and reset on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.checkpoint.parameter_storage import Storage
from evomoe_plugin.dispatch.process_groups import ExpertGroups
from evomoe_plugin.dispatch.sharded_layers import (
    all_gather_rows,
    expert_groups_of,
    is_expert_parameter,
)

Edit = Callable[[Tensor], Tensor]
"""Changes a whole parameter in place, given in fp32 with all experts. Returns a bool mask that
broadcasts to its shape: the elements whose moments are reset."""

MomentEdit = Callable[[Tensor], None]
"""Changes a whole moment in place, of the parameter's shape and in its own dtype; or its means over
dimensions other than the first."""


@torch.no_grad()
def edit_parameters(
    trainer: Trainer,
    edits: Mapping[str, Edit],
    moment_edits: Mapping[str, MomentEdit] | None = None,
) -> None:
    """Edit parameters, and zero the optimizer state of chosen elements.

    A collective: all ranks call it with the same edits. They gather one flat parameter at a time
    under FSDP, one parameter at a time of sharded experts. Moments are all elementwise state, as
    Adam's. Adafactor's row and column means are edited like moments but not reset, since they have
    no single elements; step counts stay.

    Args:
        trainer: between updates.
        edits: by parameter names as in the checkpoint.
        moment_edits: for some of these names, an edit of each moment before any reset. They change
            whole rows (experts), which Adafactor's means have too.
    Raises:
        KeyError: not the name of a trained parameter.
    """
    groups = expert_groups_of(trainer.get_model())
    unknown = set(edits)
    for storage in trainer.layout.storages(trainer):
        wanted = unknown.intersection(storage.names)
        if wanted:
            unknown -= wanted
            state = trainer.optimizer.optimizer.state.get(storage.owner, {})
            if moment_edits and not wanted.isdisjoint(moment_edits):
                _edit_moments(storage, moment_edits, state, groups)
                _edit_factors(storage, moment_edits, state)
            _edit_storage(storage, edits, state, groups)
    if unknown:
        raise KeyError(f"no trained parameter: {', '.join(sorted(unknown))}")


def _edit_moments(
    storage: Storage,
    edits: Mapping[str, MomentEdit],
    state: Mapping[str, Any],
    groups: ExpertGroups | None,
) -> None:
    for own in storage.moments(state).values():
        whole, start = storage.gathered(own)
        for name, shape, begin, end in storage.pieces():
            if name in edits:
                held = whole[begin:end].view(shape)
                value, rows = _all_experts(name, held, groups)
                edits[name](value)
                held.copy_(value[rows])
        own.copy_(whole[start : start + own.numel()])


def _edit_factors(
    storage: Storage, edits: Mapping[str, MomentEdit], state: Mapping[str, Any]
) -> None:
    """Edit Adafactor's row [E, ...] and column means of squared gradients (arXiv 1804.04235); never
    of flat parameters or sharded experts."""
    rows, columns = state.get("exp_avg_sq_row"), state.get("exp_avg_sq_col")
    (name, *others) = storage.names
    if rows is None or columns is None or others:
        return
    before = rows.mean(0)
    edits[name](rows)
    if rows.dim() > 1:
        edits[name](columns)
    elif before > 0:
        # Of a matrix [E, F] the columns are means over experts, with the same mean as the rows.
        columns.mul_(rows.mean(0) / before)


def _edit_storage(
    storage: Storage,
    edits: Mapping[str, Edit],
    state: Mapping[str, Any],
    groups: ExpertGroups | None,
) -> None:
    own = storage.owner.data.view(-1)
    whole, start = storage.gathered(own)
    reset_N = torch.zeros(whole.shape, dtype=torch.bool, device=whole.device)
    for i, (name, shape, begin, end) in enumerate(storage.pieces()):
        if name not in edits:
            continue
        # Always a copy: the stored dtype may be lower.
        value, rows = _all_experts(
            name, whole[begin:end].view(shape).to(torch.float32, copy=True), groups
        )
        reset_N[begin:end] = edits[name](value).expand(value.shape)[rows].reshape(-1)
        whole[begin:end] = value[rows].reshape(-1)
        if storage.copies:
            storage.copies[i].data.copy_(value[rows])
    here = slice(start, start + own.numel())
    own.copy_(whole[here])
    for moment in storage.moments(state).values():
        moment.masked_fill_(reset_N[here].to(moment.device), 0)
    if storage.module is not None and storage.module.has_full_params:
        storage.module._free_full_params()  # stale


def _all_experts(name: str, held: Tensor, groups: ExpertGroups | None) -> tuple[Tensor, slice]:
    """The rows of all experts, and the slice of them that this rank holds."""
    if groups is None or not is_expert_parameter(name):
        return held, slice(None)
    return all_gather_rows(held, groups), groups.own(groups.size * held.size(0))
