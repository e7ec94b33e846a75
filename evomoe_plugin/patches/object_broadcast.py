"""Sending a checkpoint from rank 0 to the other ranks with torch >= 2.6."""

import functools

import torch
from fairseq.distributed import utils as distributed_utils

from evomoe_plugin.patches.patch import ModuleView, Patch


def needed() -> str | None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6):
        return f"torch {torch.__version__} loads only weights by default"
    return None


def apply() -> None:
    # The bytes come from our own rank 0, which pickled them a moment ago.
    distributed_utils.torch = ModuleView(
        torch, load=functools.partial(torch.load, weights_only=False)
    )


PATCH = Patch(
    name="object-broadcast",
    broken="resuming with more than one process ends in UnpicklingError",
    upstream="fairseq/distributed/utils.py: _broadcast_object_slow",
    remove_when="fairseq passes weights_only=False there",
    needed=needed,
    apply=apply,
)
