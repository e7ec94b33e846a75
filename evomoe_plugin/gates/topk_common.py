"""Shared by gates that select a fixed number of candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, flag, is_causal
from evomoe_plugin.config.values import check_number
from evomoe_plugin.routing import kernels, waits


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
    """bool [T, C]: the k largest scores of each row (all, if there are fewer); the first on ties;
    NaN is the largest."""
    if kernels.usable(scores_TC.device):
        from evomoe_plugin.routing.kernels.best import best_mask

        return best_mask(scores_TC, k)
    return selection_mask(_ids_of_best(scores_TC.detach(), k), scores_TC.size(1))


def _ids_of_best(scores_TC: Tensor, k: int) -> Tensor:
    """int64 [T, K]."""
    if k == 1:
        return scores_TC.argmax(1, keepdim=True)
    if waits.waiting_costs(scores_TC.device) or torch.compiler.is_compiling():
        return _sorted(scores_TC)[:, :k]
    # On a CPU topk is many times faster than sorting, but takes any of those that tie.
    values, ids = scores_TC.topk(min(k + 1, scores_TC.size(1)), dim=1)
    ids = ids[:, :k]
    is_clear = values[:, k - 1 : -1] > values[:, k:]
    if k and not is_clear.all():
        is_tied = ~is_clear.squeeze(1)
        ids[is_tied] = _sorted(scores_TC[is_tied])[:, :k]
    return ids


def _sorted(scores_TC: Tensor) -> Tensor:
    """Candidates, the largest score first."""
    return scores_TC.argsort(dim=1, descending=True, stable=True)


def normalized(values_TC: Tensor, mask_TC: Tensor) -> Tensor:
    """Values scaled so that those in the mask sum to 1 in each row."""
    total_T1 = (values_TC * mask_TC).sum(1, keepdim=True)
    return values_TC / total_T1.clamp(min=torch.finfo(values_TC.dtype).tiny)
