"""fairscale's FSDP on CPUs over gloo."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fairscale.internal import reduce_scatter_bucketer
from fairscale.nn.data_parallel import fully_sharded_data_parallel as fsdp

from evomoe_plugin.patches.patch import Patch, without_gpu


def apply() -> None:
    # For fairscale's file alone. torch.cpu has the stream functions of torch.cuda; they do nothing.
    fsdp.torch = SimpleNamespace(**{**vars(torch), "cuda": torch.cpu})
    fsdp._get_default_cuda_device = lambda module: torch.device("cpu")
    # gloo's _reduce_scatter_base takes flat input only; the list form takes fairscale's.
    fsdp.enable_nccl_base_collectives = False
    reduce_scatter_bucketer.enable_nccl_base_collectives = False
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None  # memory of CPU tensors has no streams


PATCH = Patch(
    name="fsdp-on-cpu",
    broken="--ddp-backend fully_sharded ends in AssertionError: Torch not compiled with CUDA",
    upstream="fairscale/nn/data_parallel/fully_sharded_data_parallel.py, "
    "fairscale/internal/reduce_scatter_bucketer.py",
    remove_when="training moves to torch's own fully_shard, or fairscale asks the device",
    needed=without_gpu,
    apply=apply,
)
