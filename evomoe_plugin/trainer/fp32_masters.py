"""Half-precision runs with fp32 masters go on from the masters, not from what rounding left."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.checkpoint.parameter_storage import storages
from evomoe_plugin.dispatch import expert_rows
from evomoe_plugin.dispatch.sharded_layers import expert_groups_of, is_expert_parameter
from evomoe_plugin.patches.patch import Patch, always, wrap


def masters(trainer: Trainer) -> dict[str, Tensor]:
    """What the optimizer updates in place of parameters in half precision, by their names in the
    checkpoint; views. Under FSDP fairscale sees to it."""
    found: dict[str, Tensor] = {}
    if trainer.is_fsdp:
        return found
    for storage in storages(trainer):
        if storage.copies:
            flat = storage.owner.data.view(-1)
            for name, shape, begin, end in storage.pieces():
                found[name] = flat[begin:end].view(shape)
    return found


def _state_dict(upstream: Callable, trainer: Trainer) -> dict[str, Any]:
    state = upstream(trainer)
    model = state["model"]
    # Parameters that are shared have several names.
    exact = {model[name].data_ptr(): master.clone()  # a file would hold the whole for every view
             for name, master in masters(trainer).items() if name in model and master.numel()}
    for name, value in model.items():
        model[name] = exact.get(value.data_ptr(), value)
    return state


def _load_checkpoint(upstream: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    common = trainer.cfg.common
    if trainer.is_fsdp or not (common.fp16 or common.bf16):
        return upstream(trainer, *args, **kwargs)
    with _exact_weights(trainer) as exact:
        result = upstream(trainer, *args, **kwargs)
    if exact:
        for name, master in masters(trainer).items():
            if name in exact:
                master.copy_(exact[name])
    return result


@contextlib.contextmanager
def _exact_weights(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    """What is loaded inside into parameters of less precision, by their names."""
    exact: dict[str, Tensor] = {}
    model, load = trainer.model, trainer.model.load_state_dict

    def remembering(state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = load(state, *args, **kwargs)
        groups = expert_groups_of(trainer.get_model())
        source = expert_rows.source.get()
        for name, parameter in trainer.get_model().named_parameters():
            value = state.get(name)
            divided = groups is not None and is_expert_parameter(name)
            rows = groups.own(groups.size * len(parameter)) if divided else slice(None)
            if value is None and divided and source is not None:
                value = source(name, rows)
            elif divided and value is not None:
                value = value[rows]
            if value is not None and value.dtype == torch.float32 != parameter.dtype:
                exact[name] = value
        return result

    model.load_state_dict = remembering
    try:
        yield exact
    finally:
        del model.load_state_dict


@functools.cache
def apply() -> None:
    wrap(Trainer, "state_dict", _state_dict)
    wrap(Trainer, "load_checkpoint", _load_checkpoint)


PATCH = Patch(
    name="exact-masters",
    broken="--fp16 and --bf16 lose what their fp32 masters have beyond half precision at each "
           "restart, so that a run does not go on as it would have",
    upstream="fairseq/trainer.py: state_dict saves the model in half precision alone",
    remove_when="checkpoints hold the masters",
    needed=always("resuming is exact"),
    apply=apply,
)
