"""Parameters and FLOPs of a model, computed from its options.

Under FSDP no rank holds the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from evomoe_plugin.config.moe_layers import expert_slots, moe_layer_indices
from evomoe_plugin.config.options import (
    CausalLMModelOptions,
    ModelOptions,
    expert_ffn_dim,
    has_gated_experts,
    head_dim,
    is_causal_lm,
    kv_heads,
    shared_ffn_dim,
    stack_kind,
)
from evomoe_plugin.config.stacks import stacks
from evomoe_plugin.config.values import parse_bool
from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.gates import Gate, LayerInfo, gate_class


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; shared ones count once."""

    total: int
    experts: int  # In all routed and shared experts
    active_top1: int  # Used for a token that goes to one routed expert in every MoE layer


def _gates(options: ModelOptions, vocabulary: int) -> list[Gate]:
    """A gate for each MoE layer; layers with equal numbers of experts share one."""
    counts = expert_slots(options)
    made: dict[int, Gate] = {}
    with torch.random.fork_rng(devices=[]):
        for count in counts:
            if count not in made:
                info = LayerInfo(
                    options.decoder_embed_dim,
                    count,
                    options.moe_null_experts,
                    token_counts_V=(1,) * vocabulary,
                )
                made[count] = gate_class(options.moe_gate)(info, options)
    return [made[count] for count in counts]


@dataclass(frozen=True)
class _DenseParts:
    """Parameters of a stack outside of MoE layers, and its multiply-adds."""

    attention_and_norms: int  # Of a layer
    ffn: int  # Of a layer with a dense FFN
    outside: int  # Embeddings, final norm, output
    projected: int  # Multiply-adds of a layer's attention for a token, in projections
    attended: int  # ... in its scores, of a token and its whole context
    output: int  # ... in the projections of embeddings and to the vocabulary
    ffn_matrices: int
    per_target: int = 0  # ... for a token whose logits are computed, where not all are


def _gpt_parts(options: ModelOptions, vocabulary: int) -> _DenseParts:
    width, ffn_dim = options.decoder_embed_dim, options.decoder_ffn_embed_dim
    input_dim = options.decoder_input_dim or width
    output_dim = options.decoder_output_dim or width
    separate = 0 if options.share_decoder_input_output_embed else vocabulary * output_dim
    projections = sum(dim * width for dim in (input_dim, output_dim) if dim != width)
    outside = vocabulary * input_dim + separate + projections
    if options.decoder_learned_pos and not options.no_token_positional_embeddings:
        # fairseq has two more rows, for the padding index and its offset.
        outside += ((options.max_target_positions or options.tokens_per_sample) + 2) * width
    if options.layernorm_embedding:
        outside += 2 * width
    no_final_norm = options.no_decoder_final_norm or options.moe_post_norm
    return _DenseParts(
        attention_and_norms=4 * (width * width + width) + 2 * 2 * width,
        ffn=2 * width * ffn_dim + ffn_dim + width,
        outside=outside + (0 if no_final_norm else 2 * width),
        projected=4 * width * width,
        attended=2 * width * options.tokens_per_sample,
        output=projections + output_dim * vocabulary,
        ffn_matrices=2,
    )


def _causal_lm_parts(options: CausalLMModelOptions, vocabulary: int) -> _DenseParts:
    width, ffn_dim = options.decoder_embed_dim, options.decoder_ffn_embed_dim
    heads, kv, dim = options.decoder_attention_heads, kv_heads(options), head_dim(options)
    affine = 1 if options.decoder_norm == "rms" else 2  # weight, bias
    projected = 2 * (heads + kv) * dim * width
    biases = (heads + 2 * kv) * dim * options.decoder_qkv_bias + width * options.decoder_out_bias
    qk_norms = {
        "none": 0,
        "shared": 2 * dim * affine,
        "separate": (heads + kv) * dim,
        "joint": (heads + kv) * dim * affine,
    }[options.decoder_qk_norm]
    norms = (1 if options.decoder_parallel else 2) * affine * width
    gated = options.decoder_ffn == "gated"
    matrices = 3 if gated else 2
    ffn_biases = (ffn_dim * (matrices - 1) + width) * options.decoder_ffn_bias
    tables = 1 if options.share_decoder_input_output_embed else 2
    outside = tables * vocabulary * width + affine * width
    return _DenseParts(
        attention_and_norms=projected + biases + qk_norms + norms,
        ffn=matrices * width * ffn_dim + ffn_biases,
        outside=outside + vocabulary * options.decoder_logits_bias,
        projected=projected,
        attended=2 * heads * dim * options.tokens_per_sample,
        output=(options.decoder_output_dim or width) * vocabulary,
        ffn_matrices=matrices,
    )


def _encoder_parts(options: Any, vocabulary: int) -> _DenseParts:
    """Of an encoder with attention over no context: sentences have any length."""
    width, ffn_dim = options.decoder_embed_dim, options.decoder_ffn_embed_dim
    return _DenseParts(
        attention_and_norms=4 * (width * width + width) + 2 * 2 * width,
        ffn=2 * width * ffn_dim + ffn_dim + width,
        outside=vocabulary * width + 2 * width * options.decoder_normalize_before,
        projected=4 * width * width,
        attended=0,
        output=0,
        ffn_matrices=2,
    )


def _translation_encoder_parts(options: Any, vocabulary: int) -> _DenseParts:
    parts, width = _encoder_parts(options, vocabulary), options.decoder_embed_dim
    outside = parts.outside + 2 * width * options.layernorm_embedding
    if options.decoder_learned_pos and not options.no_token_positional_embeddings:
        outside += (options.max_source_positions + 2) * width
    return replace(parts, outside=outside)


def _roberta_parts(options: Any, vocabulary: int) -> _DenseParts:
    parts, width = _encoder_parts(options, vocabulary), options.decoder_embed_dim
    outside = parts.outside + width * width + 3 * width + vocabulary  # and the head
    outside += vocabulary * width * options.untie_weights_roberta
    if parse_bool("layernorm_embedding", options.layernorm_embedding):
        outside += 2 * width
    if not options.no_token_positional_embeddings:
        outside += (options.max_positions + 2) * width
    return replace(
        parts,
        outside=outside,
        attended=2 * width * options.max_positions,
        per_target=width * width + width * vocabulary,
    )


def _decoder_parts(options: Any, vocabulary: int) -> _DenseParts:
    """Of a translation model; keys and values of the source are counted for each token of the
    decoder."""
    width, source, ffn_dim = (
        options.decoder_embed_dim,
        options.encoder_embed_dim,
        options.decoder_ffn_embed_dim,
    )
    input_dim, output_dim = options.decoder_input_dim, options.decoder_output_dim
    projections = sum(dim * width for dim in (input_dim, output_dim) if dim != width)
    outside = projections + vocabulary * (
        input_dim * (not options.share_all_embeddings)
        + output_dim * (not options.share_decoder_input_output_embed)
    )
    if options.decoder_learned_pos and not options.no_token_positional_embeddings:
        outside += (options.max_target_positions + 2) * width
    if options.layernorm_embedding:
        outside += 2 * width
    if options.decoder_normalize_before and not options.no_decoder_final_norm:
        outside += 2 * width
    to_source = 2 * source * width
    return _DenseParts(
        attention_and_norms=6 * (width * width + width) + to_source + 2 * width + 3 * 2 * width,
        ffn=2 * width * ffn_dim + ffn_dim + width,
        outside=outside,
        projected=6 * width * width + to_source,
        attended=0,
        output=projections + output_dim * vocabulary,
        ffn_matrices=2,
    )


def _dense_parts(options: ModelOptions, vocabulary: int) -> _DenseParts:
    if is_causal_lm(options):
        return _causal_lm_parts(options, vocabulary)
    if stack_kind(options) == "encoder":
        is_roberta = hasattr(options, "untie_weights_roberta")
        return (_roberta_parts if is_roberta else _translation_encoder_parts)(options, vocabulary)
    if hasattr(options, "encoder_layers"):
        return _decoder_parts(options, vocabulary)
    return _gpt_parts(options, vocabulary)


def count_parameters(
    options: ModelOptions, vocabulary: int, target_vocabulary: int | None = None
) -> ParameterCount:
    """Parameters of the model with these options and `vocabulary` token ids; `target_vocabulary`
    those of the decoder, if an encoder has other ones."""
    vocabularies = (vocabulary, target_vocabulary or vocabulary)
    counts = [
        _count_stack(part, tokens)
        for part, tokens in zip(stacks(options), vocabularies, strict=False)
    ]
    return ParameterCount(
        sum(count.total for count in counts),
        sum(count.experts for count in counts),
        sum(count.active_top1 for count in counts),
    )


def _count_stack(options: ModelOptions, vocabulary: int) -> ParameterCount:
    moe_layers = moe_layer_indices(options, options.decoder_layers)
    counts, width = expert_slots(options), options.decoder_embed_dim
    gated, dense = has_gated_experts(options), _dense_parts(options, vocabulary)
    one_expert = ExpertFFN.num_parameters(1, width, expert_ffn_dim(options), gated)
    shared = len(moe_layers) * ExpertFFN.num_parameters(
        options.moe_shared_experts, width, shared_ffn_dim(options), gated
    )
    routed = sum(counts) * one_expert
    gates = sum(p.numel() for gate in _gates(options, vocabulary) for p in gate.parameters())
    layers = options.decoder_layers * dense.attention_and_norms
    layers += (options.decoder_layers - len(moe_layers)) * dense.ffn
    total = layers + routed + shared + gates + dense.outside
    return ParameterCount(total, routed + shared, total - routed + len(counts) * one_expert)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the matmuls of one forward pass."""

    per_token: int
    """Everything but the routed experts: attention over a full context, dense FFNs, gates, shared
    experts, projections of the embeddings, vocabulary."""
    per_pair: int  # One routed pair in one MoE layer
    gates: int = 0  # Part of `per_token` that is due to gates
    per_target: int = 0
    """What is computed for a token whose logits are asked for, where it is not for all (RoBERTa's
    head)."""

    @property
    def without_gates(self) -> ForwardFlops:
        """The same without gates."""
        return replace(self, per_token=self.per_token - self.gates, gates=0)


def count_flops(options: ModelOptions, vocabulary: int) -> ForwardFlops:
    """Analytic FLOPs of a stack, two to a multiply-add. A training step takes three forward passes'
    worth (four with activation checkpointing).

    Args:
        options: of the stack (`config.stacks`).
        vocabulary: number of token ids.
    """
    width = options.decoder_embed_dim
    moe_layers = moe_layer_indices(options, options.decoder_layers)
    matrices = ExpertFFN.num_matrices(has_gated_experts(options))
    dense = _dense_parts(options, vocabulary)
    attention = 2 * (dense.projected + dense.attended)
    dense_layers = options.decoder_layers - len(moe_layers)
    gates = sum(gate.flops_per_token() for gate in _gates(options, vocabulary))
    per_token = (
        options.decoder_layers * attention
        + dense_layers * 2 * dense.ffn_matrices * width * options.decoder_ffn_embed_dim
        + gates
        + len(moe_layers)
        * options.moe_shared_experts
        * 2
        * matrices
        * width
        * shared_ffn_dim(options)
        + 2 * dense.output
    )
    per_pair = 2 * matrices * width * expert_ffn_dim(options)
    return ForwardFlops(per_token, per_pair, gates, 2 * dense.per_target)
