"""Convert a trained model to the configuration and tensors of `modeling_evomoe`."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import UNSUPPORTED, is_causal_lm
from evomoe_plugin.export.routing import export_gate, gate_name
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.decoder_layer import MoEDecoderLayer

_ACTIVATIONS = ("gelu", "gelu_accurate", "gelu_fast", "relu", "swish", "tanh", "linear")


def exported_model(
    trained: TrainedModel, without_eval_capacity: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, and the tensors by name.

    Args:
        trained: an MoE model or fairseq's dense `transformer_lm`.
        without_eval_capacity: omit evaluation capacities.
    Raises:
        OptionError: an option that the exported model does not implement.
    """
    model = trained.model
    if not isinstance(model, TransformerLanguageModel):
        raise OptionError(
            "arch",
            type(model).__name__,
            "cannot be exported: give a checkpoint of a transformer_lm",
        )
    decoder, args = model.decoder, model.decoder.args  # as built, with defaults filled in
    if is_causal_lm(args):
        raise OptionError("arch", type(model).__name__, "cannot be exported yet: only GPTs can")
    for option in UNSUPPORTED:
        if args.get(option):
            raise OptionError(option, args[option], "the exported model does not implement it")
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
        # fairseq's positions start after the padding index.
        weight = decoder.embed_positions.weight
        tensors["embed_positions.weight"] = weight[trained.dictionary.pad() + 1 :]
    add(
        "",
        decoder,
        "embed_tokens",
        "project_in_dim",
        "project_out_dim",
        "layernorm_embedding",
        "layer_norm",
    )
    if not decoder.share_input_output_embed:
        add("", decoder, "output_projection")
    config = _outside_of_layers(trained)
    of_moe_layers: dict[str, Any] = {}
    for index, layer in enumerate(decoder.layers):
        prefix = f"layers.{index}."
        add(f"{prefix}self_attn.", layer.self_attn, "q_proj", "k_proj", "v_proj", "out_proj")
        add(prefix, layer, "self_attn_layer_norm", "final_layer_norm")
        if not isinstance(layer, MoEDecoderLayer):
            add(prefix, layer, "fc1", "fc2")
            config["num_experts"].append(0)
            continue
        given, own = _moe(layer.moe, without_eval_capacity)
        config["num_experts"].append(given.pop("num_experts"))
        tensors |= {f"{prefix}moe.{name}": tensor for name, tensor in own.items()}
        for name, before in of_moe_layers.items():
            if before != given[name]:
                raise OptionError(
                    "moe_gate",
                    gate_name(layer.moe.gate),
                    f"layer {index} has {name} {given[name]}, an earlier one "
                    f"{before}: the exported model has one value for all layers",
                )
        of_moe_layers = given
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return config | of_moe_layers, tensors


def _outside_of_layers(trained: TrainedModel) -> dict[str, Any]:
    decoder, dictionary = trained.model.decoder, trained.dictionary
    args = decoder.args
    position = "learned" if args.decoder_learned_pos else "sinusoidal"
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
        "position_embedding": "none" if decoder.embed_positions is None else position,
        "scale_embedding": not args.no_scale_embedding,
        "layernorm_embedding": decoder.layernorm_embedding is not None,
        "post_norm": not args.decoder_normalize_before,
        "final_norm": decoder.layer_norm is not None,
        "num_experts": [],
        "tie_word_embeddings": bool(decoder.share_input_output_embed),
        "bos_token_id": trained.start,
        "eos_token_id": dictionary.eos(),
        "pad_token_id": dictionary.pad(),
    }


def _moe(layer: MoELayer, without_eval_capacity: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if layer.eval_capacity and not without_eval_capacity:
        raise OptionError(
            "moe_eval_capacity_factor",
            "(or token fraction)",
            "dropped pairs depend on the batch, and the exported model drops "
            "none: give --without-eval-capacity to export without it",
        )
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
