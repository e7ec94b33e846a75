"""fairscale's FSDP on CPUs over gloo."""

from __future__ import annotations

import torch

from evomoe_plugin.patches.patch import ModuleView, Patch


def needed() -> str | None:
    try:
        import fairscale  # noqa: F401
    except ImportError:
        return None
    return None if torch.cuda.is_available() else "torch sees no GPU"


def apply() -> None:
    from fairscale.internal import reduce_scatter_bucketer
    from fairscale.nn.data_parallel import fully_sharded_data_parallel as fsdp

    # torch.cpu has the same stream functions as torch.cuda; they do nothing.
    fsdp.torch = ModuleView(torch, cuda=torch.cpu)
    fsdp._get_default_cuda_device = lambda module: torch.device("cpu")
    # gloo's _reduce_scatter_base takes flat input only; the list form takes fairscale's.
    fsdp.enable_nccl_base_collectives = False
    reduce_scatter_bucketer.enable_nccl_base_collectives = False
    if torch.Tensor.record_stream is not _record_stream:
        torch.Tensor.record_stream = _record_stream


def _record_stream(tensor: torch.Tensor, stream: object) -> None:
    """A no-op: memory of CPU tensors is not tied to streams."""


PATCH = Patch(
    name="fsdp-on-cpu",
    broken="--ddp-backend fully_sharded ends in AssertionError: Torch not compiled with CUDA",
    upstream="fairscale/nn/data_parallel/fully_sharded_data_parallel.py, "
             "fairscale/internal/reduce_scatter_bucketer.py",
    remove_when="training moves to torch's own fully_shard, or fairscale asks the device",
    needed=needed,
    apply=apply,
)
