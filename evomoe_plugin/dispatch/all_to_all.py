"""All-to-all exchange of rows between ranks: exactly the rows there are, no padding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe_plugin.dispatch.process_groups import ExpertGroups

TRANSPORT_DTYPES = dict(same=None, fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


@dataclass
class Meter:
    """Seconds that this rank has waited for exchanges.

    On a GPU the device waits, and these are the seconds of the host alone.
    """

    seconds: float = 0.0

    def reset(self) -> None:
        self.seconds = 0.0


@dataclass
class Exchange:
    """One all-to-all of rows in the forward pass, and of their gradients in the backward pass.

    It is in flight from `begin` to `finish`, and from the backward pass of `finish` to that of
    `begin`. With NCCL it runs on a stream that the process group keeps for it, behind what the
    current stream was given before `begin`; `finish` makes the current stream wait for it, not the
    host. What computes in between therefore overlaps it.

    Args:
        group: the ranks.
        send: number of rows for each of them.
        receive: number of rows from each of them.
        transport_dtype: dtype of the rows while they are sent; None: their own.
        meter: where the waiting time is added.
    """

    group: dist.ProcessGroup
    send: Sequence[int]
    receive: Sequence[int]
    transport_dtype: torch.dtype | None = None
    meter: Meter = field(default_factory=Meter)
    _dtype: torch.dtype | None = None
    _work: Any = None
    _sending: Tensor | None = None
    _grad: Tensor | None = None

    def begin(self, rows_ND: Tensor) -> Tensor:
        """Start to send rows, sorted by destination; pass the result to `finish` before use.

        Every rank of the group must begin its exchanges in the same order, also one without rows.
        """
        self._dtype = rows_ND.dtype
        return _Begin.apply(rows_ND, self)

    def finish(self, begun: Tensor) -> Tensor:
        """The received rows, sorted by source."""
        return _Finish.apply(begun, self)

    def _start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        outgoing = rows.to(self.transport_dtype or rows.dtype).contiguous()
        incoming = outgoing.new_empty(sum(receive), *rows.shape[1:])
        # Bytes: backends differ in the dtypes they support.
        self._work = dist.all_to_all_single(
            incoming.view(torch.uint8),
            outgoing.view(torch.uint8),
            list(receive),
            list(send),
            group=self.group,
            async_op=True,
        )
        self._sending = outgoing  # must live until it is sent
        return incoming

    def _wait(self) -> None:
        began = time.perf_counter()
        self._work.wait()
        self.meter.seconds += time.perf_counter() - began
        self._work = self._sending = None


class _Begin(torch.autograd.Function):
    """Forward: start the exchange. Backward: wait for the gradients `_Finish` started to send."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._start(rows, exchange.send, exchange.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _placeholder: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange._wait()
        grad, exchange._grad = exchange._grad, None
        return grad.to(exchange._dtype), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, begun: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._wait()
        return begun.to(exchange._dtype, copy=False).view_as(begun)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange._grad = ctx.exchange._start(grad, ctx.exchange.receive, ctx.exchange.send)
        # Autograd wants a gradient of `begun` here; `_Begin` returns the exchanged one.
        return grad, None


@dataclass(frozen=True)
class RowCounts:
    """How many rows each of R ranks sends to each of E experts."""

    sent_E: list[int]
    """By this rank."""
    received_RH: list[list[int]]
    """To this rank, for each of the H = E / R experts that it holds."""
    on_device_RH: Tensor
    """The same as a tensor, int64."""


def exchange_counts(sent_E: Tensor, groups: ExpertGroups) -> RowCounts:
    """Exchange how many rows each rank has for each expert. The host waits once, for both.

    Args:
        sent_E: int64, rows of this rank for each expert.
        groups: the ranks that shard them.
    """
    received_E = torch.empty_like(sent_E)
    dist.all_to_all_single(received_E, sent_E, group=groups.exchange)
    received_RH = received_E.view(groups.size, -1)
    sent, received = torch.stack([sent_E, received_E]).tolist()
    held = received_RH.size(1)
    by_rank = [received[i : i + held] for i in range(0, len(received), held)]
    return RowCounts(sent, by_rank, received_RH)
