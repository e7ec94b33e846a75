"""Routing statistics: sums over tokens, and the numbers that are logged.

A plan's `stats` are sums over tokens, which may be added over micro-batches and ranks; `summarize`
turns them into means and ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.routing import kernels, waits
from evomoe_plugin.routing.choice import Choice

# Of every layer; scalars unless the name ends in a shape suffix.
TOKENS = "tokens"  # tokens that are not padding
PAIRS = "pairs"  # routed pairs after capacity
LOAD_E = "tokens_per_expert"  # the same, of each expert, [E]
WEIGHT_E = "weight_per_expert"  # sum of the combine weights of its pairs, [E]; on request
EXPERTS = "experts"  # experts that can be selected, summed over tokens
ENTROPY = "entropy"  # sum over tokens of the gate's entropy, in nats
NONFINITE = "nonfinite"  # tokens whose gate logits are NaN/Inf
REQUESTED_C = "requested"  # pairs of each candidate before capacity, [C]
# Of layers with the respective feature.
GATE_INPUT_D = "gate_input"  # the gate's input, [D]
BEST_C = "best"  # tokens that have it among their k best candidates, [C]
WEIGHTS_2 = "weights"  # combine weights of selected candidates; tokens that have one, [2]
DROPPED = "dropped"  # pairs dropped by the capacity
NULL_PAIRS = "null_pairs"  # pairs of null experts
NULL_MASS = "null_mass"  # weight given to null experts, summed over tokens
TEMPERATURE = "temperature"  # temperature, summed over tokens
SENT_R = "sent"  # pairs sent by each expert-parallel rank to others, [R]
RECEIVED_R = "received"  # pairs received by each of them, [R]
COEFFICIENT = "coefficient"  # an adaptive coefficient, summed over tokens
# Prefixes of names of statistics and losses: of models with one stack of layers, and of the encoder
# and the decoder of those with two.
STACKS = ("", "encoder_", "decoder_")
# Prefixes in a criterion's logging output: of statistics, and of the FLOPs of a forward pass by
# stack.
LOGGED, FLOPS = "moe_stats_", "moe_flops_"
# Vectors over experts, which are padded where layers differ in E.
PER_EXPERT = (LOAD_E, WEIGHT_E)
# Of each token, on request (`routing.stability`); these are no sums.
FIRST_EXPERT_T = "first_expert"
COMBINE_WEIGHT_T = "combine_weight"
OF_TOKENS = (FIRST_EXPERT_T, COMBINE_WEIGHT_T)


def routing_stats(
    choice: Choice, token_mask_T: Tensor | None, num_experts: int
) -> dict[str, Tensor]:
    """The statistics of every gate, detached, fp64.

    Args:
        choice: of the gate, without padding in its mask.
        token_mask_T: bool, False for padding.
        num_experts: E; candidates beyond them are null experts.
    """
    probs_TC, logits_TC = choice.probs_TC.detach(), choice.logits_TC
    checked_TC = probs_TC if logits_TC is None else logits_TC.detach()
    if kernels.usable(probs_TC.device):
        from evomoe_plugin.routing.kernels.sums import sums

        found = sums(choice.mask_TC, probs_TC, checked_TC, token_mask_T, num_experts)
    else:
        found = _sums(choice.mask_TC, probs_TC, checked_TC, token_mask_T, num_experts)
    load_C, tokens, pairs, null_pairs, experts, entropy, nonfinite = found
    stats = {
        TOKENS: tokens,
        PAIRS: pairs,
        LOAD_E: load_C[:num_experts],
        REQUESTED_C: load_C,
        EXPERTS: experts,
        ENTROPY: entropy,
        NONFINITE: nonfinite,
    }
    if load_C.size(0) > num_experts:
        stats[NULL_PAIRS] = null_pairs
    # A gate may replace some, for example EXPERTS.
    return stats | {name: value.detach().double() for name, value in choice.stats.items()}


def _sums(
    mask_TC: Tensor,
    probs_TC: Tensor,
    checked_TC: Tensor,
    token_mask_T: Tensor | None,
    num_experts: int,
) -> tuple[Tensor, ...]:
    """As `kernels.sums.sums`."""
    if waits.waiting_costs(probs_TC.device):  # fewer kernels
        entropy_T = torch.special.entr(probs_TC).sum(1)
        bad_T = ~(torch.linalg.vector_norm(checked_TC, torch.inf, 1) < torch.inf)
    else:  # several times faster on a CPU
        logs_TC = probs_TC.clamp(min=torch.finfo(probs_TC.dtype).tiny).log_()
        entropy_T = -(logs_TC.mul_(probs_TC).sum(1))
        bad_T = ~torch.isfinite(checked_TC.abs().amax(1))
    load_C = mask_TC.sum(0).double()
    tokens = load_C.new_full((), probs_TC.size(0))
    if token_mask_T is not None:
        entropy_T = entropy_T.masked_fill(~token_mask_T, 0.0)
        bad_T = bad_T & token_mask_T
        tokens = token_mask_T.sum().double()
    return (
        load_C,
        tokens,
        load_C[:num_experts].sum(),
        load_C[num_experts:].sum(),
        tokens * num_experts,
        entropy_T.sum(dtype=torch.float64),
        bad_T.sum().double(),
    )


def stack_of(name: str) -> str:
    """The prefix of a name, one of `STACKS`."""
    return next((prefix for prefix in STACKS[1:] if name.startswith(prefix)), "")


def totals(logging_outputs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Statistics summed over logging outputs: stack -> name -> [L] or [L, E].

    Only stacks whose statistics were logged are included.
    """
    found: dict[str, dict[str, Tensor]] = {stack: {} for stack in STACKS}
    for output in logging_outputs:
        for key, value in output.items():
            if key.startswith(LOGGED):
                name = key.removeprefix(LOGGED)
                stack = stack_of(name)
                of_stack, name = found[stack], name.removeprefix(stack)
                of_stack[name] = of_stack[name] + value if name in of_stack else value
    return {stack: stats for stack, stats in found.items() if stats}


def is_logged(name: str, value: Tensor) -> bool:
    """Whether a layer's statistic is logged; other vectors are for the gate's `after_update`."""
    return value.dim() == 0 or name in (*PER_EXPERT, SENT_R, RECEIVED_R)


def summarize(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers to log, from summed statistics of L layers.

    Args:
        stats: name -> [L], and `tokens_per_expert` -> [L, E], padded with NaN for
            layers with fewer than E experts.
    Returns:
        experts_per_token, dead_experts (share of experts without a token), load_max (largest
        load over the mean load, averaged over layers), load_cv2 (squared coefficient of variation
        of the load), gate_entropy (nats), and if available: temperature, coefficient, null_rate
        and null_mass (pairs of null experts and their weight, per token), overflow (share of
        dropped pairs) and overflow_N for the N-th MoE layer, active_experts; with expert
        parallelism: ep_sent (pairs sent to other ranks, per token), ep_sent_max and
        ep_received_max (maximum over ranks divided by the mean), and ep_load_max (pairs of the
        busiest rank divided by the mean).
    """
    # Layers skipped by LayerDrop have no statistics of this batch.
    present_L = stats[TOKENS] > 0
    stats = {name: value[present_L] for name, value in stats.items()}
    ids = present_L.nonzero().flatten().tolist()
    tokens_L, load_LE = stats[TOKENS], stats[LOAD_E]
    experts_L = stats[EXPERTS] / tokens_L
    slots_L = load_LE.isfinite().sum(1)
    load_LE = torch.nan_to_num(load_LE, nan=0.0)
    used_L = (load_LE > 0).sum(1)
    # Mean over experts that can be selected, without empty slots.
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
        ranks = stats[SENT_R].size(1)
        loads = {
            "ep_sent_max": stats[SENT_R],
            "ep_received_max": stats[RECEIVED_R],
            "ep_load_max": torch.stack(
                [  # layers may differ in E
                    load_E[:slots].view(ranks, -1).sum(1)
                    for load_E, slots in zip(load_LE, slots_L.tolist(), strict=True)
                ]
            ),
        }
        for name, load_LR in loads.items():
            numbers[name] = (load_LR.amax(1) / load_LR.mean(1).clamp(min=1e-12)).mean()
    if (experts_L != slots_L).any():
        numbers["active_experts"] = experts_L.mean()
    return {name: float(value) for name, value in numbers.items()}
