"""Routing statistics: sums while they travel, ratios when they are read.

A gate fills a plan's `stats` with sums over tokens. Sums may be added over micro-batches and
ranks; `summarize` turns them into what a person reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evomoe_plugin.routing.choice import Choice

# Every layer fills these; scalars unless a trailing letter names their shape.
TOKENS = "tokens"  # tokens that are not padding
PAIRS = "pairs"  # routed pairs that experts work on
LOAD_E = "tokens_per_expert"  # the same, of each expert, [E]
EXPERTS = "experts"  # experts that can be chosen, summed over tokens
ENTROPY = "entropy"  # sum over tokens of the gate's entropy, in nats
NONFINITE = "nonfinite"  # tokens whose gate logits are NaN or infinite
REQUESTED_C = "requested"  # picks of each candidate before any is dropped, [C]
# These where the layer has what they speak of.
DROPPED = "dropped"  # pairs dropped by the capacity
NULL_PAIRS = "null_pairs"  # picks of null experts
NULL_MASS = "null_mass"  # weight given to null experts, summed over tokens
TEMPERATURE = "temperature"  # temperature, summed over tokens
SENT_R = "sent"  # pairs that each of the processes that divide the experts sent to others, [R]
RECEIVED_R = "received"  # pairs that each of them got from others, [R]
COEFFICIENT = "coefficient"  # an adaptive coefficient, summed over tokens


def routing_stats(choice: Choice, token_mask_T: Tensor | None, num_experts: int) -> dict[
        str, Tensor]:
    """The statistics that every gate owes, detached, in fp64.

    Args:
        choice: what the gate chose, no padding in its mask.
        token_mask_T: bool, False for padding.
        num_experts: E; candidates beyond them are null experts.
    """
    probs_TC, logits_TC = choice.probs_TC.detach(), choice.logits_TC
    # Several times faster on a CPU than `special.entr` and `isfinite` of all of them.
    logs_TC = probs_TC.clamp(min=torch.finfo(probs_TC.dtype).tiny).log_()
    entropy_T = -(logs_TC.mul_(probs_TC).sum(1))
    looked_at_TC = probs_TC if logits_TC is None else logits_TC.detach()
    bad_T = ~torch.isfinite(looked_at_TC.abs().amax(1))
    tokens = torch.tensor(probs_TC.size(0), device=probs_TC.device)
    if token_mask_T is not None:
        entropy_T = entropy_T.masked_fill(~token_mask_T, 0.0)
        bad_T = bad_T & token_mask_T
        tokens = token_mask_T.sum()
    load_C = choice.mask_TC.sum(0).double()
    stats = {
        TOKENS: tokens.double(),
        PAIRS: load_C[:num_experts].sum(),
        LOAD_E: load_C[:num_experts],
        REQUESTED_C: load_C,
        EXPERTS: tokens.double() * num_experts,
        ENTROPY: entropy_T.sum(dtype=torch.float64),
        NONFINITE: bad_T.sum().double(),
    }
    if load_C.size(0) > num_experts:
        stats[NULL_PAIRS] = load_C[num_experts:].sum()
    # A gate may know better, of experts say.
    return stats | {name: value.detach().double() for name, value in choice.stats.items()}


def is_logged(name: str, value: Tensor) -> bool:
    """Whether a layer's statistic is logged; other vectors are for the gate's `after_update`."""
    return value.dim() == 0 or name in (LOAD_E, SENT_R, RECEIVED_R)


def summarize(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Readable numbers from summed statistics of L layers.

    Args:
        stats: name -> [L], and `tokens_per_expert` -> [L, E], where a layer with fewer experts
            than E is filled with NaN.
    Returns:
        experts_per_token, dead_experts (share of experts without a token), load_max (largest
        load over the mean load, averaged over layers), load_cv2 (squared coefficient of variation
        of the load), gate_entropy (nats), and, where the layers have what it speaks of:
        temperature, coefficient, null_rate and null_mass (picks of null experts and their weight,
        a token), overflow (share of pairs dropped) and overflow_N for the N-th MoE layer,
        active_experts; where experts are divided over processes: ep_sent (pairs that travel, a
        token), ep_sent_max and ep_received_max (most of a process over the mean of them), and
        ep_load_max (pairs that the busiest process works on over the mean).
    """
    # LayerDrop leaves layers out; they have nothing to say of this batch.
    present_L = stats[TOKENS] > 0
    stats = {name: value[present_L] for name, value in stats.items()}
    ids = present_L.nonzero().flatten().tolist()
    tokens_L, load_LE = stats[TOKENS], stats[LOAD_E]
    experts_L = stats[EXPERTS] / tokens_L
    slots_L = load_LE.isfinite().sum(1)
    load_LE = torch.nan_to_num(load_LE, nan=0.0)
    used_L = (load_LE > 0).sum(1)
    # What the mean load is over: experts that can be chosen, also where slots stand empty.
    mean_L = stats[PAIRS] / experts_L.clamp(min=1)
    square_L = mean_L.square().clamp(min=1e-24)
    numbers = {
        "experts_per_token": (stats[PAIRS] / tokens_L).mean(),
        "dead_experts": ((experts_L - used_L).clamp(min=0).sum() / experts_L.sum().clamp(min=1)),
        "load_max": (load_LE.amax(1) / mean_L.clamp(min=1e-12)).mean(),
        "load_cv2": (load_LE.square().sum(1) / experts_L.clamp(min=1) / square_L - 1).mean(),
        "gate_entropy": (stats[ENTROPY] / tokens_L).mean(),
    }
    for name in (TEMPERATURE, COEFFICIENT):
        if name in stats:
            numbers[name] = (stats[name] / tokens_L).mean()
    if NULL_PAIRS in stats:
        numbers["null_rate"] = (stats[NULL_PAIRS] / tokens_L).mean()
        numbers["null_mass"] = (stats[NULL_MASS] / tokens_L).mean()
    if DROPPED in stats:
        overflow_L = stats[DROPPED] / (stats[DROPPED] + stats[PAIRS]).clamp(min=1)
        numbers["overflow"] = overflow_L.mean()
        numbers |= {f"overflow_{n}": value for n, value in zip(ids, overflow_L, strict=True)}
    if SENT_R in stats:
        numbers["ep_sent"] = (stats[SENT_R].sum(1) / tokens_L).mean()
        places = stats[SENT_R].size(1)
        loads = {
            "ep_sent_max": stats[SENT_R],
            "ep_received_max": stats[RECEIVED_R],
            "ep_load_max": torch.stack([  # layers differ in their number of experts
                load_E[:slots].view(places, -1).sum(1)
                for load_E, slots in zip(load_LE, slots_L.tolist(), strict=True)]),
        }
        for name, load_LR in loads.items():
            numbers[name] = (load_LR.amax(1) / load_LR.mean(1).clamp(min=1e-12)).mean()
    if (experts_L != slots_L).any():
        numbers["active_experts"] = experts_L.mean()
    return {name: float(value) for name, value in numbers.items()}
