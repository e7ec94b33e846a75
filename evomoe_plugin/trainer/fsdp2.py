"""`--ddp-backend fsdp2`: training with torch's `fully_shard`, parameter by parameter.

Each rank keeps its rows of every parameter in fp32, and of their gradients and the optimizer's
state; a module's parameters are gathered for its passes, in the dtype of `--bf16` or `--fp16`, and
gradients reduce-scattered in it. The optimizer gets plain tensors, views of this rank's rows: it
updates the weights that the next pass gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairseq import optim
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from evomoe_plugin.checkpoint.row_shards import own_rows, take_rows
from evomoe_plugin.dispatch.sharded_layers import sharded_layers


def shard(model: nn.Module, cfg: Any, device_type: str) -> None:
    """Shard the parameters of `model` over all ranks, those of sharded experts over their replicas.

    Layers are gathered one at a time if they have `--min-params-to-wrap` parameters or activations
    are checkpointed; what is left is gathered with the whole model.

    Args:
        model: whole and the same on every rank.
        cfg: fairseq's configuration.
        device_type: that the ranks train on.
    """
    parallel, options = cfg.distributed_training, cfg.model

    def mesh(group: Any) -> DeviceMesh:
        return DeviceMesh.from_group(group, device_type)

    given = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype(cfg),
            reduce_dtype=torch.float32 if parallel.fp32_reduce_scatter else None,
            cast_forward_inputs=False,
        ),
        # None: all but the last, whose backward pass comes first.
        "reshard_after_forward": False if parallel.no_reshard_after_forward else None,
    }
    for moe in sharded_layers(model):
        fully_shard(moe.experts, mesh=mesh(moe.groups.replicas), **given)
    least = (
        0
        if getattr(options, "checkpoint_activations", False)
        else getattr(options, "min_params_to_wrap", 0)
    )
    everyone = mesh(dist.group.WORLD)
    for layer in _layers(model):
        if sum(p.numel() for p in layer.parameters()) >= least:
            fully_shard(layer, mesh=everyone, **given)
    fully_shard(model, mesh=everyone, **given)
    dtype = compute_dtype(cfg)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if dtype is not None and buffer.is_floating_point():  # as fairseq casts whole models
                setattr(module, name, buffer.to(dtype))
        if next(module.parameters(recurse=False), None) is not None:
            module.register_load_state_dict_pre_hook(take_rows)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of encoders and decoders."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            yield from layers


def compute_dtype(cfg: Any) -> torch.dtype | None:
    """Of gathered weights and of gradients; None: that of the weights."""
    if cfg.common.bf16:
        return torch.bfloat16
    return torch.float16 if cfg.common.fp16 else None


def build_optimizer(cfg: Any, parameters: list[Any]) -> Any:
    """The optimizer of this rank's rows of trained parameters, with a loss scaler for --fp16."""
    rows = [nn.Parameter(own_rows(p)) for p in parameters]
    if cfg.common.fp16:
        return optim.MemoryEfficientFP16Optimizer.build_optimizer(cfg, rows, allow_unsupported=True)
    return optim.build_optimizer(cfg.optimizer, rows)


def pass_gradients(parameters: list[Any], optimizer: Any) -> None:
    """Give the optimizer's tensors the gradients of the parameters that they are rows of."""
    for parameter, rows in zip(parameters, optimizer.params, strict=True):
        grad = parameter.grad
        rows.grad = grad.to_local() if isinstance(grad, DTensor) else grad
