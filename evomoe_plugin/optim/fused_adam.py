"""Adam in one pass over memory: fairseq's arithmetic with torch's fused kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fairseq.optim.adam import Adam
from torch import Tensor, nn
from torch.optim.adamw import adamw


class FusedAdam(Adam):
    """fairseq's `Adam` (Adam with decoupled weight decay, arXiv 1412.6980 and 1711.05101).

    Constructor, groups and state are fairseq's, including `step` as a number, so that checkpoints
    and code that edits the state work with both. Only the step differs: torch's fused kernel reads
    and writes each value once, on CPUs and GPUs. Weights in half precision are updated through fp32
    copies, one parameter at a time, as in fairseq.

    Attributes:
        grad_factor: factor of the gradients in the next step, applied inside the kernel.
    """

    grad_factor: float | Tensor = 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and their factor."""
        self.grad_factor = 1.0
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients.

        Args:
            closure: recomputes the loss.
        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor, self.grad_factor = self.grad_factor, 1.0
        for group in self.param_groups:
            together: dict[Any, list[nn.Parameter]] = {}
            for p in (p for p in group["params"] if p.grad is not None):
                if p.grad.is_sparse:
                    raise RuntimeError(
                        "fused_adamw takes no sparse gradients: give --optimizer adam"
                    )
                state = self.state[p]
                # Apex's newer Adam counts once for all parameters.
                state["step"] = int(state.get("step", group.get("step", 0)))
                key = (p.device, p.dtype, state["step"]) if _is_direct(p) else p
                together.setdefault(key, []).append(p)
            for parameters in together.values():
                self._update(parameters, group, factor)
        return loss

    def _update(
        self, parameters: list[nn.Parameter], group: dict[str, Any], factor: float | Tensor
    ) -> None:
        """Update parameters of one step count and device."""
        states = [self.state[p] for p in parameters]
        weights = [p.data if _is_direct(p) else _copied(p) for p in parameters]
        for state, weight in zip(states, weights, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _like(state.get(name), weight)
        done, device = states[0]["step"], weights[0].device
        beta1, beta2 = group["betas"]
        # fairseq adds eps to the root of the second moment before its bias correction.
        eps = group["eps"] / math.sqrt(1 - beta2 ** (done + 1))
        scale = None
        if torch.is_tensor(factor) or factor != 1:
            if not torch.is_tensor(factor):  # without a copy, for which the host would wait
                factor = torch.full((), factor, dtype=torch.float32, device=device)
            if factor.device != device:
                factor = factor.to(device)
            scale = 1 / factor.float().reshape(())
        adamw(
            weights,
            [_like(p.grad, weight) for p, weight in zip(parameters, weights, strict=True)],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(torch.full((len(weights),), float(done), device=device).unbind()),
            fused=True,
            grad_scale=scale,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=eps,
            maximize=False,
        )
        for p, weight, state in zip(parameters, weights, states, strict=True):
            state["step"] = done + 1
            if weight.data_ptr() != p.data_ptr():
                p.data.copy_(weight)


def _is_direct(p: Tensor) -> bool:
    """Whether the kernel can update p: not in half precision, and dense in any order of
    dimensions."""
    return p.dtype not in (torch.float16, torch.bfloat16) and (
        p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()
    )


def _copied(p: Tensor) -> Tensor:
    dtype = torch.promote_types(p.dtype, torch.float32)
    return p.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _like(value: Tensor | None, like: Tensor) -> Tensor:
    """`value` with dtype, device and strides of `like`; itself where it has them; None: zeros."""
    if value is None:
        return torch.zeros_like(like)
    if (value.dtype, value.device, value.stride()) == (like.dtype, like.device, like.stride()):
        return value
    return torch.empty_like(like).copy_(value)
