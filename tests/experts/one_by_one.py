"""One expert after the other in plain autograd, the reference of the kernels."""

from __future__ import annotations

import torch


def tensors(experts, width, ffn, gated, bias, dtype=torch.float64, device="cpu"):
    """Weights by name, of deviation 1."""
    shapes = {"fc1_weight": (experts, ffn, width), "fc2_weight": (experts, ffn, width)}
    if gated:
        shapes["fc3_weight"] = (experts, ffn, width)
    if bias:
        shapes |= {"fc1_bias": (experts, ffn), "fc2_bias": (experts, width)}
    return {
        name: torch.randn(shape, device=device).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def oracle(x, weights, counts, function, token_ids=None, row_weights=None):
    """As `kernels.cpu.grouped.grouped_ffn`."""
    rows = x if token_ids is None else x[token_ids]
    out = []
    for e, segment in enumerate(rows.split(counts)):
        hidden = segment @ weights["fc1_weight"][e].T
        if "fc1_bias" in weights:
            hidden = hidden + weights["fc1_bias"][e]
        hidden = function(hidden)
        if "fc3_weight" in weights:
            hidden = hidden * (segment @ weights["fc3_weight"][e].T)
        output = hidden @ weights["fc2_weight"][e]
        out.append(output + weights["fc2_bias"][e] if "fc2_bias" in weights else output)
    out = torch.cat(out)
    if row_weights is not None:
        out = out * row_weights.unsqueeze(1).to(out.dtype)
    if token_ids is None:
        return out
    return torch.zeros_like(x).index_add(0, token_ids, out)
