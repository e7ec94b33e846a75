"""Gather objects of all ranks in a list, on CPUs too and of any size."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils

from evomoe_plugin.patches.patch import Patch, always, replacing


def all_gather_list(data: Any, group: Any = None, max_size: int = 0) -> list[Any]:
    """In place of `fairseq.distributed.utils.all_gather_list`; `max_size` is not needed."""
    group = distributed_utils.get_global_group() if group is None else group
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, utils.move_to_cpu(data), group=group)
    return found


PATCH = Patch(
    name="gather-list",
    broken="fairseq-validate on several ranks ends in an error about CUDA where there is no "
    "GPU, and elsewhere if what it logs has more than --all-gather-list-size bytes, which "
    "the routing of a few hundred batches has",
    upstream="fairseq/distributed/utils.py: all_gather_list",
    remove_when="fairseq gathers objects with torch's all_gather_object",
    needed=always("validation on several ranks"),
    apply=replacing(distributed_utils, all_gather_list=all_gather_list),
)
