"""Grouped-query self-attention, by the functions of transformers."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .positions_evomoe import rotate


def build_norm(config, width):
    """A norm over the last dimension."""
    return (nn.RMSNorm if config.norm == "rms" else nn.LayerNorm)(width, eps=config.norm_eps)


class SeparateNorm(nn.Module):
    """A norm over each head without bias, with a weight of its own for every head."""

    def __init__(self, config, heads):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, config.head_dim))
        self.normalize = F.rms_norm if config.norm == "rms" else F.layer_norm
        self.eps = config.norm_eps

    def forward(self, x):
        return self.normalize(x, x.shape[-1:], eps=self.eps) * self.weight


def _eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention with its weights [B, heads, L, M]."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.size(2)]
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """By the function that `attn_implementation` names: sdpa, eager, flash_attention_2, …"""

    is_causal = True

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer_idx, D = config, layer, config.hidden_size
        heads, groups, width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.num_key_value_groups, self.scaling = heads // groups, width**-0.5
        self.q_proj = nn.Linear(D, heads * width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, groups * width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, groups * width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(heads * width, D, bias=config.out_bias)
        self.q_norm, self.k_norm = self._qk_norm(heads), self._qk_norm(groups)

    def _qk_norm(self, heads):
        kind, width = self.config.qk_norm, self.config.head_dim
        if kind == "none":
            return None
        if kind == "separate":
            return SeparateNorm(self.config, heads)
        return build_norm(self.config, width * (heads if kind == "joint" else 1))

    def _heads(self, x_BLD, norm=None):
        joint = self.config.qk_norm == "joint"
        if norm is not None and joint:
            x_BLD = norm(x_BLD)
        x = x_BLD.unflatten(-1, (-1, self.config.head_dim))
        if norm is not None and not joint:
            x = norm(x)
        return x.transpose(1, 2)

    def forward(self, x_BLD, mask, rotary, cache, **kwargs):
        q = self._heads(self.q_proj(x_BLD), self.q_norm)
        k = self._heads(self.k_proj(x_BLD), self.k_norm)
        v = self._heads(self.v_proj(x_BLD))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        y, weights = attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.out_proj(y.reshape(*x_BLD.shape[:2], -1)), weights
