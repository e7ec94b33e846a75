"""Grouped-query self-attention with rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.incremental_decoding_utils import with_incremental_state
from fairseq.modules import FairseqDropout, MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from evomoe_plugin.config.options import CausalLMModelOptions, head_dim, kv_heads
from evomoe_plugin.models.attention import AttentionMask, attend
from evomoe_plugin.models.mixed_precision import Linear
from evomoe_plugin.models.rotary import rotate

_KEYS, _VALUES = "prev_key", "prev_value"


def build_norm(options: CausalLMModelOptions, width: int) -> nn.Module:
    """A norm of the family over the last dimension."""
    kind = nn.RMSNorm if options.decoder_norm == "rms" else nn.LayerNorm
    return kind(width, eps=options.decoder_norm_eps)


class SeparateNorm(nn.Module):
    """A norm over each head's width without bias, with a weight of its own for every head.

    Args:
        options: of the model.
        heads: number of heads.
    """

    def __init__(self, options: CausalLMModelOptions, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim(options)))
        self.normalise = F.rms_norm if options.decoder_norm == "rms" else F.layer_norm
        self.eps = options.decoder_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads, head width]."""
        return self.normalise(x, x.shape[-1:], eps=self.eps) * self.weight


@with_incremental_state
class GroupedQueryAttention(nn.Module):
    """Self-attention in which groups of query heads share a key/value head (Ainslie et al., arXiv
    2305.13245), with queries and keys rotated by their positions.

    Args:
        options: of the model.
    """

    get_incremental_state: Callable[..., Any]  # Of `with_incremental_state`
    set_incremental_state: Callable[..., Any]

    def __init__(self, options: CausalLMModelOptions):
        super().__init__()
        self.num_heads, self.kv_heads = options.decoder_attention_heads, kv_heads(options)
        self.head_dim, self.qk_norm = head_dim(options), options.decoder_qk_norm
        width, bias = options.decoder_embed_dim, options.decoder_qkv_bias
        self.q_proj = Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.out_proj = Linear(self.num_heads * self.head_dim, width, bias=options.decoder_out_bias)
        self.q_norm = self._build_qk_norm(options, self.num_heads)
        self.k_norm = self._build_qk_norm(options, self.kv_heads)
        # The name that --retain-dropout-modules takes.
        self.dropout_module = FairseqDropout(
            options.attention_dropout, module_name=MultiheadAttention.__name__
        )

    def _build_qk_norm(self, options: CausalLMModelOptions, heads: int) -> nn.Module | None:
        if self.qk_norm == "none":
            return None
        if self.qk_norm == "separate":
            return SeparateNorm(options, heads)
        return build_norm(options, self.head_dim * (heads if self.qk_norm == "joint" else 1))

    def forward(
        self,
        x_TBD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x_TBD: tokens, fairseq's order.
            rotary: cosines and sines of their positions, [B or 1, T, R] each.
            mask: as in `models.attention`; in incremental decoding over all keys so far.
            incremental_state: keys and values of earlier steps.
        Returns:
            [T, B, D].
        """
        cos, sin = (table.unsqueeze(1) for table in rotary)
        q = rotate(self._heads(self.q_proj(x_TBD), self.num_heads, self.q_norm), cos, sin)
        k = rotate(self._heads(self.k_proj(x_TBD), self.kv_heads, self.k_norm), cos, sin)
        v = self._heads(self.v_proj(x_TBD), self.kv_heads)
        if incremental_state is not None:
            k, v = self._with_past(k, v, incremental_state)
        if self.kv_heads < self.num_heads:
            k, v = (t.repeat_interleave(self.num_heads // self.kv_heads, 1) for t in (k, v))
        y = attend(q, k, v, mask, self.head_dim**-0.5, self._dropout)
        return self.out_proj(y.permute(2, 0, 1, 3).flatten(2))

    @property
    def _dropout(self) -> float:
        drops = self.training or self.dropout_module.apply_during_inference
        return self.dropout_module.p if drops else 0.0

    def _heads(self, x: Tensor, heads: int, norm: nn.Module | None = None) -> Tensor:
        """[B, heads, T, head width] of projected tokens, normalised."""
        if norm is not None and self.qk_norm == "joint":
            x = norm(x)
        x = x.unflatten(2, (heads, self.head_dim))
        if norm is not None and self.qk_norm != "joint":
            x = norm(x)
        return x.permute(1, 2, 0, 3)

    def _with_past(self, k: Tensor, v: Tensor, incremental_state: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all steps, kept in fairseq's incremental state."""
        saved = self.get_incremental_state(incremental_state, "attn_state")
        if saved is not None:
            k, v = torch.cat([saved[_KEYS], k], 2), torch.cat([saved[_VALUES], v], 2)
        self.set_incremental_state(incremental_state, "attn_state", {_KEYS: k, _VALUES: v})
        return k, v

    def reorder_incremental_state(self, incremental_state: Any, new_order: Tensor) -> None:
        """Reorder the rows of the batch; called by fairseq's generator."""
        saved = self.get_incremental_state(incremental_state, "attn_state")
        if saved is not None:
            saved = {name: rows.index_select(0, new_order) for name, rows in saved.items()}
            self.set_incremental_state(incremental_state, "attn_state", saved)
