"""Decoder layers with an MoE layer or a dense FFN."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig
from fairseq.modules import MultiheadAttention, gelu_accurate
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from fairseq.utils import relu_squared
from torch import Tensor

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.experts.activations import name_kernel
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.models.attention import Mask, SelfAttention
from evomoe_plugin.models.moe_ffn import DenseFeedForward, MoEFeedForward

name_kernel(gelu_accurate, "gelu_tanh")
name_kernel(relu_squared, "relu_squared")


class DecoderLayer(DenseFeedForward, TransformerDecoderLayerBase):
    """fairseq's decoder layer with the attention of `--moe-attention`.

    Args:
        cfg: the options in fairseq's form.
        attention: "sdpa" (`models.attention`) or "stock" (fairseq's own).
        no_encoder_attn: whether it is a language model's, without attention to an encoder.
    """

    def __init__(self, cfg: TransformerConfig, attention: str, no_encoder_attn: bool = True):
        self._attention = attention
        super().__init__(cfg, no_encoder_attn=no_encoder_attn)
        self.need_attn = False  # as fairseq's commands for inference set it

    def build_self_attention(
        self,
        embed_dim: int,
        cfg: TransformerConfig,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
    ) -> MultiheadAttention:
        """Called by fairseq."""
        if self._attention == "stock":
            return super().build_self_attention(embed_dim, cfg, add_bias_kv, add_zero_attn)
        return SelfAttention(
            embed_dim,
            cfg.decoder.attention_heads,
            dropout=cfg.attention_dropout,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            self_attention=True,
        )


class MoEDecoderLayer(MoEFeedForward, DecoderLayer):
    """Attention as in fairseq, then an `MoELayer`.

    Args:
        cfg: the options in fairseq's form.
        options: of the decoder.
        info: the position of the MoE layer.
        no_encoder_attn: as `DecoderLayer`.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        options: ModelOptions,
        info: LayerInfo,
        no_encoder_attn: bool = True,
    ):
        super().__init__(cfg, options.moe_attention, no_encoder_attn)
        self.build_moe(options, info)

    def forward(
        self,
        x: Tensor,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        self_attn_mask: Mask | Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        encoder_out: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        need_head_weights: bool = False,
        **tokens: Any,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """Apply the layer.

        Args:
            x: [length, batch, D], fairseq's order.
            incremental_state: keys and values of earlier steps, in incremental decoding.
            self_attn_mask: as in `models.attention`; with fairseq's own attention an additive
                causal mask [length, length], or one for each sequence and head
                [batch * heads, length, length].
            self_attn_padding_mask: bool [batch, length], True for padding.
            encoder_out: [source length, batch, encoder's D].
            encoder_padding_mask: bool [batch, source length], True for padding.
            need_head_weights: return the weights of the attention to the encoder.
            tokens: `token_keys` and others of `MoEFeedForward.feed_forward`.
        Returns:
            x, the auxiliary losses and statistics of the MoE layer, and those weights, [heads,
            batch, length, source length] or None.
        """
        x = self._attend(x, incremental_state, self_attn_mask, self_attn_padding_mask)
        weights = None
        if encoder_out is not None:
            x, weights = self._attend_to_encoder(
                x, encoder_out, encoder_padding_mask, incremental_state, need_head_weights
            )
        x, aux, stats = self.feed_forward(x, self_attn_padding_mask, **tokens)
        return x, aux, stats, weights

    def _attend(self, x, incremental_state, self_attn_mask, self_attn_padding_mask) -> Tensor:
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x, _ = self.self_attn(
            query=x,
            key=x,
            value=x,
            key_padding_mask=self_attn_padding_mask,
            incremental_state=incremental_state,
            need_weights=False,
            attn_mask=self_attn_mask,
        )
        x = self.residual_connection(self.dropout_module(x), residual)
        return x if self.normalize_before else self.self_attn_layer_norm(x)

    def _attend_to_encoder(
        self, x, encoder_out, encoder_padding_mask, incremental_state, need_head_weights
    ) -> tuple[Tensor, Tensor | None]:
        residual = x
        if self.normalize_before:
            x = self.encoder_attn_layer_norm(x)
        x, weights = self.encoder_attn(
            query=x,
            key=encoder_out,
            value=encoder_out,
            key_padding_mask=encoder_padding_mask,
            incremental_state=incremental_state,
            static_kv=True,
            need_weights=need_head_weights,
            need_head_weights=need_head_weights,
        )
        x = self.residual_connection(self.dropout_module(x), residual)
        return x if self.normalize_before else self.encoder_attn_layer_norm(x), weights
