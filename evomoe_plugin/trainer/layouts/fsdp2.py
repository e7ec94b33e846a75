"""`--ddp-backend fsdp2`: training with torch's `fully_shard`, parameter by parameter.

Each rank keeps its rows of every parameter in fp32, and of their gradients and the optimizer's
state; a module's parameters are gathered for its passes, in the dtype of `--bf16` or `--fp16`, and
gradients reduce-scattered in it. The optimizer gets plain tensors, views of this rank's rows: it
updates the weights that the next pass gathers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairseq import optim, utils
from fairseq.optim.lr_scheduler import build_lr_scheduler
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from evomoe_plugin.checkpoint.parameter_storage import Storage
from evomoe_plugin.checkpoint.row_shards import (
    distributed,
    free_whole,
    own_optimizer_state,
    own_rows,
    rows_of,
    take_rows,
    whole,
    whole_optimizer_state,
    whole_state,
)
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch.sharded_layers import sharded_layers
from evomoe_plugin.trainer.layouts.layout import is_checkpointed
from evomoe_plugin.trainer.layouts.sharded import Sharded


class Fsdp2(Sharded):
    """Each rank has its rows of every parameter."""

    is_wrapped = False  # changed in place
    hidden_flags = ("bf16", "fp16")
    gathers_state = True

    def __init__(self) -> None:
        self._trained: list[nn.Parameter] = []

    def prepare(self, cfg: Any, model: nn.Module, criterion: nn.Module) -> None:
        if utils.has_parameters(criterion):
            raise OptionError(
                "criterion",
                cfg.criterion._name,
                "has parameters of its own, which --ddp-backend fsdp2 does not shard: give "
                "legacy_ddp",
            )
        on_gpu = torch.cuda.is_available() and not cfg.common.cpu
        shard(model, cfg, "cuda" if on_gpu else "cpu")

    def free_gathered(self, trainer: Any) -> None:
        free_whole(trainer.model)

    def build_optimizer(self, trainer: Any, build: Callable[[], None]) -> None:
        self._trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer._optimizer = build_optimizer(trainer.cfg, self._trained)
        trainer._lr_scheduler = build_lr_scheduler(trainer.cfg.lr_scheduler, trainer._optimizer)
        trainer._lr_scheduler.step_update(0)

    def zero_grad(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def all_reduce_grads(self, trainer: Any) -> None:
        pass_gradients(self._trained, trainer.optimizer)
        super().all_reduce_grads(trainer)

    def storages(self, trainer: Any) -> Iterator[Storage]:
        free_whole(trainer.model)
        rows = iter(trainer.optimizer.params)
        for name, p in trainer.get_model().named_parameters():
            owner = next(rows) if p.requires_grad else own_rows(p)
            yield Storage(owner, (name,), (p.shape,), parameter=p)

    def model_state(self, trainer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return whole_state(trainer.model, trainer.should_save_checkpoint_on_current_rank)

    def consolidate_optimizer(self, trainer: Any, consolidate: Callable[[], None]) -> None:
        if not trainer.cfg.checkpoint.no_save_optimizer_state:
            trainer._gathered_optim_state = whole_optimizer_state(
                trainer.optimizer.state_dict(),
                self._trained,
                trainer.should_save_checkpoint_on_current_rank,
            )

    def own_optimizer_state(self, trainer: Any, state: Any) -> Any:
        return own_optimizer_state(state, self._trained)


def shard(model: nn.Module, cfg: Any, device_type: str) -> None:
    """Shard the parameters of `model` over all ranks, those of sharded experts over their replicas.

    Layers are gathered one at a time if they have `--min-params-to-wrap` parameters or activations
    are checkpointed; what is left is gathered with the whole model.

    Args:
        model: whole and the same on every rank.
        cfg: fairseq's configuration.
        device_type: that the ranks train on.
    """
    parallel = cfg.distributed_training

    def mesh(group: Any) -> DeviceMesh:
        return DeviceMesh.from_group(group, device_type)

    given: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype(cfg),
            reduce_dtype=torch.float32 if parallel.fp32_reduce_scatter else None,
            cast_forward_inputs=False,
        ),
        # None: all but the last, whose backward pass comes first.
        "reshard_after_forward": False if parallel.no_reshard_after_forward else None,
    }
    everyone = mesh(dist.group.WORLD)
    for moe in sharded_layers(model):
        fully_shard(moe.experts, mesh=mesh(moe.groups.replicas), **given)
    for moe in _spawning_layers(model):
        fully_shard(moe.experts, mesh=everyone, **given)
        moe.first_row = functools.partial(
            _FirstRow.apply, compute_dtype(cfg), parallel.fp32_reduce_scatter
        )
    least = 0 if is_checkpointed(model) else getattr(cfg.model, "min_params_to_wrap", 0)
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


def _spawning_layers(model: nn.Module) -> list[Any]:
    """MoE layers, with all experts on each rank, of a run that has or had a dense phase."""
    return [m for m in model.modules() if getattr(m, "spawn_updates", 0) > 0 and m.groups is None]


class _FirstRow(torch.autograd.Function):
    """The first row of a parameter on all ranks, [1, ...]; other rows have gradients of zero.

    The first rank of the mesh sends it, and is sent the mean of its gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype | None, reduces_in_fp32: bool, parameter: DTensor
    ) -> torch.Tensor:
        ctx.parameter, ctx.reduces_in_fp32 = parameter, reduces_in_fp32
        own, mesh = own_rows(parameter), parameter.device_mesh
        row = own[:1] if mesh.get_local_rank() == 0 else own.new_empty(1, *own.shape[1:])
        row = row.to(dtype or own.dtype, copy=True)
        dist.broadcast(row, group=mesh.get_group(), group_src=0)
        return row

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        parameter, mesh = ctx.parameter, ctx.parameter.device_mesh
        grad = grads[0].float() if ctx.reduces_in_fp32 else grads[0].clone()
        dist.reduce(grad.div_(mesh.size()), group=mesh.get_group(), group_dst=0)
        rows = torch.zeros_like(own_rows(parameter))
        if mesh.get_local_rank() == 0:
            rows[:1] = grad
        return None, None, distributed(rows, parameter)


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
    """The optimizer of this rank's rows of trained parameters, with a loss scaler for --fp16.

    Raises:
        OptionError: it has not these tensors in this order, by which they get their gradients.
    """
    rows = [_own(p) for p in parameters]
    if cfg.common.fp16:
        of_fp16 = optim.MemoryEfficientFP16Optimizer
        optimizer = of_fp16.build_optimizer(cfg, rows, allow_unsupported=True)
    else:
        optimizer = optim.build_optimizer(cfg.optimizer, rows)
    if [*map(id, optimizer.params)] != [*map(id, rows)]:
        raise OptionError(
            "optimizer",
            cfg.optimizer._name,
            "changes the parameters that it is given, or their order, with which --ddp-backend "
            "fsdp2 does not work: give another, or legacy_ddp",
        )
    return optimizer


def _own(parameter: Any) -> nn.Parameter:
    """This rank's rows, with what optimizers of whole matrices ask for."""
    rows: Any = nn.Parameter(own_rows(parameter))
    rows.is_matrix = getattr(parameter, "is_matrix", False)
    rows.all_rows = functools.partial(whole, parameter=parameter)
    rows.own_rows = functools.partial(rows_of, parameter=parameter)
    return rows


def pass_gradients(parameters: list[Any], optimizer: Any) -> None:
    """Give the optimizer's tensors the gradients of the parameters that they are rows of."""
    for parameter, rows in zip(parameters, optimizer.params, strict=True):
        grad = parameter.grad
        rows.grad = grad.to_local() if isinstance(grad, DTensor) else grad
