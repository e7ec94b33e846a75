"""Routing statistics: sums while they travel, ratios when they are read.

A gate fills a plan's `stats` with sums over tokens. Sums may be added over micro-batches and
ranks; `summarize` turns them into what a person reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Every gate fills these; scalars unless a trailing letter names their shape.
TOKENS = "tokens"  # tokens that are not padding
PAIRS = "pairs"  # routed pairs
LOAD_E = "tokens_per_expert"  # pairs of each expert, [E]
ENTROPY = "entropy"  # sum over tokens of the gate's entropy, in nats
NONFINITE = "nonfinite"  # gate logits that are NaN or infinite
TEMPERATURE = "temperature"  # temperature, summed over tokens


def routing_stats(
    probs_TE: Tensor,
    logits_TE: Tensor,
    tokens_per_expert_E: Tensor,
    token_mask_T: Tensor | None,
) -> dict[str, Tensor]:
    """The statistics that every gate owes, detached, in fp64.

    Args:
        probs_TE: the gate's distribution over experts.
        logits_TE: what it was computed from, before noise and temperature.
        tokens_per_expert_E: pairs of each expert.
        token_mask_T: bool, False for padding.
    """
    with torch.no_grad():
        entropy_T = torch.special.entr(probs_TE).sum(1)
        bad_T = ~torch.isfinite(logits_TE).all(1)
        if token_mask_T is not None:
            entropy_T, bad_T = entropy_T * token_mask_T, bad_T & token_mask_T
            tokens = token_mask_T.sum()
        else:
            tokens = torch.tensor(probs_TE.size(0), device=probs_TE.device)
        load_E = tokens_per_expert_E.double()
        return {
            TOKENS: tokens.double(),
            PAIRS: load_E.sum(),
            LOAD_E: load_E,
            ENTROPY: entropy_T.sum(dtype=torch.float64),
            NONFINITE: bad_T.sum().double(),
        }


def summarize(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Readable numbers from summed statistics of L layers.

    Args:
        stats: name -> [L], and `tokens_per_expert` -> [L, E], where a layer with fewer experts
            than E is filled with NaN.
    Returns:
        experts_per_token, dead_experts (share of experts without a token), load_max (largest
        load over the mean load, averaged over layers), gate_entropy (nats), and temperature where
        the gate has one.
    """
    tokens_L = stats[TOKENS].clamp(min=1)
    load_LE = stats[LOAD_E]
    mean_L = load_LE.nanmean(1)
    peak_L = torch.nan_to_num(load_LE, nan=0.0).amax(1)
    numbers = {
        "experts_per_token": (stats[PAIRS] / tokens_L).mean(),
        "dead_experts": (load_LE == 0).sum() / load_LE.isfinite().sum(),
        "load_max": (peak_L / mean_L.clamp(min=1e-12)).mean(),
        "gate_entropy": (stats[ENTROPY] / tokens_L).mean(),
    }
    if TEMPERATURE in stats:
        numbers[TEMPERATURE] = (stats[TEMPERATURE] / tokens_L).mean()
    return {name: float(value) for name, value in numbers.items()}
