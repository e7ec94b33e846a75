"""Auxiliary losses: pure functions of tensors.

All take `weight_T`, the weight of each token in every mean: 0 for padding, which is ignored, 1 for
other tokens unless the task sets weights; None: 1 for all. All return a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(x_TC: Tensor, weight_T: Tensor | None) -> Tensor:
    """Weighted mean over tokens, [C]; 0 if all weights are 0."""
    if weight_T is None:
        return x_TC.mean(0) if x_TC.size(0) else x_TC.sum(0)
    weight_T = weight_T.to(x_TC.dtype)
    # Rows of weight 0 may hold NaN/Inf: 0 * Inf is NaN.
    x_TC = x_TC.masked_fill(weight_T.eq(0).unsqueeze(1), 0.0)
    total = weight_T.sum()
    return weight_T @ x_TC / torch.where(total > 0, total, torch.ones_like(total))


def balance_loss(*, probs_TC: Tensor, mask_TC: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """C * sum_c mean_t(p_c) * mean_t(1[c selected]): 1 for even top-1, k for even top-k routing.

    Source: GShard (arXiv 2006.16668, 3.2), Switch Transformers (arXiv 2101.03961, 2.2); over all
    k selections, as in Mixtral. EvoMoE (arXiv 2112.14397) uses the selected gates as `probs_TC`.
    """
    load_C = weighted_mean(mask_TC.to(probs_TC.dtype), weight_T)
    return probs_TC.size(1) * (weighted_mean(probs_TC, weight_T) @ load_C)


def switch_loss(
    *,
    probs_TC: Tensor,
    mask_TC: Tensor,
    weight_T: Tensor | None = None,
    active_C: Tensor | None = None,
) -> Tensor:
    """The balance loss of shares: C * <p / sum p, n / sum n>; 1 for an even load of any k.

    Source: Dense2MoE's `switch`, without the z-loss it adds; with token weights, DCMoE's balance
    loss (Uni-MoE 2.0, arXiv 2511.12609), over the full softmax.
    """
    probs_C = weighted_mean(probs_TC, weight_T)
    load_C = weighted_mean(mask_TC.to(probs_TC.dtype), weight_T)
    candidates: Tensor | int = probs_TC.size(1)
    if active_C is not None:  # empty slots are not an uneven load
        probs_C, load_C = (x_C.masked_fill(~active_C, 0.0) for x_C in (probs_C, load_C))
        candidates = active_C.sum()
    tiny = torch.finfo(probs_TC.dtype).tiny
    shares_C = probs_C / probs_C.sum().clamp(min=tiny)
    return candidates * (shares_C * load_C).sum() / load_C.sum().clamp(min=tiny)


def mutual_information_loss(*, probs_TC: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """-(H(mean p) - mean H(p)), in [-ln C, 0]: even load, confident routing of each token.

    Source: Mod-Squad (arXiv 2212.08066), as Dense2MoE's `mi`.
    """
    mean_C = weighted_mean(probs_TC, weight_T)
    return entropy_loss(probs_TC=probs_TC, weight_T=weight_T) - _entropy(mean_C)


def entropy_loss(*, probs_TC: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Mean entropy of the tokens' distributions, in nats."""
    return weighted_mean(_entropy(probs_TC).unsqueeze(1), weight_T).squeeze(0)


def _entropy(probs: Tensor) -> Tensor:
    # No gradient at 0, where it is infinite.
    positive = probs > 0
    logs = torch.where(positive, probs, 1.0).log()
    return -torch.where(positive, probs * logs, 0.0).sum(-1)


def cv_squared(x_C: Tensor, active_C: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation, Var(x) / Mean(x)^2, with the population's variance.

    Args:
        active_C: bool, False for what is no member of the population; None: all are.
    """
    mean = _mean(x_C, active_C)
    variance = _mean((x_C - mean).square(), active_C)
    return variance / (mean * mean).clamp(min=torch.finfo(x_C.dtype).tiny)


def _mean(x_C: Tensor, active_C: Tensor | None) -> Tensor:
    if active_C is None:
        return x_C.mean()
    return x_C.masked_fill(~active_C, 0.0).sum() / active_C.sum()


def importance_loss(
    *, probs_TC: Tensor, weight_T: Tensor | None = None, active_C: Tensor | None = None
) -> Tensor:
    """CV^2 of the summed gate values (Shazeer et al., arXiv 1701.06538, 4)."""
    return cv_squared(weighted_mean(probs_TC, weight_T), active_C)


def load_loss(
    *,
    logits_TC: Tensor,
    mask_TC: Tensor,
    noise: float | None = None,
    weight_T: Tensor | None = None,
) -> Tensor:
    """CV^2 of the smooth load: the probability of each candidate's selection under fresh noise.

    With normal noise of standard deviation `noise` on its own logit, candidate c is among the top k
    of a token with probability Phi((z_c - tau_c) / noise), tau_c the k-th largest other logit. The
    gradient passes through tau_c too: a constant added to a token's logits changes nothing.

    Args:
        mask_TC: the selection, whose row sums are the k of the tokens.
        noise: standard deviation; None: 1 / C, as in V-MoE (arXiv 2106.05974, A.2).
    Source: Shazeer et al. (arXiv 1701.06538, appendix A).
    """
    # Stable, so that of equal logits each has the other as its threshold.
    sorted_TC, order_TC = logits_TC.sort(dim=1, descending=True, stable=True)
    ends_T1 = sorted_TC.new_full((sorted_TC.size(0), 1), float("inf"))
    # Bounds for k = 0, which no logit exceeds, and k = C, which every logit exceeds.
    sorted_TC = torch.cat([ends_T1, sorted_TC, -ends_T1], 1)
    k_T1 = mask_TC.sum(1, keepdim=True)
    kth_T1, next_T1 = sorted_TC.gather(1, k_T1), sorted_TC.gather(1, k_T1 + 1)
    rank_C = torch.arange(mask_TC.size(1), device=mask_TC.device)
    largest_TC = torch.zeros_like(mask_TC).scatter_(1, order_TC, rank_C < k_T1)
    threshold_TC = torch.where(largest_TC, next_T1, kth_T1)
    selected_TC = torch.special.ndtr((logits_TC - threshold_TC) / (noise or 1 / mask_TC.size(1)))
    return cv_squared(weighted_mean(selected_TC, weight_T))


def z_loss(*, logits_TC: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, 3.2)."""
    return weighted_mean(logits_TC.logsumexp(1, keepdim=True).square(), weight_T).squeeze(0)


def diversity_loss(*, vectors_CD: Tensor, active_C: Tensor | None = None) -> Tensor:
    """Frobenius norm of (Wn Wn^T - 1) over active experts, rows normalised.

    Source: DynMoE (arXiv 2405.14297).
    """
    rows_CD = torch.nn.functional.normalize(vectors_CD, dim=1)
    ones_C = torch.ones_like(rows_CD[:, 0])
    if active_C is not None:
        rows_CD = rows_CD.masked_fill(~active_C.unsqueeze(1), 0.0)
        ones_C = active_C.to(rows_CD.dtype)
    gram_CC = rows_CD @ rows_CD.t() - ones_C.diag()
    square = gram_CC.square().sum()
    # No gradient of the root at 0, the value for one expert or orthogonal ones.
    return torch.where(square > 0, square.clamp(min=torch.finfo(square.dtype).tiny).sqrt(), 0.0)


def simplicity_loss(*, vectors_CD: Tensor, active_C: Tensor | None = None) -> Tensor:
    """Mean length of the active experts' vectors (DynMoE, arXiv 2405.14297)."""
    return _mean(torch.linalg.vector_norm(vectors_CD, dim=1), active_C)


def consistency_loss(
    *, logits_TC: Tensor, prior_TC: Tensor, weight_T: Tensor | None = None
) -> Tensor:
    """Mean KL(softmax(prior) || softmax(logits)): 0 if all occurrences of a token id are routed as
    the lexical prior routes it at full strength. Both have a gradient.

    Source: ours, after the distillation of StableMoE (arXiv 2204.08396).
    """
    log_prior_TC = prior_TC.log_softmax(1)
    difference_TC = log_prior_TC.exp() * (log_prior_TC - logits_TC.log_softmax(1))
    return weighted_mean(difference_TC.sum(1, keepdim=True), weight_T).squeeze(0)


def null_rate_loss(
    *, probs_TC: Tensor, num_null: int, target: float, weight_T: Tensor | None = None
) -> Tensor:
    """(mean probability of the null experts - target)^2."""
    return (weighted_mean(probs_TC, weight_T)[-num_null:].sum() - target).square()
