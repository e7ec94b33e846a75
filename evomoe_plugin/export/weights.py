"""Convert a trained model to the configuration and tensors of `modeling_evomoe`."""

from __future__ import annotations

from typing import Any

from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import UNSUPPORTED
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
        raise OptionError("arch", type(model).__name__,
                          "cannot be exported: give a checkpoint of a transformer_lm")
    args = model.decoder.args  # as built, with defaults filled in
    for option in UNSUPPORTED:
        if args.get(option):
            raise OptionError(option, args[option], "the exported model does not implement it")
    if args.activation_fn not in _ACTIVATIONS:
        raise OptionError("activation_fn", args.activation_fn,
                          f"the exported model implements {', '.join(_ACTIVATIONS)}")
    decoder = model.decoder
    config, tensors = _outside_of_layers(trained), {}
    if decoder.embed_positions is not None and args.decoder_learned_pos:
        # fairseq's positions start after the padding index.
        weight = decoder.embed_positions.weight
        tensors["embed_positions.weight"] = weight[trained.dictionary.pad() + 1:]
    for name in ("embed_tokens", "project_in_dim", "project_out_dim", "layernorm_embedding",
                 "layer_norm"):
        _add(tensors, name, getattr(decoder, name))
    if not decoder.share_input_output_embed:
        _add(tensors, "output_projection", decoder.output_projection)
    of_all_layers: dict[str, Any] = {}
    for index, layer in enumerate(decoder.layers):
        prefix = f"layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _add(tensors, f"{prefix}self_attn.{name}", getattr(layer.self_attn, name))
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            _add(tensors, prefix + name, getattr(layer, name))
        if isinstance(layer, MoEDecoderLayer):
            given = _moe(layer.moe, f"{prefix}moe.", tensors, without_eval_capacity)
            config["num_experts"].append(given.pop("num_experts"))
            _check_same(of_all_layers, given, gate_name(layer.moe.gate), index)
            of_all_layers = given
        else:
            _add(tensors, f"{prefix}fc1", layer.fc1)
            _add(tensors, f"{prefix}fc2", layer.fc2)
            config["num_experts"].append(0)
    config.update(of_all_layers)
    return config, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _check_same(before: dict[str, Any], given: dict[str, Any], gate: str, index: int) -> None:
    """Raise `OptionError` if MoE layers differ in a value that the configuration stores once."""
    for name in before:
        if before[name] != given[name]:
            raise OptionError("moe_gate", gate, f"layer {index} has {name} {given[name]}, an "
                                                f"earlier one {before[name]}: the exported model "
                                                "has one value for all layers")


def _add(tensors: dict[str, Tensor], name: str, module: nn.Module | None) -> None:
    if module is not None:
        tensors.update({f"{name}.{key}": value for key, value in module.state_dict().items()})


def _outside_of_layers(trained: TrainedModel) -> dict[str, Any]:
    decoder, dictionary = trained.model.decoder, trained.dictionary
    args = decoder.args
    position = "sinusoidal"
    if decoder.embed_positions is None:
        position = "none"
    elif args.decoder_learned_pos:
        position = "learned"
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
        "position_embedding": position,
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


def _moe(layer: MoELayer, prefix: str, tensors: dict[str, Tensor],
         without_eval_capacity: bool) -> dict[str, Any]:
    if layer.eval_capacity and not without_eval_capacity:
        raise OptionError("moe_eval_capacity_factor", "(or token fraction)",
                          "dropped pairs depend on the batch, and the exported model drops "
                          "none: give --without-eval-capacity to export without it")
    gate = export_gate(layer)
    used, E = slice(None), layer.num_experts
    if layer.in_dense_phase:
        used, E = slice(1), 1
    active_C = layer.gate.active()
    if active_C is not None and not layer.in_dense_phase:
        used, E = active_C[:E], int(active_C[:E].sum())
    for name, tensor in gate.tensors.items():
        tensors[f"{prefix}gate.{name}"] = tensor
    stacks = {"experts": (layer.experts, used)}
    if layer.shared is not None:
        stacks["shared"] = (layer.shared.experts, slice(None))
    for stack, (experts, kept) in stacks.items():
        for name, weight in experts.named_parameters():
            tensors[f"{prefix}{stack}.{name}"] = weight[kept]
    weighs = layer.gate.shared_weights is not None and not layer.in_dense_phase
    shared = layer.shared.experts if layer.shared is not None else None
    return {
        "num_experts": E,
        "expert_ffn_dim": layer.experts.fc1_weight.size(1),
        "expert_gated": layer.experts.gated,
        "num_null_experts": 0 if layer.in_dense_phase else layer.gate.info.num_null,
        "num_shared_experts": shared.num_experts if shared else 0,
        "shared_ffn_dim": shared.fc1_weight.size(1) if shared else 0,
        "shared_combine": layer.gate.shared_weights.kind if weighs else "add",
        "routing": dict(gate.routing),
    }
