"""Decoder layers with an MoE layer or a dense FFN."""

from __future__ import annotations

from fairseq.models.transformer import TransformerConfig
from fairseq.modules import MultiheadAttention, gelu_accurate
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from fairseq.utils import relu_squared
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import gelu

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.experts.activations import name_kernel
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import build_layer
from evomoe_plugin.models.attention import Mask, SelfAttention
from evomoe_plugin.models.mixed_precision import Linear

name_kernel(gelu_accurate, "gelu_tanh")
name_kernel(relu_squared, "relu_squared")


class DecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer with the attention of `--moe-attention`.

    Args:
        cfg: the options in fairseq's form.
        attention: "sdpa" (`models.attention`) or "stock" (fairseq's own).
    """

    def __init__(self, cfg: TransformerConfig, attention: str):
        self._attention = attention
        super().__init__(cfg, no_encoder_attn=True)

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

    def build_fc1(self, *args, **kwargs) -> Module | None:
        """Called by fairseq."""
        return Linear.of(super().build_fc1(*args, **kwargs))

    def build_fc2(self, *args, **kwargs) -> Module | None:
        """Called by fairseq."""
        return Linear.of(super().build_fc2(*args, **kwargs))


class MoEDecoderLayer(DecoderLayer):
    """Self-attention as in fairseq, then an `MoELayer`.

    Args:
        cfg: the options in fairseq's form.
        options: of the model.
        info: the position of the MoE layer.
    """

    def __init__(self, cfg: TransformerConfig, options: ModelOptions, info: LayerInfo):
        super().__init__(cfg, options.moe_attention)
        self.moe = build_layer(
            info,
            options,
            activation=gelu if options.activation_fn == "gelu" else self.activation_fn,
            dropout=self.activation_dropout_module,
        )

    def build_fc1(self, *args, **kwargs) -> None:
        """No dense FFN: the experts take its place."""

    def build_fc2(self, *args, **kwargs) -> None:
        """No dense FFN: the experts take its place."""

    def forward(
        self,
        x: Tensor,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        self_attn_mask: Mask | Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        token_keys: Tensor | None = None,
        token_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
        with_token_routing: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Apply the layer.

        Args:
            x: [length, batch, D], fairseq's order.
            incremental_state: keys and values of earlier steps, in incremental decoding.
            self_attn_mask: as in `models.attention`; with fairseq's own attention an additive
                causal mask [length, length], or one for each sequence and head
                [batch * heads, length, length].
            self_attn_padding_mask: bool [batch, length], True for padding.
            token_keys: int64 noise keys [length, batch].
            token_ids: int64 token ids [length, batch].
            token_weights: weights in the auxiliary losses [length, batch].
            with_token_routing: as `MoELayer.forward`.
        Returns:
            x, and the auxiliary losses and statistics of the MoE layer.
        """
        x = self._attend(x, incremental_state, self_attn_mask, self_attn_padding_mask)

        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        token_mask_T = None
        if self_attn_padding_mask is not None:
            token_mask_T = ~self_attn_padding_mask[:, -x.size(0) :].t().reshape(-1)
        y_TD, aux, stats = self.moe(
            x.reshape(-1, x.size(-1)),
            token_mask_T,
            *(
                None if known is None else known.reshape(-1)
                for known in (token_keys, token_ids, token_weights)
            ),
            with_token_routing=with_token_routing,
        )
        x = self.residual_connection(self.dropout_module(y_TD.view_as(x)), residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x, aux, stats

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
