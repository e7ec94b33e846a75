"""Clipping gradients on the CPU of a machine with a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fairseq import utils
from torch import Tensor

from evomoe_plugin.patches.patch import Patch, wrap


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

    def norm_on_cpu(norm: Tensor) -> Any:
        return aggregate_norm_fn(norm.cpu()) if aggregate_norm_fn else norm.cpu()

    return upstream(params, max_norm, norm_on_cpu)


@functools.cache
def apply() -> None:
    wrap(utils, "clip_grad_norm_", _clip_grad_norm)


PATCH = Patch(
    name="clip-norm-cpu",
    broken="--cpu on a machine with a GPU ends in the first update: RuntimeError: scalar tensor is "
           "expected to be on cpu but is on cuda:0",
    upstream="fairseq/utils.py: clip_grad_norm_ takes the norm to the GPU if there is one",
    remove_when="the norm stays on the gradients' device",
    needed=lambda: "there is a GPU, and --cpu may be given" if torch.cuda.is_available() else None,
    apply=apply,
)
