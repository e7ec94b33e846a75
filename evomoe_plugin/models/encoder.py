"""An encoder with MoE layers."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerEncoderBase
from torch import Tensor, nn

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.experts import ExpertStack
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.models.encoder_layer import EncoderLayer, MoEEncoderLayer
from evomoe_plugin.models.mixed_precision import in_matmul_dtype
from evomoe_plugin.models.moe_stack import MoEStack
from evomoe_plugin.routing.noise import sequence_keys
from evomoe_plugin.routing.padding import padding_of


class MoEEncoder(MoEStack, TransformerEncoderBase):
    """fairseq's encoder with MoE layers at the positions in the options.

    Args:
        cfg: the model's options in fairseq's form.
        options: those of the encoder (`config.stacks`).
        dictionary: of its tokens.
        embed_tokens: the embedding.
        path: its name in the model.
        expert_deviation: standard deviation of the experts' initial weights; None: fairseq's.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        options: ModelOptions,
        dictionary,
        embed_tokens: nn.Module,
        path: str = "encoder",
        expert_deviation: float | None = None,
    ):
        self.begin_stack(options, dictionary, path)
        self._expert_deviation = expert_deviation
        with self.building():
            super().__init__(cfg, dictionary, embed_tokens)
        self.finish_stack()

    def build_encoder_layer(self, cfg: TransformerConfig) -> nn.Module:
        """Called by fairseq."""

        def build(info: LayerInfo | None) -> nn.Module:
            if info is None:
                return EncoderLayer(cfg, self.options.moe_attention)
            layer = MoEEncoderLayer(cfg, self.options, info)
            if self._expert_deviation is not None:
                for experts in layer.modules():
                    if isinstance(experts, ExpertStack):
                        experts.rescale(self._expert_deviation)
            return layer

        return self.build_next_layer(cfg, build)

    @in_matmul_dtype
    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        return_all_hiddens: bool = False,
        token_embeddings: Tensor | None = None,
        with_token_routing: bool = False,
    ) -> dict[str, Any]:
        """As fairseq's encoder, whose dict has besides:

        `moe`, a dict with `moe_aux` (name -> [L]), `moe_aux_coefficients` (name -> float),
        `moe_stats` and `moe_token_routing` (as `MoEDecoder.extract_features`), which is empty
        without MoE layers.

        Args:
            src_tokens: [batch, length].
            src_lengths: not used: padding is where its token id is.
            return_all_hiddens: return `encoder_states`.
            token_embeddings: [batch, length, D], in place of those of the tokens.
            with_token_routing: as `MoEDecoder.extract_features`.
        """
        if with_token_routing:
            self.check_routes()
        padding_mask = src_tokens.eq(self.padding_idx)
        known_mask = padding_mask if padding_of(src_tokens, self.padding_idx).count else None
        tokens: dict[str, Any] = {"token_ids": src_tokens.t()}
        if with_token_routing:
            tokens["with_token_routing"] = True
        if self.training:
            tokens["token_keys"] = sequence_keys(src_tokens, ~padding_mask).t()
        x, embedded = self.forward_embedding(src_tokens, token_embeddings)
        if known_mask is not None:
            x = x.masked_fill(known_mask.unsqueeze(2), 0.0)
        x = x.transpose(0, 1)  # fairseq's layers are length-first

        inner_states, aux, stats = [x], {}, {}
        for layer in self.layers:  # LayerDrop skips some
            if id(layer) in self._moe_ids:
                n = self._moe_ids[id(layer)]
                x, aux[n], stats[n] = layer(x, known_mask, **tokens)
            else:
                x = layer(x, encoder_padding_mask=known_mask)
            inner_states.append(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)

        moe_stats = self.stack_stats(stats)
        if self.training:
            self.check_finite(x, inner_states, moe_stats)
            self.add_to_update(stats)
        moe = self.moe_outputs(list(aux.values()), moe_stats)
        if with_token_routing:
            moe |= self.token_routing(stats, x)
        return {
            "encoder_out": [x],
            "encoder_padding_mask": [padding_mask],
            "encoder_embedding": [embedded],
            "encoder_states": inner_states if return_all_hiddens else [],
            "src_tokens": [],
            "src_lengths": [(~padding_mask).sum(1, keepdim=True).int()],
            "moe": moe,
        }
