"""Encoder layers with an MoE layer or a dense FFN."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.models.attention import SelfAttention
from evomoe_plugin.models.moe_ffn import DenseFeedForward, MoEFeedForward


class EncoderLayer(DenseFeedForward, TransformerEncoderLayerBase):
    """fairseq's encoder layer with the attention of `--moe-attention`.

    Args:
        cfg: the options in fairseq's form.
        attention: "sdpa" (`models.attention`) or "stock" (fairseq's own).
    """

    def __init__(self, cfg: TransformerConfig, attention: str):
        self._attention = attention
        super().__init__(cfg)

    def build_self_attention(self, embed_dim: int, cfg: TransformerConfig) -> MultiheadAttention:
        """Called by fairseq."""
        if self._attention == "stock":
            return super().build_self_attention(embed_dim, cfg)
        return SelfAttention(
            embed_dim,
            cfg.encoder.attention_heads,
            dropout=cfg.attention_dropout,
            self_attention=True,
        )


class MoEEncoderLayer(MoEFeedForward, EncoderLayer):
    """Self-attention as in fairseq, then an `MoELayer`.

    Args:
        cfg: the options in fairseq's form.
        options: of the encoder.
        info: the position of the MoE layer.
    """

    def __init__(self, cfg: TransformerConfig, options: ModelOptions, info: LayerInfo):
        super().__init__(cfg, options.moe_attention)
        self.build_moe(options, info)

    def forward(
        self, x: Tensor, encoder_padding_mask: Tensor | None, **tokens: Any
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Apply the layer.

        Args:
            x: [length, batch, D], fairseq's order.
            encoder_padding_mask: bool [batch, length], True for padding.
            tokens: `token_keys` and others of `MoEFeedForward.feed_forward`.
        Returns:
            x, and the auxiliary losses and statistics of the MoE layer.
        """
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, _ = self.self_attn(
            query=x, key=x, value=x, key_padding_mask=encoder_padding_mask, need_weights=False
        )
        x = self.residual_connection(self.dropout_module(x), residual)
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)
        return self.feed_forward(x, encoder_padding_mask, **tokens)
