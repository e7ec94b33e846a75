"""Experts sharded over ranks: rows are sent to them, and outputs back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evomoe_plugin.dispatch.all_to_all import Exchange, RowCounts, exchange_counts
from evomoe_plugin.dispatch.process_groups import ExpertGroups
from evomoe_plugin.dispatch.token_rows import TokenRows
from evomoe_plugin.experts.ffn import ExpertStack
from evomoe_plugin.routing.plan import RoutingPlan


class ParallelExpertFFN(ExpertStack):
    """An `ExpertFFN` of E experts, of which this rank holds E / R.

    It computes what the whole stack would: rows are sent to the ranks that hold their experts, and
    the outputs back (GShard's expert parallelism, arXiv 2006.16668, without its padding). All R
    ranks must call it together.

    The gradients of its parameters are divided by R: averaged over the ranks with the same experts
    they then equal those of the whole stack, averaged over all ranks.

    Args:
        num_experts: E, a multiple of R.
        groups: the ranks that shard the experts.
        exchange: makes an `Exchange` from the numbers of rows to send to and to receive from each
            rank.
        chunks: number of exchanges, each in flight while the experts of another are computed.
        others: as `ExpertFFN`.
    """

    def __init__(
        self,
        num_experts: int,
        *args: Any,
        groups: ExpertGroups,
        exchange: Callable[[Sequence[int], Sequence[int]], Exchange],
        chunks: int = 1,
        **kwargs: Any,
    ):
        self._own = groups.own(num_experts)
        super().__init__(num_experts, *args, **kwargs)
        self.groups = groups
        self.grad_scale = 1.0 / groups.size
        self._exchange = exchange
        self._held = held = num_experts // groups.size
        self._chunks = [range(i * held // chunks, (i + 1) * held // chunks) for i in range(chunks)]
        # Experts sorted by chunk, then rank.
        self._order = [
            r * held + e for chunk in self._chunks for r in range(groups.size) for e in chunk
        ]

    def _new_parameter(self, shape: tuple[int, ...], bound: float) -> nn.Parameter:
        """This rank's rows of what a single rank would draw for all experts. Rows of the others are
        drawn and dropped, so that generators stay in step."""
        first, stop = self._own.start, self._own.stop
        held, other = torch.empty(stop - first, *shape[1:]), torch.empty(shape[1:])
        for expert in range(shape[0]):
            (held[expert - first] if first <= expert < stop else other).uniform_(-bound, bound)
        return nn.Parameter(held)

    def forward(
        self, x_TD: Tensor, plan: RoutingPlan, overlap_fn: Callable[[], Any] | None = None
    ) -> Any:
        """The same as the whole stack's, with experts on all R ranks.

        Args:
            x_TD: this rank's tokens.
            plan: routing to all E experts.
            overlap_fn: called while the first rows are in flight.
        Returns:
            [T, D]; with `overlap_fn`, a pair of that and its result.
        """
        counts = exchange_counts(plan.tokens_per_expert_E, self.groups)
        plan = plan.first(sum(counts.sent_E))
        pairs, weights_N = self._by_chunk(plan, counts.sent_E)
        exchanges = [self._exchange(*self._sizes(counts, chunk)) for chunk in self._chunks]
        parts = pairs.take(x_TD).split([sum(exchange.send) for exchange in exchanges])
        in_flight = [exchange.begin(rows) for exchange, rows in zip(exchanges, parts, strict=True)]
        overlap_out = overlap_fn() if overlap_fn else None
        returning = []
        for chunk, exchange, begun, weights in zip(
            self._chunks, exchanges, in_flight, self._weights_by_chunk(), strict=True
        ):
            output = self._forward_received(exchange.finish(begun), counts, chunk, weights)
            back = self._exchange(exchange.receive, exchange.send)
            returning.append((back, back.begin(output)))
        received = [back.finish(begun) for back, begun in returning]
        rows_ND = torch.cat(received) if len(received) > 1 else received[0]
        y_TD = pairs.sum(rows_ND, weights_N, x_TD.dtype)
        return (y_TD, overlap_out) if overlap_fn else y_TD

    def _by_chunk(self, plan: RoutingPlan, counts: Sequence[int]) -> tuple[TokenRows, Tensor]:
        """The pairs and their weights, sorted by chunk, then rank and expert."""
        if len(self._chunks) == 1:
            return TokenRows(plan.token_ids_N, plan.num_tokens, plan.by_token), plan.weights_N
        token_ids_N, weights_N = (
            _reorder(values, counts, self._order) for values in (plan.token_ids_N, plan.weights_N)
        )
        return TokenRows(token_ids_N, plan.num_tokens), weights_N

    def _sizes(self, counts: RowCounts, chunk: range) -> tuple[list[int], list[int]]:
        """Rows of a chunk for each rank, and from each."""
        held = self._held
        sent = [sum(counts.sent_E[r * held + e] for e in chunk) for r in range(self.groups.size)]
        return sent, [sum(row[e] for e in chunk) for row in counts.received_RH]

    def _weights_by_chunk(self) -> list[dict[str, Tensor]]:
        weights = self._weights()
        if len(self._chunks) == 1:
            return [weights]
        parts = (w.split([len(chunk) for chunk in self._chunks]) for w in weights.values())
        return [dict(zip(weights, part, strict=True)) for part in zip(*parts, strict=True)]

    def _forward_received(
        self, rows_ND: Tensor, counts: RowCounts, chunk: range, weights: dict[str, Tensor]
    ) -> Tensor:
        """Outputs for received rows, sorted by rank, then expert; in the same order."""
        size, width = len(counts.received_RH), len(chunk)
        segments = [row[e] for row in counts.received_RH for e in chunk]
        by_expert = [r * width + e for e in range(width) for r in range(size)]
        places_N = torch.arange(len(rows_ND), device=rows_ND.device)
        rows_by_expert_N = _reorder(places_N, segments, by_expert)
        by_rank = [e * size + r for r in range(size) for e in range(width)]
        place_of_row_N = _reorder(places_N, [segments[i] for i in by_expert], by_rank)
        # Each row is a token of one expert.
        starts = torch.arange(len(rows_ND) + 1, device=rows_ND.device)
        return self._grouped(
            rows_ND,
            counts.on_device_RH[:, chunk.start : chunk.stop].sum(0),
            weights,
            rows_by_expert_N,
            by_token=(place_of_row_N, starts),
        )


def _reorder(values: Tensor, counts: Sequence[int], order: Sequence[int]) -> Tensor:
    """Segments of `counts` values in another order, as one tensor."""
    if list(order) == list(range(len(order))):
        return values
    segments = values.split(list(counts))
    return torch.cat([segments[i] for i in order])
