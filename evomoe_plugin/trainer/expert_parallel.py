"""Experts divided over processes, as fairseq's parallelisms must see them.

fairseq takes every parameter for one that all processes hold. Under `fully_sharded` the experts of
a layer get an FSDP instance over the processes that hold the same ones; the norm of the gradients,
summed over all ranks' shards, then counts each expert once. Under `legacy_ddp` their gradients are
averaged over those processes here, and the norm is put together.

Experts are divided in training alone. Evaluation in several processes gives them different numbers
of batches, and exchanges would wait for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.distributed.legacy_distributed_data_parallel import LegacyDistributedDataParallel
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from torch import Tensor, nn

from evomoe_plugin.checkpoint.optimizer_layout import trained_parameters
from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.dispatch.sharded_layers import sharded_layers
from evomoe_plugin.patches.patch import Patch, always, wrap
from evomoe_plugin.trainer.update_end import after_update


def divided_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Their experts' parameters; without FSDP only."""
    return [p for layer in sharded_layers(model) for p in layer.experts.parameters()]


def _all_reduce_grads(upstream: Callable, ddp: LegacyDistributedDataParallel) -> None:
    """Upstream takes parameters with this attribute out, and leaves their gradients as they are."""
    layers = sharded_layers(ddp.module)
    if ddp.accumulate_grads or not layers:
        upstream(ddp)
        return
    parameters = divided_parameters(ddp.module)
    for p in parameters:
        p.expert = True
    try:
        upstream(ddp)
    finally:
        for p in parameters:
            del p.expert
    group = layers[0].groups.replicas
    if group.size() == 1:
        return
    for p in parameters:
        if p.grad is not None:
            p.grad.div_(group.size())
            dist.all_reduce(p.grad, group=group)


def _clip_grad_norm(upstream: Callable, trainer: Trainer, clip_norm: float) -> Tensor:
    layers = sharded_layers(trainer.get_model())
    if trainer.is_fsdp or not layers:
        return upstream(trainer, clip_norm)
    group = layers[0].groups.exchange

    def norm_of_all(_own: Tensor) -> Tensor:
        common, divided = _squares(trainer)
        dist.all_reduce(divided, group=group)
        return (common + divided).sqrt()

    return trainer.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=norm_of_all)


def _squares(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Sums of squared gradients: of what all processes hold, and of this one's experts."""
    sums = [torch.zeros((), device=trainer.device) for _ in range(2)]
    for grad, is_divided in _gradients(trainer):
        sums[is_divided] += grad.float().norm() ** 2
    return sums[0], sums[1]


def _gradients(trainer: Trainer) -> Iterator[tuple[Tensor, bool]]:
    """The gradients that are about to be clipped, and whether they are of divided experts."""
    model_parameters = [p for _, p in trained_parameters(trainer)]
    divided = {id(p) for p in divided_parameters(trainer.get_model())}
    masters = getattr(trainer.optimizer, "fp32_params", model_parameters)
    if isinstance(masters, dict):  # all of them end to end, by device
        (flat,) = masters.values()
        parts = flat.grad.split([p.numel() for p in model_parameters])
        yield from ((part, id(p) in divided)
                    for part, p in zip(parts, model_parameters, strict=True))
        return
    for p, master in zip(model_parameters, masters, strict=True):
        if master.grad is not None:
            yield master.grad, id(p) in divided


def _step(upstream: Callable, trainer: Trainer, batches: Any, raise_oom: bool = False) -> Any:
    """A process without memory ends the run. Upstream's would leave the batch out, or begin it
    again, and its next exchange would meet what the others are waiting in."""
    is_divided = getattr(trainer.cfg.model, "moe_expert_parallel_size", 1) > 1
    return upstream(trainer, batches, raise_oom=raise_oom or is_divided)


def _log_waiting(trainer: Trainer) -> None:
    """How long this process waited for exchanges in the update that has ended."""
    meters = [layer.meter for layer in sharded_layers(trainer.get_model())]
    if meters:
        waited = sum(meter.seconds for meter in meters)
        metrics.log_scalar("ep_wait_ms", 1000 * waited, priority=1500, round=1)
    for meter in meters:
        meter.reset()


# Overrides of a checkpoint's options that give every rank all experts.
_UNSHARDED = {f.name: f.default for f in fields(MoEOptions)
              if f.name.startswith(("moe_expert_parallel_", "moe_ep_"))}


def _load_to_evaluate(
    upstream: Callable, filenames: Any, arg_overrides: dict[str, Any] | None = None, *args: Any,
    **kwargs: Any,
) -> Any:
    return upstream(filenames, {**(arg_overrides or {}), **_UNSHARDED}, *args, **kwargs)


@functools.cache
def apply() -> None:
    wrap(checkpoint_utils, "load_model_ensemble_and_task", _load_to_evaluate)
    wrap(LegacyDistributedDataParallel, "all_reduce_grads", _all_reduce_grads)
    wrap(Trainer, "clip_grad_norm", _clip_grad_norm)
    wrap(Trainer, "train_step", _step)
    wrap(Trainer, "valid_step", _step)
    after_update(_log_waiting)


PATCH = Patch(
    name="expert-parallel",
    broken="with experts divided over processes their gradients would be averaged as if all held "
           "the same, or not at all, the gradient norm would count this process's alone, and a "
           "process that leaves out a batch for which it has no memory would exchange the rows "
           "of another one",
    upstream="fairseq/distributed/legacy_distributed_data_parallel.py: all_reduce_grads; "
             "fairseq/trainer.py: clip_grad_norm, train_step, valid_step",
    remove_when="fairseq knows parameters that not all processes hold",
    needed=always("experts can be divided over processes"),
    apply=apply,
)
