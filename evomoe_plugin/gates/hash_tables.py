"""Tables from token ids to experts, fixed before training (Hash layers, arXiv 2106.04426)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from evomoe_plugin.routing import noise


def random_table(vocabulary: int, num_experts: int, layer_id: int, seed: int) -> Tensor:
    """The expert of each token id, int64 [V], by a hash of id, layer and seed."""
    key = torch.tensor(_HASH_STREAM)
    for part in (seed, layer_id):
        key = noise.fold(key, part)
    return noise.fold(key, torch.arange(vocabulary)).remainder(num_experts)


def balanced_table(counts_V: Sequence[int], num_experts: int) -> Tensor:
    """Assign token ids by falling frequency, each to the expert with the least mass so far.

    Args:
        counts_V: how often each token id occurs. 0 counts as half a token, so that such ids are
            spread too.
    Returns:
        int64 [V]; the same in every layer.
    """
    masses = [(0.0, 0, expert) for expert in range(num_experts)]  # tokens, ids, expert
    table = [0] * len(counts_V)
    for token_id in _by_falling_frequency(counts_V):
        mass, ids, expert = masses[0]
        table[token_id] = expert
        heapq.heapreplace(masses, (mass + _mass(counts_V[token_id]), ids + 1, expert))
    return torch.tensor(table, dtype=torch.int64)


def clustered_table(counts_V: Sequence[int], num_experts: int) -> Tensor:
    """Token ids by falling frequency, cut into runs of nearly equal mass.

    A run ends where it is nearest to an equal share of the remaining mass. Every expert has a token
    id if there are at least as many ids as experts.

    Returns:
        int64 [V]; the same in every layer.
    """
    order = _by_falling_frequency(counts_V)
    left = sum(map(_mass, counts_V))
    table, expert, mass = [0] * len(order), 0, 0.0
    for place, token_id in enumerate(order):
        more, after = _mass(counts_V[token_id]), num_experts - expert - 1
        overshoots = 2 * mass + more > 2 * left / (after + 1)
        if after and mass and (overshoots or len(order) - place <= after):
            left, mass, expert = left - mass, 0.0, expert + 1
        table[token_id] = expert
        mass += more
    return torch.tensor(table, dtype=torch.int64)


def _by_falling_frequency(counts_V: Sequence[int]) -> list[int]:
    return sorted(range(len(counts_V)), key=lambda token_id: -counts_V[token_id])


def _mass(count: int) -> float:
    return max(count, 0.5)


_HASH_STREAM = 0x4A54  # separates these random numbers from the noise of gates
