"""Shared by gates that select a fixed number of candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, flag, is_causal
from evomoe_plugin.config.values import check_number
from evomoe_plugin.routing import kernels


@dataclass
class TopKCountOptions(ModelOptions):
    """For gates that select k candidates per token."""

    moe_top_k: int = flag(
        2,
        "candidates per token (dselect_k: selectors per token; relu: mean number of experts per "
        "token that the L1 loss aims at)",
    )


@dataclass
class PriorityOptions(ModelOptions):
    """For gates that can order tokens by confidence under a capacity."""

    moe_batch_prioritized_routing: bool = flag(
        False, "under a capacity, tokens with the largest top score have priority"
    )


def validate_top_k(options: TopKCountOptions, expert_counts: Sequence[int]) -> None:
    """Raise `OptionError` unless every layer has at least `moe_top_k` candidates."""
    check_number(options, "moe_top_k", "[1, inf)", "give 1 or more")
    candidates = min(expert_counts) + options.moe_null_experts
    if options.moe_top_k > candidates:
        raise OptionError(
            "moe_top_k",
            options.moe_top_k,
            f"an MoE layer has {candidates} candidates: give at most that, or a "
            "larger --moe-expert-count",
        )


def validate_priority(options: PriorityOptions) -> list[str]:
    """Warnings; raises `OptionError` if batch-prioritised routing has nothing to order."""
    if not options.moe_batch_prioritized_routing:
        return []
    if options.moe_capacity_factor is None:
        raise OptionError(
            "moe_batch_prioritized_routing",
            True,
            "experts have no capacity in training: leave it out, or give --moe-capacity-factor",
        )
    if options.moe_drop_policy not in (None, "position"):
        raise OptionError(
            "moe_drop_policy",
            options.moe_drop_policy,
            "--moe-batch-prioritized-routing already sets the priority: leave one of them out",
        )
    if not is_causal(options):
        return []
    return [
        "--moe-batch-prioritized-routing: in training, later tokens can displace earlier ones, "
        "which is not causal; evaluation has no capacity by default"
    ]


def selection_mask(ids_TK: Tensor, num_candidates: int) -> Tensor:
    """bool [T, C], True at the candidates `ids_TK` of each token."""
    mask_TC = torch.zeros(ids_TK.size(0), num_candidates, dtype=torch.bool, device=ids_TK.device)
    return mask_TC.scatter_(1, ids_TK, True)


def best(scores_TC: Tensor, k: int = 1) -> Tensor:
    """bool [T, C]: the k largest scores of each row; of one, the first on ties."""
    if kernels.usable(scores_TC.device):
        from evomoe_plugin.routing.kernels.best import best_mask

        return best_mask(scores_TC, k)
    ids_TK = scores_TC.argmax(1, keepdim=True) if k == 1 else scores_TC.topk(k, dim=1).indices
    return selection_mask(ids_TK, scores_TC.size(1))


def normalized(values_TC: Tensor, mask_TC: Tensor) -> Tensor:
    """Values scaled so that those in the mask sum to 1 in each row."""
    total_T1 = (values_TC * mask_TC).sum(1, keepdim=True)
    return values_TC / total_T1.clamp(min=torch.finfo(values_TC.dtype).tiny)
