"""Clipping gradients on the CPU of a machine with a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fairseq import utils
from torch import Tensor

from evomoe_plugin.patches.patch import Patch, wrapping


def _clip_grad_norm(
    upstream: Callable,
    params: Tensor | Iterable[Tensor],
    max_norm: float,
    aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    params = [params] if isinstance(params, Tensor) else list(params)
    devices = {p.grad.device for p in params if p is not None and p.grad is not None}
    if devices != {torch.device("cpu")}:
        return upstream(params, max_norm, aggregate_norm_fn)

    aggregate = aggregate_norm_fn or (lambda norm: norm)
    return upstream(params, max_norm, lambda norm: aggregate(norm.cpu()))


PATCH = Patch(
    name="clip-norm-cpu",
    broken="--cpu on a machine with a GPU ends in the first update: RuntimeError: scalar tensor is "
    "expected to be on cpu but is on cuda:0",
    upstream="fairseq/utils.py: clip_grad_norm_ takes the norm to the GPU if there is one",
    remove_when="the norm stays on the gradients' device",
    needed=lambda: "there is a GPU, and --cpu may be given" if torch.cuda.is_available() else None,
    apply=wrapping(utils, clip_grad_norm_=_clip_grad_norm),
)
