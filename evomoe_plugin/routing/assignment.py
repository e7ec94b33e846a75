"""Balanced assignment: every expert gets its equal share of tokens, at the largest total score.

An auction on the T x E scores finds prices of the experts and nearly the best assignment; exchanges
between experts do the rest. No T x T matrix is ever made.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-5
"""The total is within `EPSILON * (T + E) * spread` of the best one, where spread is the largest
difference between two scores of one token."""

# Large first: coarse prices are found in few rounds, and fine ones start from them.
_EPSILONS = (0.1, 0.01, 1e-3, 1e-4)
# Rounds of one epsilon; what is unsold after the last is given away, and exchanges repair it.
_ROUNDS = 50
# An epsilon ends when so small a share of the tokens is left: the last ones take the most rounds.
_LEFT = 0.02
# Exchanges for each expert: a bound, far above what they take.
_EXCHANGES = 200


def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """The expert of each token: floor(T / E) or ceil(T / E) tokens each, the total score maximal.

    Which experts take the odd tokens is part of what is maximised. The counts are exact always,
    the total is to `EPSILON`. Deterministic; it always ends.

    Args:
        scores_TE: NaN counts as 0, infinity as a very large number.
    Returns:
        int64 [T].
    Source: the auction with similar objects (Bertsekas, Castañon, "The auction algorithm for the
    transportation problem", 1989); BASE layers (arXiv 2103.16716) have the task.
    """
    T, E = scores_TE.shape
    if T == 0 or E == 1:
        return torch.zeros(T, dtype=torch.int64, device=scores_TE.device)
    values_TE = torch.nan_to_num(scores_TE.detach().double(), nan=0.0).clamp(-1e300, 1e300)
    # What a token scores everywhere alike decides nothing.
    values_TE = values_TE - values_TE.amax(1, keepdim=True)
    spread = -values_TE.amin()
    values_TE = values_TE / torch.where(spread > 0, spread, torch.ones_like(spread))
    return _exchange(values_TE, _auction(values_TE))


def _auction(values_TE: Tensor) -> Tensor:
    T, E = values_TE.shape
    price_E = torch.zeros_like(values_TE[0])
    # The dearest experts take the odd tokens; before there are prices, the most wanted ones.
    dear_E = torch.bincount(values_TE.argmax(1), minlength=E)
    for epsilon in _EPSILONS:
        capacity_E = torch.full((E,), T // E, dtype=torch.int64, device=values_TE.device)
        capacity_E[dear_E.argsort(descending=True, stable=True)[: T % E]] += 1
        # An expert without room costs more than any token can gain by it.
        price_E = torch.where(capacity_E > 0, price_E.clamp(max=4.0 * E), 8.0 * E)
        expert_T, price_E = _sell(values_TE, price_E, capacity_E, epsilon)
        dear_E = price_E
    return _give_away(values_TE, expert_T, capacity_E)


def _sell(values_TE: Tensor, price_E: Tensor, capacity_E: Tensor, epsilon: float
          ) -> tuple[Tensor, Tensor]:
    """Tokens bid what their best expert is worth to them above the next one; the highest stay.

    Returns:
        the expert of each token, -1 for those still without, and the prices.
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
    """Each expert in turn fills its room with the unsold tokens that would lose most elsewhere."""
    E = values_TE.size(1)
    room_E = capacity_E - torch.bincount(expert_T[expert_T >= 0], minlength=E)
    for expert, room in enumerate(room_E.tolist()):
        if room:
            free_N = (expert_T < 0).nonzero().squeeze(1)
            others_N = values_TE[free_N].index_fill(
                1, torch.tensor([expert], device=free_N.device), -2.0).amax(1)
            gain_N = values_TE[free_N, expert] - others_N
            order_N = gain_N.argsort(descending=True, stable=True)
            expert_T[free_N[order_N[:room]]] = expert
    return expert_T


def _exchange(values_TE: Tensor, expert_T: Tensor) -> Tensor:
    """Let tokens change places in rings as long as a ring gains more than `EPSILON` a token.

    When no ring of experts does, no other assignment gains more than that a token either.
    """
    T, E = values_TE.shape
    loss_EE = np.full((E, E), np.inf)  # of the token that loses least by going from a to b
    token_EE = np.zeros((E, E), dtype=np.int64)
    count_E = torch.bincount(expert_T, minlength=E).cpu().numpy()
    changed = range(E)
    for _ in range(_EXCHANGES * E):
        for a in changed:
            members_N = (expert_T == a).nonzero().squeeze(1)
            loss_EE[a] = np.inf
            if members_N.numel():
                own_N = values_TE[members_N]
                loss_E, at_E = (own_N[:, a : a + 1] - own_N).min(0)
                loss_EE[a] = loss_E.cpu().numpy()
                token_EE[a] = members_N[at_E].cpu().numpy()
        # An expert with one token less than another may become the one with more: the ring is
        # then open, and no token goes from the end to the start.
        open_EE = (count_E == T // E)[:, None] & (count_E > T // E)[None, :] & (loss_EE > 0)
        ring = _losing_ring(np.where(open_EE, 0.0, loss_EE) + EPSILON)
        if not ring:
            break
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
            if open_EE[a, b]:
                count_E[a] += 1
                count_E[b] -= 1
            else:
                expert_T[token_EE[a, b]] = b
        changed = ring
    return expert_T


def _losing_ring(cost_EE: np.ndarray) -> list[int]:
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
    ring = [node]
    while (node := int(before_E[node])) != ring[0]:
        ring.append(node)
    return ring[::-1]
