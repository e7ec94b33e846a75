"""torch's DistributedDataParallel on CPUs, as fairseq wraps models in it."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.models import distributed_fairseq_model
from torch.nn.parallel import DistributedDataParallel

from evomoe_plugin.patches.patch import Patch, replacing, without_gpu


def _distributed_data_parallel(
    module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, **kwargs: Any
) -> DistributedDataParallel:
    return DistributedDataParallel(module, **kwargs)


PATCH = Patch(
    name="ddp-on-cpu",
    broken="--ddp-backend pytorch_ddp, the default of several ranks, ends in an error about "
    "device_ids on CPUs",
    upstream="fairseq/models/distributed_fairseq_model.py",
    remove_when="fairseq gives device_ids on GPUs only",
    needed=without_gpu,
    apply=replacing(distributed_fairseq_model, DistributedDataParallel=_distributed_data_parallel),
)
