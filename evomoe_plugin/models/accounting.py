"""Parameters and FLOPs of a model, computed from its options.

Under FSDP no rank holds the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evomoe_plugin.config.options import (
    ModelOptions,
    expert_ffn_dim,
    expert_slots,
    moe_layer_indices,
    shared_ffn_dim,
)
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


def _embedding_dims(options: ModelOptions) -> tuple[int, int, int]:
    """Widths of the input and the output embeddings, and the parameters of the matrices that
    project between them and the decoder's width."""
    width = options.decoder_embed_dim
    dims = options.decoder_input_dim or width, options.decoder_output_dim or width
    return *dims, sum(dim * width for dim in dims if dim != width)


def count_parameters(options: ModelOptions, vocabulary: int) -> ParameterCount:
    """Parameters of the model with these options and `vocabulary` token ids."""
    width, ffn_dim = options.decoder_embed_dim, options.decoder_ffn_embed_dim
    input_dim, output_dim, projections = _embedding_dims(options)
    moe_layers = moe_layer_indices(options, options.decoder_layers)
    counts = expert_slots(options)

    attention_and_norms = 4 * (width * width + width) + 2 * 2 * width
    dense_ffn = 2 * width * ffn_dim + ffn_dim + width
    gated = options.moe_expert_gated
    one_expert = ExpertFFN.num_parameters(1, width, expert_ffn_dim(options), gated)
    shared = len(moe_layers) * ExpertFFN.num_parameters(
        options.moe_shared_experts, width, shared_ffn_dim(options), gated
    )
    routed = sum(counts) * one_expert
    gates = sum(p.numel() for gate in _gates(options, vocabulary) for p in gate.parameters())

    separate = 0 if options.share_decoder_input_output_embed else vocabulary * output_dim
    embeddings = vocabulary * input_dim + separate + projections
    if options.decoder_learned_pos and not options.no_token_positional_embeddings:
        # fairseq has two more rows, for the padding index and its offset.
        embeddings += ((options.max_target_positions or options.tokens_per_sample) + 2) * width
    if options.layernorm_embedding:
        embeddings += 2 * width
    no_final_norm = options.no_decoder_final_norm or options.moe_post_norm
    final_norm = 0 if no_final_norm else 2 * width

    dense_layers = options.decoder_layers - len(moe_layers)
    layers = options.decoder_layers * attention_and_norms + dense_layers * dense_ffn
    total = layers + routed + shared + gates + embeddings + final_norm
    return ParameterCount(total, routed + shared, total - routed + len(counts) * one_expert)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the matmuls of one forward pass."""

    per_token: int
    """Everything but the routed experts: attention over a full context, dense FFNs, gates, shared
    experts, projections of the embeddings, vocabulary."""
    per_pair: int  # One routed pair in one MoE layer
    gates: int = 0  # Part of `per_token` that is due to gates

    @property
    def without_gates(self) -> ForwardFlops:
        """The same without gates."""
        return ForwardFlops(self.per_token - self.gates, self.per_pair)


def count_flops(options: ModelOptions, vocabulary: int) -> ForwardFlops:
    """Analytic FLOPs, two to a multiply-add. A training step takes three forward passes' worth
    (four with activation checkpointing)."""
    width = options.decoder_embed_dim
    _, output_dim, projections = _embedding_dims(options)
    moe_layers = moe_layer_indices(options, options.decoder_layers)
    matrices = ExpertFFN.num_matrices(options.moe_expert_gated)
    context = options.tokens_per_sample
    attention = 8 * width * width + 4 * width * context
    dense_layers = options.decoder_layers - len(moe_layers)
    gates = sum(gate.flops_per_token() for gate in _gates(options, vocabulary))
    per_token = (
        options.decoder_layers * attention
        + dense_layers * 4 * width * options.decoder_ffn_embed_dim
        + gates
        + len(moe_layers)
        * options.moe_shared_experts
        * 2
        * matrices
        * width
        * shared_ffn_dim(options)
        + 2 * projections
        + 2 * output_dim * vocabulary
    )
    return ForwardFlops(per_token, 2 * matrices * width * expert_ffn_dim(options), gates)
