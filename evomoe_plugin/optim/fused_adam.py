"""Adam in one pass over memory: fairseq's arithmetic by torch's fused kernel."""

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

    Its constructor, groups and state are fairseq's, `step` as a number included, so that
    checkpoints and whatever edits the state serve both. Only the step differs: torch's fused
    kernel reads and writes each number once, on CPUs and GPUs. Weights in half precision are
    updated through copies in fp32, one parameter at a time, as fairseq's are.

    Attributes:
        grad_factor: what gradients are multiplied by in the next step, inside the kernel.
    """

    grad_factor: float | Tensor = 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what they were to be multiplied by."""
        self.grad_factor = 1.0
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients.

        Args:
            closure: evaluates the loss anew.
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
                raise RuntimeError("fused_adamw knows no sparse gradients: give --optimizer adam")
            state = self.state[p]
            # Apex's newer Adam counts once for all parameters.
            state["step"] = int(state.get("step", group.get("step", 0)))
            yield p

    def _update(
        self, weights: list[Tensor], parameters: list[nn.Parameter], group: dict[str, Any],
        factor: float | Tensor,
    ) -> None:
        """Update `weights`, those of `parameters` or copies of them, of one count and device."""
        states = [self.state[p] for p in parameters]
        done = states[0]["step"]
        device = weights[0].device
        beta1, beta2 = group["betas"]
        # fairseq's eps is beside the root of a second moment that is not corrected yet.
        eps = group["eps"] / math.sqrt(1 - beta2 ** (done + 1))
        scale = None
        if torch.is_tensor(factor) or factor != 1:
            scale = 1 / torch.as_tensor(factor, dtype=torch.float32, device=device).reshape(())
        adamw(
            weights,
            [_like(p.grad, w) for p, w in zip(parameters, weights, strict=True)],
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
    """Whether its numbers lie side by side, in whatever order: the kernel runs along memory."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()


def _copied(p: Tensor) -> Tensor:
    dtype = torch.float32 if p.dtype in _HALF else p.dtype
    return p.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """`value` in the precision and the order in memory of `weight`; itself where it has them."""
    if (value.dtype, value.device, value.stride()) == (weight.dtype, weight.device,
                                                       weight.stride()):
        return value
    return torch.empty_like(weight).copy_(value)


def _moment(state: dict[str, Any], name: str, weight: Tensor) -> Tensor:
    value = state.get(name)
    state[name] = torch.zeros_like(weight) if value is None else _like(value, weight)
    return state[name]
