"""Convert a trained model to the configuration and tensors of the code in `remote`."""

from __future__ import annotations

import json
from typing import Any

from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import UNSUPPORTED, head_dim, is_causal_lm, kv_heads
from evomoe_plugin.export.routing import export_gate, gate_name
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.layer import MoELayer

_ACTIVATIONS = tuple("gelu gelu_accurate gelu_fast relu relu_squared swish tanh linear".split())


def check_exportable(trained: TrainedModel, without_eval_capacity: bool = False) -> None:
    """Raise `OptionError` if no format can express the model.

    Args:
        trained: an MoE model or fairseq's dense `transformer_lm`.
        without_eval_capacity: leave out capacities in evaluation.
    """
    model = trained.model
    if not isinstance(model, TransformerLanguageModel):
        raise OptionError(
            "arch",
            type(model).__name__,
            "cannot be exported: give a checkpoint of a transformer_lm or causal_lm",
        )
    args = model.decoder.args
    for option in UNSUPPORTED:
        if args.get(option):
            raise OptionError(option, args[option], "the exported model does not implement it")
    for layer in getattr(model.decoder, "moe_layers", ()):
        if layer.eval_capacity and not without_eval_capacity:
            raise OptionError(
                "moe_eval_capacity_factor",
                "(or token fraction)",
                "dropped pairs depend on the batch, and the exported model drops "
                "none: give --without-eval-capacity to export without it",
            )


def exported_model(trained: TrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, and the tensors by name.

    Raises:
        OptionError: an option that the exported model does not implement.
    """
    decoder = trained.model.decoder
    args = decoder.args  # as built, with defaults filled in
    if args.activation_fn not in _ACTIVATIONS:
        raise OptionError(
            "activation_fn",
            args.activation_fn,
            f"the exported model implements {', '.join(_ACTIVATIONS)}",
        )
    tensors: dict[str, Tensor] = {}

    def add(prefix: str, module: nn.Module, *names: str) -> None:
        for name in names:
            part = getattr(module, name)
            state = {} if part is None else part.state_dict()
            tensors.update({f"{prefix}{name}.{key}": value for key, value in state.items()})

    if decoder.embed_positions is not None and args.decoder_learned_pos:
        # The first position's row comes after that of padding.
        table = decoder.embed_positions
        tensors["embed_positions.weight"] = table.weight[table.padding_idx + 1 :]
    add(
        "",
        decoder,
        "embed_tokens",
        "project_in_dim",
        "project_out_dim",
        "layernorm_embedding",
        "layer_norm",
    )
    head = decoder.output_projection
    if not decoder.share_input_output_embed:
        tensors["output_projection.weight"] = head.weight
    if head.bias is not None:
        tensors["output_projection.bias"] = head.bias
    config = _outside_of_layers(trained)
    of_moe_layers: dict[str, Any] = {}
    for index, layer in enumerate(decoder.layers):
        prefix = f"layers.{index}."
        attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
        if is_causal_lm(args):
            attention += ["q_norm", "k_norm"]
        add(f"{prefix}self_attn.", layer.self_attn, *attention)
        add(prefix, layer, "self_attn_layer_norm", "final_layer_norm")
        moe: MoELayer | None = getattr(layer, "moe", None)
        if moe is None:
            add(prefix, layer, "fc1", "fc2", *(["fc3"] if is_causal_lm(args) else []))
            config["num_experts"].append(0)
            continue
        given, own = _moe(moe)
        config["num_experts"].append(given.pop("num_experts"))
        tensors |= {f"{prefix}moe.{name}": tensor for name, tensor in own.items()}
        for name, before in of_moe_layers.items():
            if before != given[name]:
                raise OptionError(
                    "moe_gate",
                    gate_name(moe.gate),
                    f"layer {index} has {name} {given[name]}, an earlier one "
                    f"{before}: the exported model has one value for all layers",
                )
        of_moe_layers = given
    return config | of_moe_layers, {name: tensor.detach() for name, tensor in tensors.items()}


def _outside_of_layers(trained: TrainedModel) -> dict[str, Any]:
    decoder, dictionary = trained.model.decoder, trained.dictionary
    args = decoder.args
    position = "learned" if args.decoder_learned_pos else "sinusoidal"
    table = decoder.embed_positions
    own: dict[str, Any] = {
        "position_embedding": "none" if table is None else position,
        "post_norm": not args.decoder_normalize_before,
        "num_key_value_heads": args.decoder_attention_heads,
        "head_dim": decoder.embed_dim // args.decoder_attention_heads,
    }
    if table is not None:
        own["first_position"] = table.padding_idx + 1
    if is_causal_lm(args):
        own = {
            "position_embedding": "rotary",
            "rope_parameters": {
                "rope_type": "default",
                **json.loads(args.rope_scaling or "{}"),
                "rope_theta": args.rope_theta,
                "partial_rotary_factor": args.rope_fraction,
            },
            "num_key_value_heads": kv_heads(args),
            "head_dim": head_dim(args),
            "norm": args.decoder_norm,
            "norm_eps": args.decoder_norm_eps,
            "qk_norm": args.decoder_qk_norm,
            "qkv_bias": args.decoder_qkv_bias,
            "out_bias": args.decoder_out_bias,
            "ffn_gated": args.decoder_ffn == "gated",
            "ffn_bias": args.decoder_ffn_bias,
            "parallel": args.decoder_parallel,
            "logits_bias": args.decoder_logits_bias,
        }
    return {
        "vocab_size": len(dictionary),
        "hidden_size": decoder.embed_dim,
        "input_dim": decoder.embed_tokens.embedding_dim,
        "output_dim": decoder.output_embed_dim,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": args.decoder_attention_heads,
        "intermediate_size": args.decoder_ffn_embed_dim,
        "max_position_embeddings": decoder.max_positions(),
        "activation": str(args.activation_fn),
        "scale_embedding": not args.no_scale_embedding,
        "layernorm_embedding": decoder.layernorm_embedding is not None,
        "final_norm": decoder.layer_norm is not None,
        "num_experts": [],
        "tie_word_embeddings": bool(decoder.share_input_output_embed),
        **own,
    }


def _moe(layer: MoELayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gate, single = layer.gate, layer.in_dense_phase
    routing, gate_tensors = export_gate(layer)
    tensors = {f"gate.{name}": tensor for name, tensor in gate_tensors.items()}
    used: slice | Tensor = slice(1 if single else layer.num_experts)
    if not single and (active_C := gate.active()) is not None:
        used = active_C[: layer.num_experts]
    tensors |= {f"experts.{n}": weight[used] for n, weight in layer.experts.named_parameters()}
    shared = None if layer.shared is None else layer.shared.experts
    if shared is not None:
        tensors |= {f"shared.{n}": weight for n, weight in shared.named_parameters()}
    return {
        "num_experts": len(tensors["experts.fc1_weight"]),
        "expert_ffn_dim": layer.experts.fc1_weight.size(1),
        "expert_gated": layer.experts.gated,
        "num_null_experts": 0 if single else gate.info.num_null,
        "num_shared_experts": shared.num_experts if shared else 0,
        "shared_ffn_dim": shared.fc1_weight.size(1) if shared else 0,
        "shared_combine": gate.shared_weights.kind if gate.shared_weights and not single else "add",
        "routing": routing,
    }, tensors
