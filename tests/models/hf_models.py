"""Tiny random models of transformers, one of each kind that can be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Name -> transformers' prefix and what differs from `SIZES`.
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("Llama", {"num_key_value_heads": 4}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR, "head_dim": 12},
    ),
    "mistral": ("Mistral", {"sliding_window": 48, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi": ("Phi", {"num_key_value_heads": 4}),
    "phi with norms": ("Phi", {"qk_layernorm": True}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm parallel": (
        "StableLm",
        {"use_parallel_residual": True, "qk_layernorm": True},
    ),
}
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**EXPERTS, "shared_expert_intermediate_size": 40, "num_hidden_layers": 3}
        | {"decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0], "head_dim": 16},
    ),
}


def make_hf(name: str, **given: Any) -> Any:
    """A random model in evaluation mode, whose weights make logits differ."""
    kind, own = {**DENSE, **MOE}[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **given})
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def save_hf(folder: Path, name: str, dtype: torch.dtype | None = None, **given: Any) -> Any:
    """Save such a model as transformers does, and return it."""
    shard_size = given.pop("max_shard_size", "5GB")
    model = make_hf(name, **given)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return model
