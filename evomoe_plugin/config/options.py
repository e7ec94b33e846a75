"""The MoE options that all gates share, and values derived from them.

fairseq turns the dataclasses here and in each gate's module into command line flags and Hydra
fields. They do not depend on fairseq.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any, Optional, TypeGuard


def flag(default: Any, help: str, **metadata: str) -> Any:
    """A dataclass field that fairseq makes a flag and Hydra a field, with its help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class MoEOptions:
    """Positions and contents of MoE layers, for every gate."""

    moe_freq: int = flag(2, "every N-th layer is an MoE layer; 1: every layer")
    moe_start_layer: Optional[int] = flag(
        None, "the first MoE layer, from 0 (default: layer N-1 of --moe-freq N)"
    )
    moe_layers: Optional[str] = flag(
        None,
        "indices of the MoE layers, from 0 (5,8,11), instead of --moe-freq and --moe-start-layer; "
        "none: a dense model",
    )
    moe_expert_count: str = flag(
        "16",
        "routed experts of each MoE layer: one number, one per MoE layer (4,4,8,16), or "
        "FIRST:LAST to grow linearly with depth",
    )
    moe_expert_ffn_dim: int = flag(0, "hidden width of an expert; 0: that of a dense FFN")
    moe_expert_size_factor: int = flag(
        1, "an expert's hidden width is that of a dense FFN divided by this"
    )
    moe_expert_gated: bool = flag(
        False,
        "experts are gated: W2 (act(W1 x) * W3 x), without biases; SwiGLU with --activation-fn "
        "swish, GEGLU with gelu",
    )
    moe_gate: str = flag(
        "dense_to_sparse", "the gate that routes tokens to experts, by its registered name"
    )
    # A string, because fairseq makes a boolean whose default is True a flag that turns it off.
    moe_gating_use_fp32: str = flag(
        "true",
        "compute gates in fp32 in models of lower precision (true|false)",
        argparse_const="true",
    )
    moe_matmul_dtype: str = flag(
        "same",
        "dtype of matmuls: same (as the weights) or bf16 (with weights, gates, norms and losses "
        "in fp32)",
    )
    # The old name, still accepted on command lines, in Hydra and in stored configurations.
    moe_products_dtype: Optional[str] = flag(None, argparse.SUPPRESS)
    moe_aux: Optional[str] = flag(
        None,
        "auxiliary losses and their coefficients, balance=0.01,z=0.001 or none (default: depends "
        "on the gate); all are multiplied by --moe-gate-loss-wt",
    )
    moe_weight_scale: str = flag(
        "none",
        "scale of the combine weights: none; unit (a token's weights sum to --moe-weight-total, "
        "with the gradient of the unscaled ones); mean (their sums have that mean, by their "
        "running mean); learned (times a learned gain of each candidate)",
    )
    moe_weight_total: float = flag(
        1.0,
        "sum of a token's weights with --moe-weight-scale unit, mean of it with mean; k gives each "
        "of k experts the weight 1 on average",
    )
    moe_shared_experts: int = flag(
        0, "experts that every token goes to, in addition to the routed ones"
    )
    moe_shared_ffn_dim: int = flag(0, "hidden width of a shared expert; 0: that of the routed ones")
    moe_shared_size_factor: int = flag(
        0,
        "a shared expert's hidden width is that of a dense FFN divided by this; 0: that of the "
        "routed ones",
    )
    moe_shared_combine: str = flag(
        "add",
        "weights of shared experts: add (1), softmax (over the selected routed and the shared "
        "experts, as DCMoE), mix (one learned share for all of them, as residual MoE), sigmoid (a "
        "learned one for each, independent of the routed experts, as Qwen2-MoE)",
    )
    moe_null_experts: int = flag(0, "candidates of the gate without computation, whose output is 0")
    moe_null_rate_target: Optional[float] = flag(
        None, "mean probability of null experts that the loss `null` aims at"
    )
    moe_capacity_factor: Optional[float] = flag(
        None,
        "in training an expert gets at most ceil(factor * pairs / experts) tokens (default: no "
        "limit)",
    )
    moe_eval_capacity_factor: Optional[float] = flag(
        None, "the same in evaluation (default: no limit)"
    )
    moe_eval_capacity_token_fraction: float = flag(
        -1.0,
        "in evaluation an expert gets at most this fraction of the tokens of the batch; -1: no "
        "limit",
    )
    moe_min_capacity: Optional[int] = flag(None, "lower bound of capacities in tokens (default: 0)")
    moe_drop_policy: Optional[str] = flag(
        None,
        "which tokens an expert at its capacity keeps: position (the first; the default), probs "
        "(the most probable) or random",
    )
    moe_renormalize_after_drop: bool = flag(
        False, "scale the weights that a token keeps after dropping to their sum before"
    )
    moe_post_norm: bool = flag(
        False,
        "post-norm layers as in fairseq's default transformer_lm, for models converted from one; "
        "otherwise pre-norm",
    )
    moe_attention: str = flag(
        "sdpa",
        "self-attention of all layers: sdpa (torch's scaled_dot_product_attention) or stock "
        "(fairseq's own); equal up to rounding",
    )
    moe_document_mask: bool = flag(
        False,
        "tokens of a row attend only to their own document, which begins with </s>; positions "
        "restart in each",
    )
    moe_log_experts: int = flag(
        0, "log every N updates the share of the pairs that each expert has; 0: never"
    )
    moe_peak_tflops: Optional[float] = flag(
        None,
        "peak of a device, of which mfu is the share (default: of known GPUs from a table, of CPUs "
        "measured)",
    )
    moe_init_from_dense: Optional[str] = flag(
        None,
        "dense transformer_lm checkpoint to initialise a run without a checkpoint of its own: its "
        "FFNs become the experts",
    )
    moe_init_method: str = flag(
        "copy",
        "how experts are made from a dense FFN: copy, mask, noise, reinit (each from the whole "
        "FFN), slice (smaller experts, each from a part), none (random initialisation)",
    )
    moe_init_rate: Optional[float] = flag(
        None,
        "rate of --moe-init-method: mask (share of the weights), noise (relative to their "
        "standard deviation), reinit (share of the hidden units); default: 0.3, 0.1, 0.5",
    )
    moe_init_rescale: bool = flag(
        False,
        "mask: divide the remaining weights by 1 - rate; slice: multiply an expert's output by "
        "the number of slices",
    )
    moe_init_slices: str = flag("contiguous", "hidden units of a slice: contiguous or shuffled")
    moe_init_gate: str = flag(
        "default", "initial weights of the gates: default, zero, or normal:STD"
    )
    moe_train_only: Optional[str] = flag(
        None,
        "train only these parameters and freeze the others: comma-separated words (experts, "
        "shared, gate, attention, ffn, embeddings, norms, head) or regular expressions over "
        "parameter names",
    )
    moe_expert_parallel_size: int = flag(
        1,
        "number of ranks that the experts of each layer are sharded over, with all-to-all "
        "exchange of tokens; 1: every rank has all experts",
    )
    moe_ep_chunks: int = flag(
        1,
        "with --moe-expert-parallel-size, number of chunks of the exchange, which overlap with "
        "computation",
    )
    moe_ep_wire_dtype: str = flag(
        "same", "transport dtype of exchanged tokens: same (no cast), fp32, fp16, bf16"
    )
    moe_ep_checkpoint: str = flag(
        "auto",
        "with --moe-expert-parallel-size, checkpoints are one file (consolidated), or have the "
        "experts in one further file per rank (sharded); auto: by --moe-ep-consolidate-below",
    )
    moe_ep_consolidate_below: float = flag(
        4.0,
        "maximum GiB of all experts and their optimizer state for which --moe-ep-checkpoint auto "
        "writes one file",
    )
    moe_spawn_updates: Optional[int] = flag(
        None,
        "updates of the dense phase (EvoMoE's expert-diversify), in which only the first expert "
        "of each layer is used, without a gate; then all experts are spawned from it (default: no "
        "such phase)",
    )
    moe_spawn_method: str = flag(
        "mask",
        "how experts are spawned: mask (a share of the weights is set to 0), noise (is added), "
        "reinit (a share of the hidden units is reinitialised), copy",
    )
    moe_spawn_rate: Optional[float] = flag(
        None,
        "share of weights or hidden units, or noise relative to the weights' standard deviation "
        "(default: mask 0.3, reinit 0.5, noise 0.1)",
    )
    moe_spawn_rescale: bool = flag(
        False, "divide the weights that mask keeps by the share of kept weights"
    )
    # A string like moe_gating_use_fp32.
    moe_spawn_trainable_masked: str = flag(
        "true", "train the weights that mask set to 0; false keeps them at 0 (true|false)"
    )
    moe_spawn_moments: str = flag(
        "copy",
        "optimizer moments of spawned experts: copy (of the first expert; 0 for masked or "
        "reinitialised weights) or reset (0)",
    )


@dataclass
class CausalLMOptions:
    """The decoder of the `causal_lm` architectures, beside fairseq's own sizes."""

    hf_config: Optional[str] = flag(
        None,
        "config.json of a Hugging Face model, or its folder: gives the decoder's sizes and options",
    )
    decoder_kv_heads: int = flag(
        0, "key/value heads (grouped-query attention); 0: --decoder-attention-heads"
    )
    decoder_head_dim: int = flag(
        0, "width of a head; 0: --decoder-embed-dim divided by --decoder-attention-heads"
    )
    decoder_norm: str = flag("rms", "norms: rms (RMSNorm) or layer (LayerNorm)")
    decoder_norm_eps: float = flag(1e-5, "epsilon of the norms")
    decoder_qk_norm: str = flag(
        "none",
        "norm of queries and keys before they are rotated: none, shared (over each head's width, "
        "one weight for all heads: Qwen3, Phi), separate (one weight for each head: StableLM), "
        "joint (over all heads at once: OLMoE)",
    )
    decoder_qkv_bias: bool = flag(False, "projections to queries, keys and values have biases")
    decoder_out_bias: bool = flag(False, "the output projection of attention has a bias")
    decoder_ffn: str = flag(
        "gated", "FFNs and experts: gated (W2 (act(W1 x) * W3 x)) or plain (W2 act(W1 x))"
    )
    decoder_ffn_bias: bool = flag(False, "dense FFNs have biases")
    decoder_parallel: bool = flag(
        False, "attention and FFN of a layer side by side, on the output of one norm"
    )
    decoder_logits_bias: bool = flag(False, "the output projection to the vocabulary has a bias")
    rope_theta: float = flag(10000.0, "base of the wavelengths of rotary positions")
    rope_fraction: float = flag(1.0, "share of each head's width that is rotated")
    rope_scaling: Optional[str] = flag(
        None,
        "scaling of rotary positions, a JSON object as rope_parameters in a config.json, of "
        "rope_type linear, llama3 or yarn",
    )


@dataclass
class ModelOptions(MoEOptions):
    """The options of a model that the package reads: ours and those of fairseq's transformer_lm.

    Used as a type; any object with these fields will do. Options of gates inherit from it.
    """

    decoder_layers: int = 6
    decoder_embed_dim: int = 512
    decoder_ffn_embed_dim: int = 2048
    decoder_attention_heads: int = 8
    decoder_input_dim: int = 0
    decoder_output_dim: int = 0
    decoder_learned_pos: bool = False
    decoder_layerdrop: float = 0.0
    decoder_normalize_before: bool = False
    no_decoder_final_norm: bool = False
    no_token_positional_embeddings: bool = False
    layernorm_embedding: bool = False
    share_decoder_input_output_embed: bool = False
    activation_fn: str = "relu"
    max_target_positions: Optional[int] = None
    tokens_per_sample: int = 1024
    checkpoint_activations: bool = False
    offload_activations: bool = False
    min_params_to_wrap: int = 100_000_000
    seed: int = 1
    max_update: Optional[int] = None


@dataclass
class CausalLMModelOptions(CausalLMOptions, ModelOptions):
    """The options of a `causal_lm` architecture and their defaults; used as a type."""

    activation_fn: str = "swish"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0


def is_causal_lm(options: object) -> TypeGuard[CausalLMModelOptions]:
    """Whether the options are a `causal_lm` architecture's, rather than a GPT's."""
    return hasattr(options, "decoder_norm")


def kv_heads(options: CausalLMModelOptions) -> int:
    """Key/value heads."""
    return options.decoder_kv_heads or options.decoder_attention_heads


def head_dim(options: CausalLMModelOptions) -> int:
    """Width of an attention head."""
    return options.decoder_head_dim or (
        options.decoder_embed_dim // options.decoder_attention_heads
    )


def has_gated_experts(options: ModelOptions) -> bool:
    """Whether experts are gated: where dense FFNs are, or `--moe-expert-gated` says so."""
    return options.moe_expert_gated or (is_causal_lm(options) and options.decoder_ffn == "gated")


def stack_kind(options: ModelOptions) -> str:
    """Whether the options are of an encoder or a decoder (`config.stacks`)."""
    return getattr(options, "kind", "decoder")


def is_causal(options: ModelOptions) -> bool:
    """Whether a token's output must not depend on later tokens."""
    return stack_kind(options) == "decoder"


def option_name(options: ModelOptions, name: str) -> str:
    """The option that the user knows `name` by: an encoder's has another name."""
    return getattr(options, "name_of", str)(name)


def expert_ffn_dim(options: ModelOptions) -> int:
    """F: hidden width of a routed expert."""
    return options.moe_expert_ffn_dim or (
        options.decoder_ffn_embed_dim // options.moe_expert_size_factor
    )


def shared_ffn_dim(options: ModelOptions) -> int:
    """Hidden width of a shared expert."""
    if options.moe_shared_size_factor:
        return options.decoder_ffn_embed_dim // options.moe_shared_size_factor
    return options.moe_shared_ffn_dim or expert_ffn_dim(options)


def gated_updates(options: ModelOptions) -> int:
    """Updates of the run with gates: all, or those after the spawn; 0: unknown."""
    return max(0, (options.max_update or 0) - (options.moe_spawn_updates or 0))


# Names of fairseq's activations.
ACTIVATIONS = tuple("relu relu_squared gelu gelu_fast gelu_accurate tanh linear swish".split())
# Options of fairseq's transformer_lm that change FFNs or the vocabulary, and NormFormer's scales,
# which fairseq accepts and then ignores in its decoder.
UNSUPPORTED = tuple(
    "character_embeddings adaptive_input adaptive_softmax_cutoff quant_noise_pq quant_noise_scalar "
    "base_layers encoder_layers_to_keep decoder_layers_to_keep decoder_xformers_att_config "
    "scale_fc scale_attn scale_heads scale_resids".split()
)
MATMUL_DTYPES = ("same", "bf16")
