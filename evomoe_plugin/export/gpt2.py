"""Dense GPTs as transformers' GPT2LMHeadModel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.checkpoint.gpt2_config import ACTIVATIONS
from evomoe_plugin.config.options import is_causal_lm
from evomoe_plugin.export.misfit import Misfit
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.decoder_layer import MoEDecoderLayer

# fairseq's names -> transformers'. fairseq's gelu_fast is the tanh approximation too.
_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
}


def gpt2_config(trained: TrainedModel) -> dict[str, Any]:
    """The config.json.

    Raises:
        Misfit: an option that GPT-2 does not have.
    """
    decoder = trained.model.decoder
    args, width = decoder.args, decoder.embed_dim
    if is_causal_lm(args):
        raise Misfit("decoder_norm", args.decoder_norm)
    widths = {_ffn_dim(args, layer) for layer in decoder.layers}
    wanted = (
        ("decoder_normalize_before", bool(args.decoder_normalize_before)),
        ("no_decoder_final_norm", decoder.layer_norm is not None),
        ("decoder_learned_pos", decoder.embed_positions is not None and args.decoder_learned_pos),
        ("no_scale_embedding", bool(args.no_scale_embedding)),
        ("layernorm_embedding", decoder.layernorm_embedding is None),
        ("decoder_input_dim", decoder.project_in_dim is None),
        ("decoder_output_dim", decoder.project_out_dim is None),
        ("activation_fn", args.activation_fn in _ACTIVATIONS),
    )
    for option, fits in wanted:
        if not fits:
            raise Misfit(option, args[option])
    if len(widths) > 1:
        raise Misfit("moe_expert_ffn_dim", args.moe_expert_ffn_dim)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": len(trained.dictionary),
        "n_positions": decoder.max_positions(),
        "n_embd": width,
        "n_layer": len(decoder.layers),
        "n_head": args.decoder_attention_heads,
        "n_inner": widths.pop(),
        "activation_function": _ACTIVATIONS[args.activation_fn],
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": args.dropout,
        "embd_pdrop": args.dropout,
        "attn_pdrop": args.attention_dropout,
        "tie_word_embeddings": bool(decoder.share_input_output_embed),
        "use_cache": True,
    }


def _ffn_dim(args: Any, layer: Any) -> int:
    """Hidden width of a layer that has one FFN."""
    if not isinstance(layer, MoEDecoderLayer):
        return layer.fc1.out_features
    moe: MoELayer = layer.moe
    if not moe.in_dense_phase:
        raise Misfit("moe_layers", f"(layers with {moe.num_experts} experts)")
    if moe.shared is not None:
        raise Misfit("moe_shared_experts", args.moe_shared_experts)
    if moe.experts.gated:
        raise Misfit("moe_expert_gated", args.moe_expert_gated)
    return moe.experts.fc1_weight.size(1)


def gpt2_tensors(trained: TrainedModel) -> Iterator[tuple[str, Tensor]]:
    """transformers' names and tensors. Conv1D weights are nn.Linear's transposed."""
    decoder = trained.model.decoder
    yield "transformer.wte.weight", decoder.embed_tokens.weight
    table = decoder.embed_positions
    # fairseq's first position comes after the row of padding.
    yield "transformer.wpe.weight", table.weight[table.padding_idx + 1 :]
    for n, layer in enumerate(decoder.layers):
        name, attention = f"transformer.h.{n}", layer.self_attn
        for norm, module in (
            ("ln_1", layer.self_attn_layer_norm),
            ("ln_2", layer.final_layer_norm),
        ):
            yield f"{name}.{norm}.weight", module.weight
            yield f"{name}.{norm}.bias", module.bias
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        yield f"{name}.attn.c_attn.weight", torch.cat([part.weight for part in qkv]).t()
        yield f"{name}.attn.c_attn.bias", torch.cat([part.bias for part in qkv])
        yield f"{name}.attn.c_proj.weight", attention.out_proj.weight.t()
        yield f"{name}.attn.c_proj.bias", attention.out_proj.bias
        if isinstance(layer, MoEDecoderLayer):
            experts = layer.moe.experts
            yield f"{name}.mlp.c_fc.weight", experts.fc1_weight[0].t()
            yield f"{name}.mlp.c_fc.bias", experts.fc1_bias[0]
            yield f"{name}.mlp.c_proj.weight", experts.fc2_weight[0]
            yield f"{name}.mlp.c_proj.bias", experts.fc2_bias[0]
        else:
            yield f"{name}.mlp.c_fc.weight", layer.fc1.weight.t()
            yield f"{name}.mlp.c_fc.bias", layer.fc1.bias
            yield f"{name}.mlp.c_proj.weight", layer.fc2.weight.t()
            yield f"{name}.mlp.c_proj.bias", layer.fc2.bias
    yield "transformer.ln_f.weight", decoder.layer_norm.weight
    yield "transformer.ln_f.bias", decoder.layer_norm.bias
    if not decoder.share_input_output_embed:
        yield "lm_head.weight", decoder.output_projection.weight
