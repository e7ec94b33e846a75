"""Adam in one pass over memory: fairseq's arithmetic with torch's fused kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fairseq.optim.adam import Adam
from torch import Tensor, nn
from torch.optim.adamw import adamw

_HALF = (torch.float16, torch.bfloat16)


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
            together: dict[tuple[torch.device, torch.dtype, int], list[nn.Parameter]] = {}
            for p in self._to_update(group):
                if p.dtype in _HALF or not _is_dense(p):
                    self._update([_copied(p)], [p], group, factor)
                else:
                    key = p.device, p.dtype, self.state[p]["step"]
                    together.setdefault(key, []).append(p)
            for parameters in together.values():
                self._update([p.data for p in parameters], parameters, group, factor)
        return loss

    def _to_update(self, group: dict[str, Any]) -> Iterator[nn.Parameter]:
        """The parameters with gradients, each with its state."""
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("fused_adamw takes no sparse gradients: give --optimizer adam")
            state = self.state[p]
            # Apex's newer Adam counts once for all parameters.
            state["step"] = int(state.get("step", group.get("step", 0)))
            yield p

    def _update(
        self, weights: list[Tensor], parameters: list[nn.Parameter], group: dict[str, Any],
        factor: float | Tensor,
    ) -> None:
        """Update `weights`, of `parameters` or copies of them, all of one step count and device."""
        states = [self.state[p] for p in parameters]
        done = states[0]["step"]
        device = weights[0].device
        beta1, beta2 = group["betas"]
        # fairseq adds eps to the root of the second moment before its bias correction.
        eps = group["eps"] / math.sqrt(1 - beta2 ** (done + 1))
        scale = None
        if torch.is_tensor(factor) or factor != 1:
            scale = 1 / torch.as_tensor(factor, dtype=torch.float32, device=device).reshape(())
        adamw(
            weights,
            [_like(p.grad, w) for p, w in zip(parameters, weights, strict=True)
             if p.grad is not None],
            [_moment(state, "exp_avg", w) for state, w in zip(states, weights, strict=True)],
            [_moment(state, "exp_avg_sq", w) for state, w in zip(states, weights, strict=True)],
            [],
            list(torch.full((len(weights),), float(done), device=device).unbind()),
            fused=True, grad_scale=scale, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=eps, maximize=False,
        )
        for p, weight, state in zip(parameters, weights, states, strict=True):
            state["step"] = done + 1
            if weight.data_ptr() != p.data_ptr():
                p.data.copy_(weight)


def _is_dense(p: Tensor) -> bool:
    """Whether its storage is dense, in whatever order of dimensions, as the kernel requires."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()


def _copied(p: Tensor) -> Tensor:
    dtype = torch.float32 if p.dtype in _HALF else p.dtype
    return p.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """`value` with the dtype, device and strides of `weight`; itself where it has them."""
    if (value.dtype, value.device, value.stride()) == (weight.dtype, weight.device,
                                                       weight.stride()):
        return value
    return torch.empty_like(weight).copy_(value)


def _moment(state: dict[str, Any], name: str, weight: Tensor) -> Tensor:
    value = state.get(name)
    state[name] = torch.zeros_like(weight) if value is None else _like(value, weight)
    return state[name]
