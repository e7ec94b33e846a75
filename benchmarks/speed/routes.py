"""Short gates as a user would write them, for the contenders of this folder.

Each returns the selected experts, bool [T, E], and all weights, [T, E], with gradient. Tests check
that they equal the gates of the same name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 0.001  # the default of --moe-gate-threshold
TOP_P = 0.7  # the default of --moe-top-p


def logits(x_TD: Tensor, weight_CD: Tensor) -> Tensor:
    """Logits in fp32, as usual for routers."""
    return F.linear(x_TD.float(), weight_CD.float())


def top_k(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best, with renormalized softmax weights (Mixtral, arXiv 2401.04088)."""
    best_TK, ids_TK = torch.softmax(logits_TE, 1).topk(k, dim=1)
    weights_TE = torch.zeros_like(logits_TE).scatter(
        1, ids_TK, best_TK / best_TK.sum(1, keepdim=True)
    )
    return torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, ids_TK, True), weights_TE


def dense_to_sparse(logits_TE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """All above a threshold and the best one (EvoMoE, arXiv 2112.14397); without noise."""
    gates_TE = torch.softmax(logits_TE / temperature, 1)
    best_T1 = gates_TE.argmax(1, keepdim=True)
    return (gates_TE > THRESHOLD).scatter(1, best_T1, True), gates_TE


def top_1(logits_TE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Hard routing after annealing."""
    gates_TE = torch.softmax(logits_TE / temperature, 1)
    best_T1 = gates_TE.argmax(1, keepdim=True)
    return torch.zeros_like(gates_TE, dtype=torch.bool).scatter(1, best_T1, True), gates_TE


def top_p(logits_TC: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The smallest set with enough probability (arXiv 2403.07652); null experts are last."""
    probs_TC = torch.softmax(logits_TC, 1)
    sorted_TC, order_TC = probs_TC.detach().sort(dim=1, descending=True, stable=True)
    before_TC = sorted_TC.cumsum(1) - sorted_TC
    mask_TC = torch.zeros_like(probs_TC, dtype=torch.bool).scatter(1, order_TC, before_TC < TOP_P)
    weights_TC = probs_TC / (probs_TC * mask_TC).sum(1, keepdim=True)
    return mask_TC[:, :num_experts], weights_TC[:, :num_experts]
