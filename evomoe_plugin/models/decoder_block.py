"""The layers of `causal_lm` decoders, with an MoE layer or a dense FFN."""

from __future__ import annotations

from fairseq import utils
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from evomoe_plugin.config.options import CausalLMModelOptions
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import build_layer
from evomoe_plugin.models.attention import AttentionMask
from evomoe_plugin.models.grouped_attention import GroupedQueryAttention, build_norm
from evomoe_plugin.models.mixed_precision import Linear
from evomoe_plugin.models.moe_ffn import apply_moe


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), as in Llama; or both on the output of one
    norm, x + attention(norm(x)) + ffn(norm(x)), as in Phi-2.

    Parameters have the names of fairseq's decoder layers; fc3 is the second factor of gated FFNs,
    as in `experts.ffn`.

    Args:
        options: of the model.
        info: the position of the MoE layer; None: a dense FFN.
    """

    def __init__(self, options: CausalLMModelOptions, info: LayerInfo | None):
        super().__init__()
        width, ffn_dim = options.decoder_embed_dim, options.decoder_ffn_embed_dim
        self.self_attn = GroupedQueryAttention(options)
        self.self_attn_layer_norm = build_norm(options, width)
        self.final_layer_norm = None if options.decoder_parallel else build_norm(options, width)
        self.dropout_module = FairseqDropout(options.dropout, module_name=type(self).__name__)
        self.activation_dropout_module = FairseqDropout(
            float(options.activation_dropout), module_name=type(self).__name__
        )
        self.activation_fn = utils.get_activation_fn(options.activation_fn)
        if options.activation_fn == "gelu":
            self.activation_fn = nn.functional.gelu  # fairseq's goes through fp32
        self.moe = None
        if info is not None:
            self.moe = build_layer(
                info,
                options,
                activation=self.activation_fn,
                dropout=self.activation_dropout_module,
            )
            return
        bias = options.decoder_ffn_bias
        self.fc1 = Linear(width, ffn_dim, bias=bias)
        self.fc2 = Linear(ffn_dim, width, bias=bias)
        self.fc3 = Linear(width, ffn_dim, bias=bias) if options.decoder_ffn == "gated" else None

    def forward(
        self,
        x: Tensor,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        self_attn_mask: AttentionMask = None,
        self_attn_padding_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        token_keys: Tensor | None = None,
        token_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
        with_token_routing: bool = False,
    ) -> tuple[Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Apply the layer.

        Args:
            x: [length, batch, D], fairseq's order.
            incremental_state: keys and values of earlier steps, in incremental decoding.
            self_attn_mask: as in `models.attention`.
            self_attn_padding_mask: bool [batch, length], True for padding.
            rotary: cosines and sines of the positions, [batch or 1, length, R] each.
            token_keys, token_ids, token_weights: [length, batch], as in `MoEDecoderLayer`.
            with_token_routing: as `MoELayer.forward`.
        Returns:
            x; of an MoE layer, its auxiliary losses and statistics too.
        """
        assert rotary is not None
        normed = self.self_attn_layer_norm(x)
        attended = self.self_attn(normed, rotary, self_attn_mask, incremental_state)
        x = x + self.dropout_module(attended)
        if self.final_layer_norm is not None:
            normed = self.final_layer_norm(x)
        if self.moe is None:
            return (x + self.dropout_module(self._ffn(normed)),)
        y, aux, stats = apply_moe(
            self.moe,
            normed,
            self_attn_padding_mask,
            token_keys,
            token_ids,
            token_weights,
            with_token_routing,
        )
        return x + self.dropout_module(y), aux, stats

    def _ffn(self, x: Tensor) -> Tensor:
        hidden = self.activation_fn(self.fc1(x))
        if self.fc3 is not None:
            hidden = hidden * self.fc3(x)
        return self.fc2(self.activation_dropout_module(hidden))
