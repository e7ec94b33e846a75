"""A decoder that carries auxiliary losses and statistics of its MoE layers to the criterion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.models.attention import AttentionMask, causal_mask
from evomoe_plugin.models.decoder_layer import DecoderLayer, MoEDecoderLayer
from evomoe_plugin.models.mixed_precision import in_matmul_dtype
from evomoe_plugin.models.moe_stack import MoEStack
from evomoe_plugin.models.segments import Segments, documents
from evomoe_plugin.models.vocabulary_loss import smoothed_vocabulary_loss, vocabulary_loss
from evomoe_plugin.routing.noise import sequence_keys
from evomoe_plugin.routing.padding import Padding, padding_of


class MoEDecoder(MoEStack, TransformerDecoder):
    """fairseq's decoder with MoE layers at the positions in the options.

    Args:
        args: the options of the model.
        dictionary: of its tokens.
        embed_tokens: the embedding.
        options: those of the decoder in a model with an encoder (`config.stacks`), which it then
            attends to; None: a language model.
        first_layer_id: number of the encoder's MoE layers.
    """

    def __init__(
        self,
        args: Any,
        dictionary,
        embed_tokens: nn.Module,
        options: ModelOptions | None = None,
        first_layer_id: int = 0,
    ):
        self.begin_stack(options or args, dictionary, "decoder", first_layer_id)
        with self.building():
            super().__init__(args, dictionary, embed_tokens, no_encoder_attn=options is None)
        self.finish_stack()

    def build_decoder_layer(self, args: Any, no_encoder_attn: bool = False) -> nn.Module:
        """Called by fairseq."""
        cfg = TransformerConfig.from_namespace(args)

        def build(info: LayerInfo | None) -> nn.Module:
            return self._build_layer(cfg, info, no_encoder_attn)

        return self.build_next_layer(cfg, build)

    def _build_layer(
        self, cfg: TransformerConfig, info: LayerInfo | None, no_encoder_attn: bool
    ) -> nn.Module:
        """A decoder layer; `info` is None for one with a dense FFN."""
        if info is None:
            return DecoderLayer(cfg, self.args.moe_attention, no_encoder_attn)
        return MoEDecoderLayer(cfg, self.options, info, no_encoder_attn)

    @in_matmul_dtype
    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Mapping[str, Any] | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        features_only: bool = False,
        full_context_alignment: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
        src_lengths: Tensor | None = None,
        return_all_hiddens: bool = False,
        token_weights: Tensor | None = None,
        segments: Tensor | None = None,
        targets: Tensor | None = None,
        vocab_chunk: int | None = None,
        reduce: bool = True,
        label_smoothing: float | None = None,
        with_token_routing: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """As fairseq's decoder; `token_weights`, `segments` and `with_token_routing` as in
        `extract_features`.

        With `targets` [batch, length], losses of `models.vocabulary_loss` are returned instead of
        logits: their sum, or [batch * length] without `reduce`; with `label_smoothing` a pair of
        them, smoothed and not. They are computed here instead of in the criterion, since FSDP
        gathers the output embeddings only for the forward pass.
        """
        x, extra = self.extract_features(
            prev_output_tokens,
            encoder_out=encoder_out,
            incremental_state=incremental_state,
            full_context_alignment=full_context_alignment,
            alignment_layer=alignment_layer,
            alignment_heads=alignment_heads,
            token_weights=token_weights,
            segments=segments,
            with_token_routing=with_token_routing,
        )
        if targets is not None:
            given = (
                x.reshape(-1, x.size(-1)),
                self.output_projection.weight,
                targets.reshape(-1),
                self.padding_idx,
                vocab_chunk,
                reduce,
                self.output_projection.bias,
            )
            num_padding = padding_of(targets, self.padding_idx).count
            if label_smoothing is None:
                return vocabulary_loss(*given, num_padding), extra
            return smoothed_vocabulary_loss(*given, label_smoothing, num_padding), extra
        if not features_only:
            x = self.output_layer(x)
        return x, extra

    @in_matmul_dtype
    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Mapping[str, Any] | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        full_context_alignment: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
        token_weights: Tensor | None = None,
        segments: Tensor | None = None,
        with_token_routing: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Features before the output projection.

        Args:
            prev_output_tokens: [batch, length].
            encoder_out: what the encoder of a translation model returns.
            incremental_state: for incremental decoding, where only the last position is new.
            full_context_alignment: attend to the future too.
            alignment_layer, alignment_heads: the layer, by default the last, and how many of its
                heads give `attn`.
            token_weights: [batch, length], weights of the tokens in the auxiliary losses.
            segments: [batch, length], the examples of the tokens (`models.segments`) if rows hold
                several; they do not attend to each other. Not in incremental decoding.
            with_token_routing: return `moe_token_routing` too. In evaluation mode, after the
                dense phase.
        Returns:
            [batch, length, D], and a dict with `inner_states`, `attn` (weights of attention to the
            encoder, [batch, length, source length]; None in training unless a layer is given),
            `moe_aux` (name -> [L]), `moe_aux_coefficients` (name -> float), `moe_stats` (name ->
            [L]; [L, R] for exchanged pairs, and `tokens_per_expert` -> [L, E] padded with NaN) and
            `moe_token_routing` (name -> [L, batch, length], of `routing.stability.token_routing`),
            these four only if there are MoE layers.
        """
        if with_token_routing:
            self.check_routes()
        if segments is not None and (incremental_state is not None or full_context_alignment):
            raise ValueError(
                "rows of several examples support neither incremental decoding nor "
                "bidirectional attention"
            )
        padding_mask = prev_output_tokens.eq(self.padding_idx)
        padding = padding_of(prev_output_tokens, self.padding_idx)
        if self.args.moe_document_mask and segments is None and not full_context_alignment:
            segments = self._documents(prev_output_tokens, incremental_state is not None)
        packed = None if segments is None else Segments(segments, padding_mask)
        token_keys = None
        if self.training:
            keys_BT = (
                packed.token_keys(prev_output_tokens)
                if packed
                else sequence_keys(prev_output_tokens, ~padding_mask)
            )
            token_keys = keys_BT.t()
        positions = None
        if self.embed_positions is not None and packed:
            positions = packed.embed_positions(self.embed_positions, self.padding_idx)
        elif self.embed_positions is not None:
            positions = self.embed_positions(
                prev_output_tokens, incremental_state=incremental_state
            )
        if incremental_state is not None:
            prev_output_tokens = prev_output_tokens[:, -1:]
            positions = positions[:, -1:] if positions is not None else None

        tokens: dict[str, Any] = {"token_keys": token_keys, "token_ids": prev_output_tokens.t()}
        if token_weights is not None:
            tokens["token_weights"] = token_weights[:, -prev_output_tokens.size(1) :].t()
        if with_token_routing:
            tokens["with_token_routing"] = True

        x = self.embed_scale * self.embed_tokens(prev_output_tokens)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if positions is not None:
            x = x + positions
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        x = self.dropout_module(x).transpose(0, 1)  # fairseq's layers are length-first

        attention = self._attention_inputs(
            x, padding_mask, padding, incremental_state, full_context_alignment, packed
        )
        if encoder_out is not None:
            attention["encoder_out"] = encoder_out["encoder_out"][0]
            attention["encoder_padding_mask"] = _padding_mask(encoder_out)
        aligned = self.num_layers - 1 if alignment_layer is None else alignment_layer
        needs_attn = encoder_out is not None and not (self.training and alignment_layer is None)
        inner_states, aux, stats, attn = [x], {}, {}, None
        for i, layer in enumerate(self.layers):  # LayerDrop skips some
            if needs_attn:
                attention["need_head_weights"] = i == aligned
            if id(layer) in self._moe_ids:
                n = self._moe_ids[id(layer)]
                x, aux[n], stats[n], *weights = layer(x, incremental_state, **attention, **tokens)
            else:
                x, *weights = layer(x, incremental_state=incremental_state, **attention)
            if needs_attn and i == aligned and weights[0] is not None:
                attn = weights[0][:alignment_heads].float().mean(0)
            inner_states.append(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = x.transpose(0, 1)
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)

        moe_stats = self.stack_stats(stats)
        if self.training:
            self.check_finite(x, inner_states, moe_stats)
            self.add_to_update(stats)
        extra: dict[str, Any] = {"attn": [attn], "inner_states": inner_states}
        extra |= self.moe_outputs(list(aux.values()), moe_stats)
        if with_token_routing:
            extra |= self.token_routing(stats, x.transpose(0, 1))
        return x, extra

    def _documents(self, tokens_BT: Tensor, is_incremental: bool) -> Tensor | None:
        """The segments of `--moe-document-mask`; None where each row is one document.

        Raises:
            OptionError: there are several in incremental decoding.
        """
        eos = self.dictionary.eos()
        if not is_incremental:
            return documents(tokens_BT, eos)
        if tokens_BT[:, 1:].eq(eos).any():
            raise OptionError(
                "moe_document_mask", True, "a prompt with </s> inside: give one document each"
            )
        return None

    def _attention_inputs(
        self,
        x: Tensor,
        padding_mask_BT: Tensor,
        padding: Padding,
        incremental_state: Any,
        full_context_alignment: bool,
        packed: Segments | None,
    ) -> dict[str, Any]:
        """What the attention of every layer gets beside its input.

        Args:
            x: the embedded tokens, [length, batch, D]; in incremental decoding only the last.
            padding_mask_BT: bool, True for padding, of all tokens.
            padding: in them.
        """
        padding_mask_BT = padding_mask_BT[:, -x.size(0) :]
        is_padded = padding.count > 0
        if is_padded and incremental_state is not None:
            is_padded = bool(padding_mask_BT.any())
        known_mask = padding_mask_BT if is_padded else None
        mask = None
        if incremental_state is None and not full_context_alignment:
            mask = self._attention_mask(x, known_mask, padding.is_first, packed)
        return {"self_attn_mask": mask, "self_attn_padding_mask": known_mask}

    def _attention_mask(
        self, x: Tensor, padding_mask: Tensor | None, is_first: bool, packed: Segments | None
    ) -> AttentionMask:
        """The attention mask in the form that the layers' attention expects."""
        if self.args.moe_attention == "sdpa":
            return packed.runs() if packed is not None else causal_mask(padding_mask, is_first)
        mask = self.buffered_future_mask(x)
        if packed is None:
            return mask
        return packed.attention_mask(mask, self.args.decoder_attention_heads)


def _padding_mask(encoder_out: Mapping[str, Any]) -> Tensor | None:
    """bool [batch, source length], True for padding; None without any."""
    masks = encoder_out["encoder_padding_mask"]
    return masks[0] if masks and masks[0].any() else None
