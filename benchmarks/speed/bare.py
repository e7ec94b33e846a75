"""Lower bounds: only matmuls, into warm buffers."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from speed.inputs import Inputs


def activated_flops(rows: int, width: int, ffn_dim: int, matrices: int = 2) -> int:
    """FLOPs of forward pass, input gradients and weight gradients of `rows` rows."""
    return 3 * matrices * 2 * rows * width * ffn_dim


class Matmuls:
    """Rows through one FFN: the six matmuls of forward and backward, without activation.

    Args:
        rows: number of rows.
        weights: of both layers, [F, D] each.
        gradients: output buffers for their gradients.
        buffers: from `buffers_for`, with at least as many rows.
    """

    def __init__(
        self,
        rows: int,
        weights: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
        buffers: dict[str, Tensor],
        first: int = 0,
    ):
        self.rows, self.weights, self.gradients = rows, weights, gradients
        part = {name: buffer[first : first + rows] for name, buffer in buffers.items()}
        self.x, self.dx, self.y, self.dy = (part[name] for name in ("x", "dx", "y", "dy"))
        self.h, self.a, self.da = (part[name] for name in ("h", "a", "da"))

    def forward(self) -> None:
        w1_FD, w2_FD = self.weights
        torch.mm(self.x, w1_FD.t(), out=self.h)
        torch.mm(self.a, w2_FD, out=self.y)

    def backward(self) -> None:
        (w1_FD, w2_FD), (dw1_FD, dw2_FD) = self.weights, self.gradients
        torch.mm(self.dy, w2_FD.t(), out=self.da)
        torch.mm(self.a.t(), self.dy, out=dw2_FD)
        torch.mm(self.da.t(), self.x, out=dw1_FD)
        torch.mm(self.da, w1_FD, out=self.dx)


def buffers_for(inputs: Inputs, rows: int) -> dict[str, Tensor]:
    """Inputs and outputs of both matmuls and their gradients, filled."""
    case = inputs.case
    sizes = {
        "x": case.width,
        "dx": case.width,
        "y": case.width,
        "dy": case.width,
        "h": case.ffn_dim,
        "a": case.ffn_dim,
        "da": case.ffn_dim,
    }
    return {
        name: torch.randn(rows, size, device=inputs.device).to(inputs.dtype)
        for name, size in sizes.items()
    }


class Limit:
    """All N rows through one expert: the peak speed of these FLOPs."""

    label = "limit"

    def __init__(self, inputs: Inputs):
        w1_FD, w2_FD = (w[0].clone() for w in inputs.plain)
        self.flops = activated_flops(inputs.pairs, inputs.case.width, inputs.case.ffn_dim)
        self._all = Matmuls(
            inputs.pairs,
            (w1_FD, w2_FD),
            (torch.empty_like(w1_FD), torch.empty_like(w2_FD)),
            buffers_for(inputs, inputs.pairs),
        )

    def step(self) -> None:
        self._all.forward()
        self._all.backward()


class Floor:
    """Each expert's rows with its own cold weights, gradients into one stacked buffer."""

    label = "floor"

    def __init__(self, inputs: Inputs):
        weights = tuple(w.clone() for w in inputs.plain)
        gradients = tuple(torch.zeros_like(w) for w in weights)
        buffers = buffers_for(inputs, inputs.pairs)
        starts = accumulate(inputs.counts, initial=0)
        self.flops = activated_flops(inputs.pairs, inputs.case.width, inputs.case.ffn_dim)
        self._experts = [
            Matmuls(
                count,
                (weights[0][e], weights[1][e]),
                (gradients[0][e], gradients[1][e]),
                buffers,
                start,
            )
            for e, (count, start) in enumerate(zip(inputs.counts, starts, strict=False))
            if count
        ]

    def step(self) -> None:
        for expert in self._experts:
            expert.forward()
        for expert in self._experts:
            expert.backward()
