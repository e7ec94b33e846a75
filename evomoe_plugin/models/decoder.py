"""A decoder that carries auxiliary losses and statistics of its MoE layers to the criterion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.distributed.utils import all_reduce_dict
from fairseq.models.transformer import TransformerConfig, TransformerDecoder
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.config.options import (
    ModelOptions,
    expert_counts,
    expert_slots,
    moe_layer_indices,
)
from evomoe_plugin.gates import LayerInfo, gate_class
from evomoe_plugin.gates.top_any import TopAnyGate
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.attention import Mask, causal_mask
from evomoe_plugin.models.decoder_layer import DecoderLayer, MoEDecoderLayer
from evomoe_plugin.models.freeze import freeze, wrap_apart
from evomoe_plugin.models.fsdp import built_unwrapped, is_wrapping, wrap_experts
from evomoe_plugin.models.mixed_precision import in_matmul_dtype, matmul_dtype
from evomoe_plugin.models.segments import Segments
from evomoe_plugin.models.vocabulary_loss import vocabulary_loss
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.noise import sequence_keys


class NonFiniteError(RunFailed):
    """NaN/Inf in the forward pass; ends the run with one line."""


class MoEDecoder(TransformerDecoder):
    """fairseq's decoder (language model only) with MoE layers at the positions in the options."""

    def __init__(self, args: ModelOptions, dictionary, embed_tokens: nn.Module):
        moe_layers = moe_layer_indices(args, args.decoder_layers)
        self._expert_count = dict(zip(moe_layers, expert_slots(args), strict=True))
        self._start_experts = expert_counts(args)
        self._layers_built = 0
        self._token_counts = tuple(getattr(dictionary, "count", ()))
        self._aux_coefficients = gate_class(args.moe_gate).aux_coefficients(args)
        with built_unwrapped(args.moe_train_only is not None):
            super().__init__(args, dictionary, embed_tokens, no_encoder_attn=True)
        if args.moe_train_only is not None:
            self._freeze(args)
        # Also in wrapped layers. A tuple, so that they are not registered as submodules again.
        self.moe_layers: tuple[MoELayer, ...] = tuple(
            module for module in self.layers.modules() if isinstance(module, MoELayer)
        )
        self._recording = True
        self._update_totals: dict[int, dict[str, Tensor]] = {}
        self._moe_ids = {id(self.layers[i]): n for n, i in enumerate(self._expert_count)}

    def _freeze(self, args: ModelOptions) -> None:
        freeze(self, args, prefix="decoder.")
        if is_wrapping():
            for layer in [m for m in self.modules() if isinstance(m, MoELayer)]:
                wrap_experts(layer)
            wrap_apart(self, args.moe_train_only or "", fsdp_wrap)
            least = 0 if args.checkpoint_activations else args.min_params_to_wrap
            for i, layer in enumerate(self.layers):
                self.layers[i] = fsdp_wrap(layer, min_num_params=least)

    def build_decoder_layer(self, args: ModelOptions, no_encoder_attn: bool = False) -> nn.Module:
        """Build the next layer, wrapped as in fairseq for checkpointing and FSDP."""
        index, self._layers_built = self._layers_built, self._layers_built + 1
        cfg = TransformerConfig.from_namespace(args)
        if index in self._expert_count:
            layer_id = list(self._expert_count).index(index)
            info = LayerInfo(
                model_dim=cfg.decoder.embed_dim,
                num_experts=self._expert_count[index],
                start_experts=self._start_experts[layer_id],
                num_null=self.args.moe_null_experts,
                layer_id=layer_id,
                seed=self.args.seed,
                token_counts_V=self._token_counts,
            )
            layer = MoEDecoderLayer(cfg, self.args, info)
            wrap_experts(layer.moe)
        else:
            layer = DecoderLayer(cfg, self.args.moe_attention)
        if cfg.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        return fsdp_wrap(
            layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
        )

    @property
    def in_dense_phase(self) -> bool:
        """Whether MoE layers use only expert 0 (`MoELayer.in_dense_phase`)."""
        return self.moe_layers[0].in_dense_phase

    def layer_name(self, moe_layer: int) -> str:
        """Name of the n-th MoE layer in the checkpoint."""
        return f"decoder.layers.{list(self._expert_count)[moe_layer]}.moe"

    def matmul_dtype(self) -> AbstractContextManager[None]:
        """Compute matmuls inside in the dtype of `--moe-matmul-dtype`."""
        return matmul_dtype(self.args.moe_matmul_dtype, self.embed_tokens.weight.device.type)

    @in_matmul_dtype
    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
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
    ) -> tuple[Tensor, dict[str, Any]]:
        """As fairseq's decoder; `token_weights` and `segments` as in `extract_features`.

        With `targets` [batch, length], losses of `models.vocabulary_loss` are returned instead of
        logits: their sum, or [batch * length] without `reduce`. They are computed here instead of
        in the criterion, since FSDP gathers the output embeddings only for the forward pass.
        """
        x, extra = self.extract_features(
            prev_output_tokens,
            incremental_state=incremental_state,
            full_context_alignment=full_context_alignment,
            token_weights=token_weights,
            segments=segments,
        )
        if targets is not None:
            x = vocabulary_loss(
                x.reshape(-1, x.size(-1)),
                self.output_projection.weight,
                targets.reshape(-1),
                self.padding_idx,
                vocab_chunk,
                reduce,
            )
        elif not features_only:
            x = self.output_layer(x)
        return x, extra

    @in_matmul_dtype
    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        full_context_alignment: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
        token_weights: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Features before the output projection.

        Args:
            prev_output_tokens: [batch, length].
            incremental_state: for incremental decoding, where only the last position is new.
            full_context_alignment: attend to the future too.
            token_weights: [batch, length], weights of the tokens in the auxiliary losses.
            segments: [batch, length], the examples of the tokens (`models.segments`) if rows hold
                several; they do not attend to each other. Not in incremental decoding.
        Returns:
            [batch, length, D], and a dict with `inner_states`, `moe_aux` (name -> [L]),
            `moe_aux_coefficients` (name -> float) and `moe_stats` (name -> [L]; [L, R] for
            exchanged pairs, and `tokens_per_expert` -> [L, E] padded with NaN).
        """
        if segments is not None and (incremental_state is not None or full_context_alignment):
            raise ValueError(
                "rows of several examples support neither incremental decoding nor "
                "bidirectional attention"
            )
        padding_mask = prev_output_tokens.eq(self.padding_idx)
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
            padding_mask = padding_mask[:, -1:]
            positions = positions[:, -1:] if positions is not None else None

        tokens = {"token_keys": token_keys, "token_ids": prev_output_tokens.t()}
        if token_weights is not None:
            tokens["token_weights"] = token_weights[:, -prev_output_tokens.size(1) :].t()

        x = self.embed_scale * self.embed_tokens(prev_output_tokens)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if positions is not None:
            x = x + positions
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        x = self.dropout_module(x).transpose(0, 1)  # fairseq's layers are length-first

        known_mask = padding_mask if padding_mask.any() else None
        attention: dict[str, Any] = {"self_attn_mask": None, "self_attn_padding_mask": known_mask}
        if incremental_state is None and not full_context_alignment:
            attention["self_attn_mask"] = self._attention_mask(x, known_mask, packed)
        inner_states, aux, stats = [x], {}, {}
        for layer in self.layers:  # LayerDrop skips some
            if id(layer) in self._moe_ids:
                n = self._moe_ids[id(layer)]
                x, aux[n], stats[n] = layer(x, incremental_state, **attention, **tokens)
            else:
                x, *_ = layer(x, None, None, incremental_state, **attention)
            inner_states.append(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = x.transpose(0, 1)
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)

        moe_stats = self._stack_stats(stats)
        if self.training:
            self._check_finite(x, inner_states, moe_stats)
            self._add_to_update(stats)
        moe_aux = {}
        if self._aux_coefficients and aux:
            aux_LA = torch.stack(list(aux.values()))
            moe_aux = dict(zip(self._aux_coefficients, aux_LA.unbind(1), strict=True))
        extra = {"attn": [None], "inner_states": inner_states}
        return x, {
            **extra,
            "moe_aux": moe_aux,
            "moe_stats": moe_stats,
            "moe_aux_coefficients": dict(self._aux_coefficients),
        }

    def _attention_mask(
        self, x: Tensor, padding_mask: Tensor | None, packed: Segments | None
    ) -> Mask | Tensor:
        """The attention mask in the form that the layers' attention expects."""
        if self.args.moe_attention == "sdpa":
            return causal_mask(padding_mask) if packed is None else packed.causal_mask()
        mask = self.buffered_future_mask(x)
        if packed is None:
            return mask
        return packed.attention_mask(mask, self.args.decoder_attention_heads)

    def _stack_stats(self, stats: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """name -> [L] or [L, E], NaN where a layer has fewer experts, 0 for dropped layers."""
        most = max(layer.num_experts for layer in self.moe_layers)
        rows = []
        for n, layer in enumerate(self.moe_layers):
            row = dict(stats[n] if n in stats else layer.zero_stats())
            fill = (0, most - layer.num_experts)
            row[st.LOAD_E] = nn.functional.pad(row[st.LOAD_E], fill, value=float("nan"))
            rows.append(row)
        return {
            name: torch.stack([row[name] for row in rows])
            for name, value in rows[0].items()
            if st.is_logged(name, value)
        }

    # Statistics of an update, from which gates learn. They are summed here and not in the layers,
    # whose forward pass activation checkpointing runs twice.

    def _add_to_update(self, stats: Mapping[int, Mapping[str, Tensor]]) -> None:
        if (
            self.in_dense_phase
            or not self._recording
            or not any(layer.gate.changes_after_updates for layer in self.moe_layers)
        ):
            return
        for n, row in stats.items():
            known = self._update_totals.get(n, {})
            self._update_totals[n] = {k: value + known.get(k, 0) for k, value in row.items()}

    @contextmanager
    def not_recording(self) -> Iterator[None]:
        """For batches that are not part of the update."""
        self._recording = False
        try:
            yield
        finally:
            self._recording = True

    def discard_update(self) -> None:
        """Clear the statistics since the last update: its optimizer step was skipped."""
        self._update_totals.clear()

    def finish_update(self, num_updates: int, group: Any = None) -> None:
        """Update buffers of gates from the routing of all ranks in the completed update.

        Args:
            num_updates: completed updates, this one included.
            group: the data-parallel process group; None if there is none.
        """
        totals, self._update_totals = self._update_totals, {}
        if num_updates <= self.moe_layers[0].spawn_updates:  # it was in the dense phase
            return
        if not any(layer.gate.changes_after_updates for layer in self.moe_layers):
            return
        rows = [totals.get(n) or layer.zero_stats() for n, layer in enumerate(self.moe_layers)]
        if group is not None:
            # In the same order on all ranks.
            flat = {(n, name): row[name] for n, row in enumerate(rows) for name in sorted(row)}
            for (n, name), total in all_reduce_dict(
                flat, self.embed_tokens.weight.device, group
            ).items():
                rows[n][name] = total
        layers = self._stack_stats(dict(enumerate(rows)))
        for layer, row in zip(self.moe_layers, rows, strict=True):
            layer.gate.finish_update(layer.gate_updates(num_updates), row, layers)

    def begin_record_routing(self) -> None:
        """Start recording for DynMoE's adaptive process; call it on all ranks.

        Earlier batches of the current update are not recorded.

        Raises:
            OptionError: the gate does not adapt, or adapts at fixed intervals.
        """
        for gate in self._manual_gates():
            gate.record.begin()
        self._update_totals.clear()

    def end_record_routing(self) -> None:
        """Stop recording; experts are removed and added at the end of the current update, or else
        of the next one. Call it on all ranks.

        Raises:
            OptionError: the gate does not adapt, or adapts at fixed intervals.
            RuntimeError: recording is not on.
        """
        for gate in self._manual_gates():
            gate.record.end()

    def _manual_gates(self) -> list[TopAnyGate]:
        gates = [layer.gate for layer in self.moe_layers if isinstance(layer.gate, TopAnyGate)]
        if len(gates) < len(self.moe_layers):
            raise OptionError(
                "moe_gate",
                self.args.moe_gate,
                "its number of experts is fixed: give top_any to record routing",
            )
        interval = self.args.moe_adapt_record_interval
        if interval:
            raise OptionError(
                "moe_adapt_record_interval",
                interval,
                "it sets what is recorded: give 0 to start and end by calls",
            )
        return gates

    def _check_finite(self, x: Tensor, inner_states: list[Tensor], moe_stats) -> None:
        """Stop before the optimizer spreads NaN through the weights."""
        bad_gates_L = moe_stats[st.NONFINITE]
        if torch.isfinite(x).all() & ~bad_gates_L.any():  # one synchronisation with the device
            return
        advice = "stopped before the optimizer step; lower --lr or --clip-norm, or look at the data"
        if bad_gates_L.any():
            n = int(bad_gates_L.nonzero()[0])
            raise NonFiniteError(
                f"{self.layer_name(n)}: gate logits are NaN/Inf for {int(bad_gates_L[n])} "
                f"tokens after {int(self.moe_layers[n].num_updates)} updates; {advice}"
            )
        finite = [bool(torch.isfinite(state).all()) for state in inner_states]
        if all(finite):
            where = "the output of decoder.layer_norm"
        else:
            first = finite.index(False)
            where = f"the output of decoder.layers.{first - 1}" if first else "the embedded input"
        raise NonFiniteError(f"{where} is NaN/Inf; {advice}")
