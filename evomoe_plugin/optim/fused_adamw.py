"""`--optimizer fused_adamw`: fairseq's adam in fewer passes over memory."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from fairseq.optim.adam import FairseqAdam
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.fused_adam import get_fused_adam_class
from omegaconf import II
from torch import Tensor, nn

from evomoe_plugin.optim.fused_adam import FusedAdam

logger = logging.getLogger(__name__)


@dataclass
class FusedAdamWConfig(FairseqDataclass):
    """The options of fairseq's adam that change the result."""

    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "betas for Adam optimizer"})
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon for Adam optimizer"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    lr: Any = II("optimization.lr")


@register_optimizer("fused_adamw", dataclass=FusedAdamWConfig)
class FusedAdamW(FairseqAdam):
    """fairseq's `adam`, equal to rounding, in fewer passes over memory.

    On GPUs with NVIDIA's apex it uses apex's kernel, as `adam` does there; elsewhere torch's.
    Gradients are divided by the sample size and clipped inside the kernel: until the step they stay
    as the backward pass computed them. Checkpoints are those of `adam`.

    Args:
        cfg: the fields of `FusedAdamWConfig`.
        params: the trained parameters.
    """

    def __init__(self, cfg: FusedAdamWConfig, params: Iterable[nn.Parameter]):
        FairseqOptimizer.__init__(self, cfg)
        params = list(params)
        kernel = get_fused_adam_class()
        if kernel is not None and all(p.is_cuda for p in params):
            logger.info("fused_adamw: apex's kernel")
        else:
            kernel = FusedAdam
        self._optimizer = kernel(params, **self.optimizer_config)

    @property
    def _fused(self) -> FusedAdam | None:
        """The optimizer if it applies `grad_factor` itself; fairscale's OSS takes its place."""
        return self.optimizer if isinstance(self.optimizer, FusedAdam) else None

    def multiply_grads(self, c: float | Tensor) -> None:
        """Multiply the gradients by `c`, in the next step."""
        if self._fused is None:
            super().multiply_grads(c)
        else:
            self._fused.grad_factor = self._fused.grad_factor * c

    def clip_grad_norm(
        self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Clip the gradients to `max_norm` in the next step, if it is above 0.

        Returns:
            the norm before clipping.
        """
        fused = self._fused
        if fused is None:
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        norm = self._norm(aggregate_norm_fn) * fused.grad_factor
        if max_norm > 0:
            clip = (float(max_norm) / (norm + 1e-6)).clamp(max=1)
            fused.grad_factor = clip * fused.grad_factor
        return norm

    def _norm(self, aggregate_norm_fn: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Norm of the gradients without `grad_factor`."""
        grads = [p.grad for p in self.params if p.grad is not None]
        # Elsewhere one gradient after the other, as fairseq does.
        if (
            not grads
            or any(hasattr(p, "expert") for p in self.params)
            or not all(g.is_cuda and g.dtype is torch.float32 for g in grads)
        ):
            return super().clip_grad_norm(0, aggregate_norm_fn)
        norm = nn.utils.get_total_norm(grads)
        return norm if aggregate_norm_fn is None else aggregate_norm_fn(norm)
