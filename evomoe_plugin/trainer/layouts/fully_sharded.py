"""`--ddp-backend fully_sharded`: fairscale's, with flat shards of each module's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fairscale.nn.data_parallel.fully_sharded_data_parallel import (
    TrainingState,
    get_fsdp_instances,
)
from fairseq.distributed import FullyShardedDataParallel

from evomoe_plugin.checkpoint.fsdp_shards import flat_parameters
from evomoe_plugin.checkpoint.optimizer_layout import OptimizerLayout
from evomoe_plugin.checkpoint.parameter_storage import Storage
from evomoe_plugin.trainer.layouts.sharded import Sharded


class FullySharded(Sharded):
    """Each rank has a shard of every FSDP module's flat parameter.

    Args:
        reads_own_shard: `--use-sharded-state`.
    """

    hidden_flags = ("bf16",)  # fairscale casts for --fp16
    has_fsdp_metadata = True

    def __init__(self, reads_own_shard: bool):
        self.reads_own_shard = reads_own_shard
        self.gathers_state = not reads_own_shard

    def abandon_pass(self, trainer: Any) -> None:
        for module in get_fsdp_instances(trainer.model):
            module.training_state = TrainingState.IDLE
            module._use_fp32_param_shard()  # a pass has put half precision in its place

    def storages(self, trainer: Any) -> Iterator[Storage]:
        modules = get_fsdp_instances(trainer.model)
        owners = [(p, module) for module in modules for p in module.params]
        metadata = flat_parameters({"fsdp_metadata": trainer.model.local_metadata_dict()})
        for (owner, module), (path, _, parameter) in zip(owners, metadata, strict=True):
            prefix = f"{path}." if path else ""
            yield Storage(
                owner,
                tuple(prefix + name for name in parameter["names"]),
                tuple(torch.Size(shape) for shape in parameter["shapes"]),
                module=module,
            )

    def optimizer_layout(self, trainer: Any) -> OptimizerLayout:
        kept = [storage for storage in self.storages(trainer) if storage.owner.requires_grad]
        return OptimizerLayout(
            tuple(name for storage in kept for name in storage.names),
            tuple(shape for storage in kept for shape in storage.shapes),
            tuple(n for n, storage in enumerate(kept) for _ in storage.names),
        )

    def parameter_names(self, trainer: Any) -> list[str]:
        return [name for storage in self.storages(trainer) for name in storage.names]

    def load_model(self, trainer: Any, weights: dict[str, Any]) -> None:
        if self.reads_own_shard:
            super().load_model(trainer, weights)
            return
        from fairscale.nn import data_parallel

        _add_heads(trainer.model, weights)
        # fairseq's subclass would send rank 0's weights, and so its experts, to all ranks.
        data_parallel.FullyShardedDataParallel.load_state_dict(trainer.model, weights, strict=True)

    def own_optimizer_state(self, trainer: Any, state: Any) -> Any:
        if self.reads_own_shard:
            return state
        return trainer.model.get_shard_from_optim_state_dict(state)


def _add_heads(model: Any, weights: dict[str, Any]) -> None:
    """Have a model with classification heads add new ones to pretrained weights.

    Without FSDP its `load_state_dict` does.
    """
    heads = (m for m in model.modules() if hasattr(m, "register_classification_head"))
    inner: Any = next((m for m in heads if not isinstance(m, FullyShardedDataParallel)), None)
    if inner is not None:
        with model.summon_full_params(recurse=False):
            inner.upgrade_state_dict(weights)
