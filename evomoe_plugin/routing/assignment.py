"""Balanced assignment: equal numbers of tokens per expert, with the largest total score.

An auction on the T x E scores finds prices of the experts and a nearly optimal assignment;
exchanges between experts complete it. No T x T matrix is built.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-5
"""The total is within `EPSILON * (T + E) * spread` of the optimum, where spread is the largest
difference between two scores of one token."""

# Descending: coarse prices take few rounds, and finer ones start from them.
_EPSILONS = (0.1, 0.01, 1e-3, 1e-4)
# Rounds per epsilon; tokens unsold after the last one are filled in, then improved by exchanges.
_ROUNDS = 50
# Share of unsold tokens at which an epsilon ends: the last tokens take the most rounds.
_LEFT = 0.02
# Bound on exchanges per expert, far above what is needed.
_EXCHANGES = 200


def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """The expert of each token: floor(T / E) or ceil(T / E) tokens each, the total score maximal.

    Which experts get ceil(T / E) is part of the optimisation. The counts are exact, the total is
    optimal to `EPSILON`. Deterministic; always terminates.

    Args:
        scores_TE: NaN counts as 0, Inf as a very large number.
    Returns:
        int64 [T].
    Source: the auction with similar objects (Bertsekas, Castañon, "The auction algorithm for the
    transportation problem", 1989); the problem is that of BASE layers (arXiv 2103.16716).
    """
    T, E = scores_TE.shape
    if T == 0 or E == 1:
        return torch.zeros(T, dtype=torch.int64, device=scores_TE.device)
    values_TE = torch.nan_to_num(scores_TE.detach().double(), nan=0.0).clamp(-1e300, 1e300)
    # A constant added to a token's scores does not matter.
    values_TE = values_TE - values_TE.amax(1, keepdim=True)
    spread = -values_TE.amin()
    values_TE = values_TE / torch.where(spread > 0, spread, torch.ones_like(spread))
    return _exchange(values_TE, _auction(values_TE))


def _auction(values_TE: Tensor) -> Tensor:
    T, E = values_TE.shape
    price_E = torch.zeros_like(values_TE[0])
    # The most expensive experts get the extra tokens; before there are prices, the most preferred.
    demand_E = torch.bincount(values_TE.argmax(1), minlength=E)
    for epsilon in _EPSILONS:
        capacity_E = torch.full((E,), T // E, dtype=torch.int64, device=values_TE.device)
        capacity_E[demand_E.argsort(descending=True, stable=True)[: T % E]] += 1
        # An expert without capacity costs more than any token can gain.
        price_E = torch.where(capacity_E > 0, price_E.clamp(max=4.0 * E), 8.0 * E)
        expert_T, price_E = _sell(values_TE, price_E, capacity_E, epsilon)
        demand_E = price_E
    return _give_away(values_TE, expert_T, capacity_E)


def _sell(
    values_TE: Tensor, price_E: Tensor, capacity_E: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Tokens bid the gain of their best expert over the second best; the highest bids win.

    Returns:
        the expert of each token, -1 if unsold, and the prices.
    """
    T, E = values_TE.shape
    place_T = torch.arange(T, device=values_TE.device)
    expert_T = torch.full_like(place_T, -1)
    bid_T = torch.zeros_like(values_TE[:, 0])
    for _ in range(_ROUNDS):
        free_N = (expert_T < 0).nonzero().squeeze(1)
        if free_N.numel() <= _LEFT * T:
            break
        worth_NE = values_TE[free_N] - price_E
        best, index = worth_NE.topk(2, dim=1)
        expert_T[free_N] = index[:, 0]
        bid_T[free_N] = price_E[index[:, 0]] + best[:, 0] - best[:, 1] + epsilon
        order_T = bid_T.argsort(descending=True, stable=True)
        order_T = order_T[expert_T[order_T].argsort(stable=True)]
        sorted_T = expert_T[order_T]
        count_E = torch.bincount(sorted_T, minlength=E)
        end_E = count_E.cumsum(0)
        start_E = end_E - count_E
        rank_T = place_T - start_E[sorted_T]
        expert_T[order_T[rank_T >= capacity_E[sorted_T]]] = -1
        last_E = (start_E + capacity_E - 1).clamp(0, T - 1)
        full_E = (count_E >= capacity_E) & (capacity_E > 0)
        price_E = torch.where(full_E, bid_T[order_T[last_E]], price_E)
    return expert_T, price_E


def _give_away(values_TE: Tensor, expert_T: Tensor, capacity_E: Tensor) -> Tensor:
    """Each expert in turn fills its free slots with the unsold tokens that lose most elsewhere."""
    E = values_TE.size(1)
    free_E = capacity_E - torch.bincount(expert_T[expert_T >= 0], minlength=E)
    for expert, free in enumerate(free_E.tolist()):
        if free:
            free_N = (expert_T < 0).nonzero().squeeze(1)
            others_N = (
                values_TE[free_N]
                .index_fill(1, torch.tensor([expert], device=free_N.device), -2.0)
                .amax(1)
            )
            gain_N = values_TE[free_N, expert] - others_N
            order_N = gain_N.argsort(descending=True, stable=True)
            expert_T[free_N[order_N[:free]]] = expert
    return expert_T


def _exchange(values_TE: Tensor, expert_T: Tensor) -> Tensor:
    """Move tokens along cycles of experts while a cycle gains more than `EPSILON` per token.

    If no cycle does, no other assignment gains more than that per token either.
    """
    T, E = values_TE.shape
    loss_EE = np.full((E, E), np.inf)  # of the token that loses least when moved from a to b
    token_EE = np.zeros((E, E), dtype=np.int64)
    count_E = torch.bincount(expert_T, minlength=E).cpu().numpy()
    changed = list(range(E))
    for _ in range(_EXCHANGES * E):
        for a in changed:
            members_N = (expert_T == a).nonzero().squeeze(1)
            loss_EE[a] = np.inf
            if members_N.numel():
                own_N = values_TE[members_N]
                loss_E, at_E = (own_N[:, a : a + 1] - own_N).min(0)
                loss_EE[a] = loss_E.cpu().numpy()
                token_EE[a] = members_N[at_E].cpu().numpy()
        # An expert with one token less than another may get one more: the cycle is then open, and
        # no token moves from its end to its start.
        open_EE = (count_E == T // E)[:, None] & (count_E > T // E)[None, :] & (loss_EE > 0)
        cycle = _negative_cycle(np.where(open_EE, 0.0, loss_EE) + EPSILON)
        if not cycle:
            break
        for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            if open_EE[a, b]:
                count_E[a] += 1
                count_E[b] -= 1
            else:
                expert_T[token_EE[a, b]] = b
        changed = cycle
    return expert_T


def _negative_cycle(cost_EE: np.ndarray) -> list[int]:
    """Nodes of a cycle of negative cost, in order; empty if there is none (Bellman-Ford)."""
    E = cost_EE.shape[0]
    np.fill_diagonal(cost_EE, np.inf)
    distance_E, before_E = np.zeros(E), np.full(E, -1)
    for _ in range(E):
        through_EE = distance_E[:, None] + cost_EE
        best_E = through_EE.argmin(0)
        shorter_E = through_EE[best_E, np.arange(E)]
        better_E = shorter_E < distance_E - EPSILON * 1e-6
        if not better_E.any():
            return []
        distance_E = np.where(better_E, shorter_E, distance_E)
        before_E = np.where(better_E, best_E, before_E)
    node = int(better_E.nonzero()[0][0])
    for _ in range(E):
        node = int(before_E[node])
    cycle = [node]
    while (node := int(before_E[node])) != cycle[0]:
        cycle.append(node)
    return cycle[::-1]
