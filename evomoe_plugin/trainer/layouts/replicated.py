"""One process, and the backends of DDP's kind: every rank has all parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from evomoe_plugin.checkpoint.optimizer_layout import OptimizerLayout
from evomoe_plugin.checkpoint.parameter_storage import Storage, trained_parameters
from evomoe_plugin.dispatch.sharded_layers import expert_groups_of
from evomoe_plugin.trainer import sharded_gradients
from evomoe_plugin.trainer.layouts.layout import Layout, is_checkpointed
from evomoe_plugin.trainer.sharded_gradients import ReplicaMeans


class Replicated(Layout):
    """Every rank has all parameters, but for sharded experts (`--moe-expert-parallel-size`)."""

    is_fully_sharded = False

    _replicas: ReplicaMeans  # of this update, with sharded experts

    def reducing(self, trainer: Any) -> contextlib.AbstractContextManager[Any]:
        model = trainer.get_model()
        groups = expert_groups_of(model)
        if groups is None:
            return contextlib.nullcontext()
        parameters = sharded_gradients.sharded_parameters(model)
        self._replicas = ReplicaMeans(parameters, groups.replicas)
        if is_checkpointed(model):
            return contextlib.nullcontext()  # a layer may add to its gradients more than once
        return self._replicas.during_backward()

    def all_reduce_grads(self, trainer: Any) -> None:
        if expert_groups_of(trainer.get_model()) is None:
            trainer.optimizer.all_reduce_grads(trainer.model)
        else:
            sharded_gradients.all_reduce_grads(trainer, self._replicas)

    def norm_over_ranks(self, trainer: Any) -> Callable[[Tensor], Tensor] | None:
        groups = expert_groups_of(trainer.get_model())
        if groups is None:
            return None
        return lambda _norm_of_this_rank: sharded_gradients.grad_norm(trainer, groups)

    def storages(self, trainer: Any) -> Iterator[Storage]:
        parameters = trained_parameters(trainer)
        masters = getattr(trainer.optimizer, "fp32_params", None)
        if isinstance(masters, dict):  # by device
            if len(masters) > 1:
                raise NotImplementedError("parameters cannot be found with pipeline parallelism")
            yield Storage(
                next(iter(masters.values())),
                tuple(name for name, _ in parameters),
                tuple(p.shape for _, p in parameters),
                copies=tuple(p for _, p in parameters),
            )
            return
        if masters is None:
            masters = [None] * len(parameters)
        for (name, p), master in zip(parameters, masters, strict=True):
            if master is None:
                yield Storage(p, (name,), (p.shape,))
            else:
                yield Storage(master, (name,), (p.shape,), copies=(p,))

    def fp32_masters(self, trainer: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for storage in self.storages(trainer):
            if storage.copies:
                flat = storage.owner.data.view(-1)
                for name, shape, begin, end in storage.pieces():
                    found[name] = flat[begin:end].view(shape)
        return found

    def optimizer_layout(self, trainer: Any) -> OptimizerLayout:
        common = trainer.cfg.common
        return dataclasses.replace(
            super().optimizer_layout(trainer),
            is_flat=common.fp16
            and not common.memory_efficient_fp16
            and not common.fp16_no_flatten_grads,
        )

    def own_optimizer_state(self, trainer: Any, state: Any) -> Any:
        if trainer.cfg.distributed_training.zero_sharding == "os":
            return trainer.optimizer.broadcast_global_state_dict(state)
        return state
