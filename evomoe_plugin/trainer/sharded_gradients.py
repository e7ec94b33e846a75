"""Gradients of sharded experts: fairseq takes every parameter for one that all ranks hold.

Under `fully_sharded` the experts of a layer have an FSDP instance of their own, over the ranks
that hold the same ones; the gradient norm, summed over all ranks' shards, then counts each expert
once. Under `legacy_ddp` their gradients are averaged over those ranks here, and the norm is put
together from both kinds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evomoe_plugin.checkpoint.parameter_storage import trained_parameters
from evomoe_plugin.dispatch.process_groups import ExpertGroups
from evomoe_plugin.dispatch.sharded_layers import sharded_layers


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of sharded experts; without FSDP only."""
    return [p for layer in sharded_layers(model) for p in layer.experts.parameters()]


class ReplicaMeans:
    """The means of an update's gradients of sharded experts, over the ranks that hold the same ones
    (`legacy_ddp`); each in flight while the backward pass goes on.

    Args:
        parameters: of sharded experts; the same on all ranks of the group.
        group: the ranks.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup):
        self._parameters = parameters if group.size() > 1 else []
        self._group = group
        self._in_flight: dict[nn.Parameter, Any] = {}

    @contextlib.contextmanager
    def during_backward(self) -> Iterator[None]:
        """Inside, the mean of a gradient is begun once the backward pass has made it: for the last
        one of an update, which adds to a parameter's gradient once."""
        trained = [p for p in self._parameters if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(self._begin) for p in trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if parameter in self._in_flight:
            raise RuntimeError(
                "a gradient of sharded experts was added to while its mean is computed: the task "
                "makes several backward passes for a batch; give --ddp-backend fully_sharded"
            )
        parameter.grad.div_(self._group.size())
        self._in_flight[parameter] = dist.all_reduce(
            parameter.grad, group=self._group, async_op=True
        )

    def finish(self) -> None:
        """Begin what was not, and wait for all; on a GPU its stream waits."""
        for parameter in self._parameters:
            if parameter.grad is not None and parameter not in self._in_flight:
                self._begin(parameter)
        for work in self._in_flight.values():
            work.wait()
        self._in_flight.clear()  # they hold the gradients


def all_reduce_grads(trainer: Any, replicas: ReplicaMeans) -> None:
    """Average gradients over the ranks that hold the same parameters (`legacy_ddp`)."""
    parameters: list[Any] = sharded_parameters(trainer.get_model())
    for p in parameters:
        p.expert = True  # fairseq leaves the gradients of such parameters as they are
    try:
        trainer.optimizer.all_reduce_grads(trainer.model)
    finally:
        for p in parameters:
            del p.expert
    replicas.finish()


def grad_norm(trainer: Any, groups: ExpertGroups) -> Tensor:
    """The norm of the whole model's gradients, without FSDP. A collective."""
    sums = [torch.zeros((), device=trainer.device) for _ in range(2)]
    for grad, is_sharded in _gradients(trainer):
        sums[is_sharded] += grad.float().norm() ** 2
    common, sharded = sums
    dist.all_reduce(sharded, group=groups.exchange)
    return (common + sharded).sqrt()


def _gradients(trainer: Any) -> Iterator[tuple[Tensor, bool]]:
    """The gradients that are about to be clipped, and whether they are of sharded experts."""
    model_parameters = [p for _, p in trained_parameters(trainer)]
    sharded = {id(p) for p in sharded_parameters(trainer.get_model())}
    masters = getattr(trainer.optimizer, "fp32_params", model_parameters)
    if isinstance(masters, dict):  # all of them end to end, by device
        (flat,) = masters.values()
        parts = flat.grad.split([p.numel() for p in model_parameters])
        yield from (
            (part, id(p) in sharded) for part, p in zip(parts, model_parameters, strict=True)
        )
        return
    for p, master in zip(model_parameters, masters, strict=True):
        if master.grad is not None:
            yield master.grad, id(p) in sharded
