"""The decoders of Llama, Mistral, Qwen, Phi and StableLM, with MoE layers."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig
from omegaconf import open_dict
from torch import Tensor, nn

from evomoe_plugin.config.options import CausalLMModelOptions
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.models.attention import AttentionMask, causal_mask
from evomoe_plugin.models.decoder import MoEDecoder
from evomoe_plugin.models.decoder_block import DecoderBlock
from evomoe_plugin.models.grouped_attention import build_norm
from evomoe_plugin.models.language_model import MoELanguageModel
from evomoe_plugin.models.rotary import Rotary
from evomoe_plugin.models.segments import Segments
from evomoe_plugin.routing.padding import Padding


class CausalLMDecoder(MoEDecoder):
    """A decoder of `DecoderBlock`s, whose positions are rotary."""

    args: CausalLMModelOptions

    def _build_layer(
        self, cfg: TransformerConfig, info: LayerInfo | None, no_encoder_attn: bool
    ) -> nn.Module:
        return DecoderBlock(self.args, info)

    def build_output_projection(self, args, dictionary, embed_tokens) -> None:
        """Called by fairseq last, after the final norm of its own kind."""
        self.layer_norm = build_norm(self.args, self.embed_dim)
        self.rotary = Rotary(self.args)
        super().build_output_projection(args, dictionary, embed_tokens)
        if self.args.decoder_logits_bias:
            self.output_projection.bias = nn.Parameter(
                self.output_projection.weight.new_zeros(len(dictionary))
            )

    def _attention_inputs(
        self,
        x: Tensor,
        padding_mask_BT: Tensor,
        padding: Padding,
        incremental_state: Any,
        full_context_alignment: bool,
        packed: Segments | None,
    ) -> dict[str, Any]:
        known_BT = padding_mask_BT if padding.count else None
        is_first = padding.is_first
        mask = self._mask(known_BT, is_first, incremental_state, full_context_alignment, packed)
        if packed is not None:
            positions_BT = packed.positions_BT
        elif known_BT is None:
            length = padding_mask_BT.size(1)
            positions_BT = padding_mask_BT.new_ones(1, length).cumsum(1) - 1
        else:  # without the padding before a token
            positions_BT = ((~known_BT).cumsum(1) - 1).clamp(min=0)
        new = slice(-x.size(0), None)
        return {
            "self_attn_mask": mask,
            "self_attn_padding_mask": None if known_BT is None else known_BT[:, new],
            "rotary": self.rotary(positions_BT[:, new], x.dtype),
        }

    @staticmethod
    def _mask(
        padding_mask_BT: Tensor | None,
        is_first: bool,
        incremental_state: Any,
        full_context_alignment: bool,
        packed: Segments | None,
    ) -> AttentionMask:
        if packed is not None:
            return packed.runs()
        if incremental_state is None and not full_context_alignment:
            return causal_mask(padding_mask_BT, is_first)
        if padding_mask_BT is None:
            return None
        keys_BT = ~padding_mask_BT
        if incremental_state is not None:
            keys_BT = keys_BT.clone()
            keys_BT[:, -1] = True  # padding attends to itself: without a key there would be NaN
        return keys_BT[:, None, None]


class CausalLM(MoELanguageModel):
    """A `CausalLMDecoder` with MoE layers in place of FFNs at the positions in the options."""

    decoder_class = CausalLMDecoder

    @classmethod
    def complete(cls, args: Any) -> None:
        super().complete(args)
        with open_dict(args):
            args.no_token_positional_embeddings = args.no_scale_embedding = True
