"""`--fp16` on CPUs: the flat fp32 masters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from torch import Tensor, nn

from evomoe_plugin.patches.patch import Patch, without_gpu, wrapping


def _build_fp32_params(
    upstream: Callable, args: Any, params: Sequence[Tensor], flatten: bool = True
) -> Any:
    if not flatten:
        return upstream(args, params, flatten)
    master = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in params]))
    master.grad = torch.zeros_like(master)
    return {None: master}  # by the index of their device, of which a CPU has none


PATCH = Patch(
    name="fp16-on-cpu",
    broken="--fp16 ends in AssertionError: Torch not compiled with CUDA enabled on CPUs",
    upstream="fairseq/optim/fp16_optimizer.py: build_fp32_params asks CUDA for the current device",
    remove_when="it asks the parameters for theirs",
    needed=without_gpu,
    apply=wrapping(_FP16OptimizerMixin, build_fp32_params=_build_fp32_params),
)
