"""Auxiliary losses: pure functions of tensors, padding excluded."""

from __future__ import annotations

from torch import Tensor


def masked_mean(x_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding; 0 where there are none.

    Args:
        x_TE: values.
        token_mask_T: bool, False for padding; None: no padding.
    """
    if token_mask_T is None:
        return x_TE.sum(0) / max(x_TE.size(0), 1)
    mask_T1 = token_mask_T.unsqueeze(1).to(x_TE.dtype)
    return (x_TE * mask_T1).sum(0) / mask_T1.sum().clamp(min=1)


def balance_loss(gates_TE: Tensor, mask_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Load balance of the dense-to-sparse gate: E * sum_e mean_t(gate_e) * mean_t(1[e chosen]).

    Both factors are means over real tokens. Uniform top-1 routing gives the mean gate of the
    chosen expert, routing to all experts gives E * sum_e mean(gate_e) = E.

    Args:
        gates_TE: the gate's values, 0 where an expert is not chosen; carries the gradient.
        mask_TE: bool, the chosen experts.
        token_mask_T: bool, False for padding.
    Source: EvoMoE (arXiv 2112.14397), the authors' implementation, on the masked gates.
    """
    gate_E = masked_mean(gates_TE, token_mask_T)
    load_E = masked_mean(mask_TE.to(gates_TE.dtype), token_mask_T)
    return gates_TE.size(1) * (gate_E * load_E).sum()
