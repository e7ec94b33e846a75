"""`--memory-efficient-fp16` with `--ddp-backend fully_sharded`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.distributed import FullyShardedDataParallel

from evomoe_plugin.patches.patch import Patch, always, wrapping


def _init(upstream: Callable, self: Any, module: torch.nn.Module, **kwargs: Any) -> None:
    if kwargs.get("compute_dtype") is torch.float16 and not kwargs.get("mixed_precision"):
        module = module.half()
    upstream(self, module, **kwargs)


PATCH = Patch(
    name="fsdp-memory-efficient-fp16",
    broken="fully_sharded with --memory-efficient-fp16 ends in ValueError: Expecting FP16 param "
    "type in pure FP16 mode",
    upstream="fairseq/distributed/fully_sharded_data_parallel.py: the model is wrapped before "
    "models/distributed_fairseq_model.py makes it fp16",
    remove_when="fairseq makes the weights fp16 before it wraps them",
    needed=always("fairscale wants fp16 weights before it wraps"),
    apply=wrapping(FullyShardedDataParallel, __init__=_init),
)
