"""Rows that travel between processes: as many to each as there are, nothing padded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

WIRE_DTYPES = {"same": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Meter:
    """Seconds that this process has waited for exchanges.

    On a GPU waiting is a matter of the device, and the seconds are those of the host alone.
    """

    seconds: float = 0.0

    def reset(self) -> None:
        self.seconds = 0.0


@dataclass
class Exchange:
    """One way of rows to other processes, and of their gradients back.

    Args:
        group: the processes.
        send: rows for each of them.
        receive: rows from each of them.
        wire_dtype: of the rows under way; None: their own.
        meter: where the time is added.
    """

    group: dist.ProcessGroup
    send: Sequence[int]
    receive: Sequence[int]
    wire_dtype: torch.dtype | None = None
    meter: Meter = field(default_factory=Meter)
    _dtype: torch.dtype | None = None
    _work: Any = None
    _kept: Tensor | None = None
    _returning: Tensor | None = None

    def begin(self, rows_ND: Tensor) -> Tensor:
        """Send rows, in the order of their destinations; `finish` what is returned before use.

        Every process of the group must begin its exchanges in the same order, also one without
        rows.
        """
        self._dtype = rows_ND.dtype
        return _Begin.apply(rows_ND, self)

    def finish(self, begun: Tensor) -> Tensor:
        """The rows that came, in the order of their sources."""
        return _Finish.apply(begun, self)

    def _start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        outgoing = rows.to(self.wire_dtype or rows.dtype).contiguous()
        incoming = outgoing.new_empty(sum(receive), *rows.shape[1:])
        # Bytes: backends differ in the number types they move.
        self._work = dist.all_to_all_single(
            incoming.view(torch.uint8), outgoing.view(torch.uint8), list(receive), list(send),
            group=self.group, async_op=True)
        self._kept = outgoing  # until it has left
        return incoming

    def _wait(self) -> None:
        began = time.perf_counter()
        self._work.wait()
        self.meter.seconds += time.perf_counter() - began
        self._work = self._kept = None


class _Begin(torch.autograd.Function):
    """Forward: start to send. Backward: what `_Finish` has started to send back has come."""

    @staticmethod
    def forward(ctx, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._start(rows, exchange.send, exchange.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, _placeholder: Tensor) -> tuple[Any, None]:
        exchange = ctx.exchange
        exchange._wait()
        grad, exchange._returning = exchange._returning, None
        return grad.to(exchange._dtype), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, begun: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._wait()
        return begun.to(exchange._dtype, copy=False).view_as(begun)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange._returning = exchange._start(grad, exchange.receive, exchange.send)
        # Autograd wants a gradient here for `begun`; `_Begin` takes the one that travels.
        return grad, None


def exchange_counts(counts: Sequence[int], groups: Any, device: torch.device) -> list[list[int]]:
    """Tell the other processes how many rows each of their experts will get.

    Args:
        counts: rows of this process for each of E experts.
        groups: the `ExpertGroups` that divide them.
        device: where the backend finds tensors.
    Returns:
        Rows that come from each process (R lists) for each expert that is held here.
    """
    own = torch.tensor(counts, dtype=torch.int64, device=device)
    others = torch.empty_like(own)
    dist.all_to_all_single(others, own, group=groups.exchange)
    return others.view(groups.size, -1).tolist()
