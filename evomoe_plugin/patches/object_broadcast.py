"""Broadcast a checkpoint from rank 0 with torch >= 2.6."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from evomoe_plugin.patches.patch import Patch, always, replacing


def _broadcast_object(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
    objects = [obj]
    dist.broadcast_object_list(objects, src=src_rank, group=group, device=dist_device)
    return objects[0]


PATCH = Patch(
    name="object-broadcast",
    broken="resuming with more than one rank ends in UnpicklingError",
    upstream="fairseq/distributed/utils.py: _broadcast_object_slow",
    remove_when="fairseq passes weights_only=False there",
    needed=always(f"torch {torch.__version__} loads only weights by default"),
    apply=replacing(distributed_utils, _broadcast_object_slow=_broadcast_object),
)
