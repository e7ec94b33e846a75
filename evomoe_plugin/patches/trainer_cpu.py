"""What fairseq's trainer and optimizers ask of CUDA although the run is on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from fairseq import trainer
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.optim import fp16_optimizer
from torch.nn.parallel import DistributedDataParallel

from evomoe_plugin.patches.patch import ModuleView, Patch


def needed() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no GPU"


class _StaysWhereItIs(torch.Tensor):
    """What `torch.tensor` gives to the trainer: its zero gradient norm is asked to move to CUDA."""

    def cuda(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def _tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.tensor(*args, **kwargs).as_subclass(_StaysWhereItIs)


def _clip_grad_norm(self: trainer.Trainer, clip_norm: float) -> torch.Tensor:
    """Clip by the norm over all ranks: each holds a shard of the gradients under FSDP."""

    def over_ranks(norm: torch.Tensor) -> torch.Tensor:
        squared = norm.float() ** 2
        return distributed_utils.all_reduce(
            squared, group=self.data_parallel_process_group
        ) ** 0.5

    return self.optimizer.clip_grad_norm(
        clip_norm, aggregate_norm_fn=over_ranks if self.is_fsdp else None
    )


def _distributed_data_parallel(
    module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, **kwargs: Any
) -> DistributedDataParallel:
    return DistributedDataParallel(module, **kwargs)


def apply() -> None:
    trainer.torch = ModuleView(torch, tensor=_tensor)
    trainer.Trainer.clip_grad_norm = _clip_grad_norm
    distributed_fairseq_model.DistributedDataParallel = _distributed_data_parallel
    # The index of a CPU tensor's device is None, which is what fp32 parameters are filed under.
    fp16_optimizer.torch = ModuleView(
        torch, cuda=ModuleView(torch.cuda, current_device=lambda: None)
    )


PATCH = Patch(
    name="trainer-on-cpu",
    broken="fully_sharded, --fp16, a gradient overflow and pytorch_ddp (the default of several "
           "processes) end in errors about CUDA or device_ids",
    upstream="fairseq/trainer.py: clip_grad_norm, train_step; "
             "fairseq/models/distributed_fairseq_model.py; fairseq/optim/fp16_optimizer.py",
    remove_when="those places ask the tensor for its device",
    needed=needed,
    apply=apply,
)
