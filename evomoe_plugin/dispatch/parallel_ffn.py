"""Experts divided over processes: rows travel to them and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evomoe_plugin.experts.ffn import ExpertStack
from evomoe_plugin.routing.plan import RoutingPlan


class ParallelExpertFFN(ExpertStack):
    """An `ExpertFFN` of E experts, of which this process holds E / R.

    It takes tokens for all E and gives their answers, as the whole stack would: rows are sent to
    the processes that hold their experts, and the answers back (GShard's expert parallelism, arXiv
    2006.16668, without its padding). All R processes must call it together.

    The gradients of its parameters are divided by R: averaged over the processes with the same
    experts they are then what the whole stack's, averaged over all processes, would be.

    Args:
        num_experts: E, a multiple of R.
        groups: the processes, and this one's place (`dispatch.groups.ExpertGroups`).
        exchange: makes a way of rows from numbers to send and to receive
            (`dispatch.exchange.Exchange`).
        exchange_counts: tells other processes what comes (`dispatch.exchange.exchange_counts`).
        chunks: exchanges in so many parts, each under way while another is computed.
        others: as `ExpertFFN`.
    """

    def __init__(
        self,
        num_experts: int,
        *args: Any,
        groups: Any,
        exchange: Callable[[Sequence[int], Sequence[int]], Any],
        exchange_counts: Callable[[Sequence[int], Any, torch.device], list[list[int]]],
        chunks: int = 1,
        **kwargs: Any,
    ):
        self._own = groups.own(num_experts)
        super().__init__(num_experts, *args, **kwargs)
        self.groups = groups
        self.grad_scale = 1.0 / groups.size
        self._exchange, self._exchange_counts = exchange, exchange_counts
        held = num_experts // groups.size
        self._chunks = [range(held)[i * held // chunks : (i + 1) * held // chunks]
                        for i in range(chunks)]
        # Experts by chunk, then by process; and where each stands there.
        self._order = [r * held + e for chunk in self._chunks for r in range(groups.size)
                       for e in chunk]
        self._place = sorted(range(num_experts), key=self._order.__getitem__)

    def _new_parameter(self, shape: tuple[int, ...], bound: float) -> nn.Parameter:
        """The own part of what one process would draw for all experts, which the others draw and
        forget, so that all generators stay the same."""
        held = torch.empty(self._own.stop - self._own.start, *shape[1:])
        other = torch.empty(shape[1:])
        for expert in range(shape[0]):
            mine = self._own.start <= expert < self._own.stop
            (held[expert - self._own.start] if mine else other).uniform_(-bound, bound)
        return nn.Parameter(held)

    def forward(
        self, x_TD: Tensor, plan: RoutingPlan, meanwhile: Callable[[], Any] | None = None
    ) -> Any:
        """As the whole stack's, from experts wherever they are.

        Args:
            x_TD: this process's tokens.
            plan: of all E experts.
            meanwhile: computed while the first rows are under way.
        Returns:
            [T, D]; with `meanwhile`, a pair of that and what `meanwhile` gave.
        """
        rows_ND = x_TD.index_select(0, plan.token_ids_N)
        rows_ND, aside = self._answer_elsewhere(
            rows_ND, plan.tokens_per_expert_E.tolist(), meanwhile)
        wide = torch.promote_types(rows_ND.dtype, torch.float32)  # as the whole stack sums
        weighted_ND = rows_ND.to(wide) * plan.weights_N.to(wide).unsqueeze(1)
        y_TD = weighted_ND.new_zeros(x_TD.shape).index_add(0, plan.token_ids_N, weighted_ND)
        y_TD = y_TD.to(x_TD.dtype)
        return (y_TD, aside) if meanwhile else y_TD

    def _answer_elsewhere(
        self, rows_ND: Tensor, counts: Sequence[int], meanwhile: Callable[[], Any] | None
    ) -> tuple[Tensor, Any]:
        """[N, D], what the experts of all processes give for rows sorted by expert; and what
        `meanwhile` gave."""
        places = self.groups.size
        held = self.num_experts // places
        incoming = self._exchange_counts(counts, self.groups, rows_ND.device)
        outgoing = [list(counts[r * held : (r + 1) * held]) for r in range(places)]

        rows_ND = _reorder(rows_ND, counts, self._order)
        sizes = [sum(outgoing[r][e] for r in range(places) for e in chunk)
                 for chunk in self._chunks]
        weights = self._weights()
        parts = [dict(zip(weights, part, strict=True)) for part in zip(
            *(w.split([len(chunk) for chunk in self._chunks]) for w in weights.values()),
            strict=True)] if len(self._chunks) > 1 else [weights]

        ways, under_way = [], []
        for chunk, rows in zip(self._chunks, rows_ND.split(sizes), strict=True):
            way = self._exchange([sum(row[e] for e in chunk) for row in outgoing],
                                 [sum(row[e] for e in chunk) for row in incoming])
            ways.append(way)
            under_way.append(way.begin(rows))
        aside = meanwhile() if meanwhile else None
        answers, back = [], []
        for chunk, way, begun, part in zip(self._chunks, ways, under_way, parts, strict=True):
            answer = self._answer_received(way.finish(begun), incoming, chunk, part)
            back.append(self._exchange(way.receive, way.send))
            answers.append(back[-1].begin(answer))
        came = [way.finish(begun) for way, begun in zip(back, answers, strict=True)]
        rows_ND = torch.cat(came) if len(came) > 1 else came[0]
        return _reorder(rows_ND, [counts[e] for e in self._order], self._place), aside

    def _answer_received(
        self, rows: Tensor, incoming: list[list[int]], chunk: range, weights: dict[str, Tensor]
    ) -> Tensor:
        """Answers to rows that came sorted by process, then expert; in the same order."""
        places, width = len(incoming), len(chunk)
        counts = [incoming[r][e] for r in range(places) for e in chunk]
        by_expert = [r * width + e for e in range(width) for r in range(places)]
        rows = _reorder(rows, counts, by_expert)
        rows = self._grouped(rows, [sum(counts[e::width]) for e in range(width)], weights)
        by_place = [e * places + r for r in range(places) for e in range(width)]
        return _reorder(rows, [counts[i] for i in by_expert], by_place)


def _reorder(rows: Tensor, counts: Sequence[int], order: Sequence[int]) -> Tensor:
    """Segments of rows in another order, as one tensor."""
    if list(order) == list(range(len(order))):
        return rows
    segments = rows.split(list(counts))
    return torch.cat([segments[i] for i in order])
