"""What gates with a number of picks share."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, check_number


@dataclass
class TopKCountOptions(ModelOptions):
    """For gates with a number of picks."""

    moe_top_k: int = field(
        default=2,
        metadata={"help": "candidates that a token goes to (dselect_k: selectors of a token; "
                          "relu: the mean number that the L1 loss leads to)"},
    )


@dataclass
class PriorityOptions(ModelOptions):
    """For gates that can let the surest tokens go first."""

    moe_batch_prioritized_routing: bool = field(
        default=False,
        metadata={"help": "under a capacity, tokens with the largest top score go first"},
    )


def validate_top_k(options: TopKCountOptions, expert_counts: Sequence[int]) -> None:
    """Raise `OptionError` unless every layer has as many candidates as picks."""
    check_number(options, "moe_top_k", least=1, remedy="give 1 or more")
    candidates = min(expert_counts) + options.moe_null_experts
    if options.moe_top_k > candidates:
        raise OptionError("moe_top_k", options.moe_top_k,
                          f"an MoE layer has {candidates} candidates: give at most that, or a "
                          "larger --moe-expert-count")


def validate_priority(options: PriorityOptions) -> list[str]:
    """Warnings; raises `OptionError` if batch-prioritised routing has nothing to order."""
    if not options.moe_batch_prioritized_routing:
        return []
    if options.moe_capacity_factor is None:
        raise OptionError("moe_batch_prioritized_routing", True,
                          "no expert has a capacity in training: leave it out, or give "
                          "--moe-capacity-factor")
    if options.moe_drop_policy not in (None, "position"):
        raise OptionError("moe_drop_policy", options.moe_drop_policy,
                          "--moe-batch-prioritized-routing says who goes first: leave one of "
                          "them out")
    return ["--moe-batch-prioritized-routing: in training, later tokens can displace earlier ones, "
            "which is not causal; evaluation has no capacity by default"]


def best(scores_TC: Tensor) -> Tensor:
    """bool [T, C]: the largest of each row, the first of equals."""
    mask_TC = torch.zeros_like(scores_TC, dtype=torch.bool)
    return mask_TC.scatter_(1, scores_TC.argmax(1, keepdim=True), True)
