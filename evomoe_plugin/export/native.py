"""Trained models as classes of transformers that compute the same, without code of ours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evomoe_plugin.checkpoint.hf_weights import sources
from evomoe_plugin.config.hf_config import ACTIVATIONS, KINDS, HFConfig, parse_hf_config, short
from evomoe_plugin.config.moe_layers import NO_LAYERS
from evomoe_plugin.config.options import (
    CausalLMModelOptions,
    CausalLMOptions,
    head_dim,
    is_causal_lm,
    kv_heads,
)
from evomoe_plugin.export.gpt2 import gpt2_config, gpt2_tensors
from evomoe_plugin.export.misfit import Misfit
from evomoe_plugin.export.routing import export_gate, gate_name
from evomoe_plugin.gates import gate_class
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.layer import MoELayer

GPT2 = "gpt2"
NATIVE = (*KINDS, GPT2)
"""transformers' `model_type`s; of those that fit a model, the first is taken by default."""

# fairseq's names -> transformers'. fairseq's gelu_fast is the tanh approximation too.
_HIDDEN_ACT = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
}
# Kinds whose classes read a head_dim that their configurations do not declare.
_ANY_HEAD_DIM = ("qwen2", "qwen2_moe", "qwen3_moe", "olmoe")
_HEAD = "decoder.output_projection.weight"


@dataclass(frozen=True)
class Native:
    """A model as a class of transformers."""

    kind: str
    """Its `model_type`."""
    config: dict[str, Any]
    """Of config.json: sizes and options."""
    tensors: list[tuple[str, Tensor]]
    """By the names in its files; may be views of larger ones."""


def native_model(trained: TrainedModel, kind: str) -> Native:
    """The model as `kind`, one of `NATIVE`.

    Raises:
        Misfit: an option that the class does not have.
    """
    if kind == GPT2:
        return Native(kind, gpt2_config(trained), list(gpt2_tensors(trained)))
    model = _described(trained)
    content = _content(kind, model.options)
    config = _parsed(kind, content)
    if misfits := _misfits(model.options, config):
        raise misfits[0]
    return Native(kind, content, list(_tensors(config, model.weights)))


def closest(trained: TrainedModel) -> Native | tuple[str, Misfit]:
    """The first of `NATIVE` that fits; or the one with the fewest options that do not, and the
    first of them.
    """
    if not is_causal_lm(trained.model.decoder.args):
        try:
            return native_model(trained, GPT2)
        except Misfit as misfit:
            return GPT2, misfit
    try:
        model = _described(trained)
    except Misfit as misfit:
        return "transformers", misfit
    found: dict[str, list[Misfit]] = {}
    for kind in KINDS:
        content = _content(kind, model.options)
        found[kind] = _misfits(model.options, config := _parsed(kind, content))
        if not found[kind]:
            return Native(kind, content, list(_tensors(config, model.weights)))
    nearest = min(found, key=lambda kind: len(found[kind]))
    return nearest, found[nearest][0]


@dataclass(frozen=True)
class _Described:
    """A decoder in evaluation, with at most a linear top-k gate."""

    options: dict[str, Any]
    """As `HFConfig.options`, `vocabulary` among them."""
    weights: dict[str, Tensor]
    """By the names of `causal_lm` decoders."""


def _described(trained: TrainedModel) -> _Described:
    decoder = trained.model.decoder
    args: CausalLMModelOptions = decoder.args
    if not is_causal_lm(args):
        raise Misfit("arch", getattr(args, "_name", None))
    names = [f.name for f in dataclasses.fields(CausalLMOptions) if f.name != "hf_config"]
    names += ["decoder_layers", "decoder_embed_dim", "decoder_attention_heads"]
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {
        "decoder_kv_heads": kv_heads(args),
        "decoder_head_dim": head_dim(args),
        "activation_fn": "gelu_accurate"
        if args.activation_fn == "gelu_fast"
        else args.activation_fn,
        "share_decoder_input_output_embed": bool(args.share_decoder_input_output_embed),
        "max_target_positions": decoder.max_positions(),
        "vocabulary": len(trained.dictionary),
    }
    weights = dict(trained.model.state_dict())
    dense: list[int] = []
    moe: list[int] = []
    for n, layer in enumerate(decoder.layers):
        (dense if layer.moe is None or layer.moe.in_dense_phase else moe).append(n)
    if dense:
        options["decoder_ffn_embed_dim"] = _dense_ffns(trained, dense, weights)
    if not moe:
        return _Described({**options, "moe_layers": NO_LAYERS}, weights)
    found: dict[str, Any] = {}
    for n in moe:
        layer, name = decoder.layers[n].moe, f"decoder.layers.{n}.moe"
        given, weights[f"{name}.gate.scorer.weight"] = _gate(args, layer)
        for option, value in given.items():
            if found.setdefault(option, value) != value:
                # Named as the user gave it: of all layers.
                raise Misfit(option, getattr(args, option, value))
    coefficients = gate_class(args.moe_gate).aux_coefficients(args)
    if "balance" in coefficients:  # of training, so a class may do without
        found["moe_aux"] = f"balance={float(coefficients['balance'])}"
    return _Described({**options, "moe_layers": ",".join(map(str, moe)), **found}, weights)


def _dense_ffns(trained: TrainedModel, layers: list[int], weights: dict[str, Tensor]) -> int:
    """Hidden width of the FFNs of `layers`; before the spawn, those of their first experts, whose
    weights are added by the names of FFNs."""
    decoder = trained.model.decoder
    args, widths = decoder.args, set()
    for n in layers:
        moe: MoELayer | None = decoder.layers[n].moe
        if moe is None:
            widths.add(args.decoder_ffn_embed_dim)
            continue
        if moe.shared is not None:
            raise Misfit("moe_shared_experts", args.moe_shared_experts)
        experts = moe.experts
        if experts.gated == bool(args.decoder_ffn_bias):  # only plain experts have biases
            raise Misfit("decoder_ffn_bias", args.decoder_ffn_bias)
        widths.add(experts.fc1_weight.size(1))
        for part, value in experts.named_parameters():
            name = f"decoder.layers.{n}.{part.replace('_', '.')}"
            weights[name] = value[0].t() if part == "fc2_weight" else value[0]
    if len(widths) > 1:
        raise Misfit("moe_expert_ffn_dim", args.moe_expert_ffn_dim)
    return widths.pop()


def _gate(args: Any, layer: MoELayer) -> tuple[dict[str, Any], Tensor]:
    """Options of a layer with a linear top-k gate; the gate's weight, divided by its temperature.

    Raises:
        Misfit: it routes in another way in evaluation.
    """
    gate = layer.gate
    routing, tensors = export_gate(layer)
    name = gate_name(gate)
    if name == "dense_to_sparse" and routing["select"] == "threshold":
        name = f"{name} (not hard at this update)"
    biased = tensors.get("selection_bias")
    checks = (
        ("moe_null_experts", gate.info.num_null, not gate.info.num_null),
        ("moe_gate", name, routing["select"] == "top_k"),
        ("moe_scorer", None, routing["scorer"] == "linear"),
        ("moe_scorer", None, routing.get("scores") == "softmax"),
        ("moe_temperature_scope", None, not routing.get("standardized")),
        ("moe_lexical", None, not routing.get("lexical")),
        ("moe_gate_centre", None, not routing.get("centred")),
        ("moe_weight_scale", None, gate.weight_scale is None),
        ("moe_bias_update_rate", None, biased is None or not biased.any()),
    )
    for option, value, fits in checks:
        if not fits:
            given = getattr(args, option, None) if value is None else value
            raise Misfit(*(("moe_gate", name) if given is None else (option, given)))
    if not layer.experts.gated:
        raise Misfit("decoder_ffn", args.decoder_ffn)
    options: dict[str, Any] = {
        "moe_expert_count": str(layer.num_experts),
        "moe_expert_ffn_dim": layer.experts.fc1_weight.size(1),
        "moe_top_k": routing["top_k"],
        "moe_top_k_weights": "renormalized" if routing["normalized"] else "raw",
        "moe_shared_experts": 0,
    }
    if layer.shared is not None:
        options |= {
            "moe_shared_experts": layer.shared.experts.num_experts,
            "moe_shared_ffn_dim": layer.shared.experts.fc1_weight.size(1),
            "moe_shared_combine": gate.shared_weights.kind if gate.shared_weights else "add",
        }
    # Dividing the logits keeps their order, so one temperature serves for selection and weights.
    temperature = routing.get("weight_temperature", 1.0)
    weight = tensors["weight"]
    return options, weight if temperature == 1 else weight / temperature


def _content(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of `kind`; it may describe another model where the class lacks an option."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    layers, moe_layers = options["decoder_layers"], options["moe_layers"]
    rope = {"rope_type": "default", **json.loads(options["rope_scaling"] or "{}")}
    rope["rope_theta"] = options["rope_theta"]
    if kind in ("phi", "stablelm"):
        rope["partial_rotary_factor"] = options["rope_fraction"]
    given: dict[str, Any] = {
        "vocab_size": options["vocabulary"],
        "hidden_size": options["decoder_embed_dim"],
        "intermediate_size": options.get(
            "decoder_ffn_embed_dim", options.get("moe_expert_ffn_dim")
        ),
        "num_hidden_layers": layers,
        "num_attention_heads": options["decoder_attention_heads"],
        "num_key_value_heads": options["decoder_kv_heads"],
        "head_dim": options["decoder_head_dim"],
        "hidden_act": _HIDDEN_ACT.get(options["activation_fn"], options["activation_fn"]),
        "max_position_embeddings": options["max_target_positions"],
        "rms_norm_eps": options["decoder_norm_eps"],
        "layer_norm_eps": options["decoder_norm_eps"],
        "tie_word_embeddings": options["share_decoder_input_output_embed"],
        "rope_parameters": rope,
        "attention_bias": options["decoder_qkv_bias"],
        "qkv_bias": options["decoder_qkv_bias"],
        "use_qkv_bias": options["decoder_qkv_bias"],
        "mlp_bias": options["decoder_ffn_bias"],
        "use_parallel_residual": options["decoder_parallel"],
        "qk_layernorm": options["decoder_qk_norm"] != "none",
        "sliding_window": None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "use_cache": True,
    }
    if moe_layers != NO_LAYERS:
        step, dense = _sparse_step([int(n) for n in moe_layers.split(",")], layers)
        given |= {
            "num_local_experts" if kind == "mixtral" else "num_experts": int(
                options["moe_expert_count"]
            ),
            "num_experts_per_tok": options["moe_top_k"],
            "norm_topk_prob": options["moe_top_k_weights"] == "renormalized",
            "moe_intermediate_size": options["moe_expert_ffn_dim"],
            "shared_expert_intermediate_size": options.get("moe_shared_ffn_dim", 1),
            "router_aux_loss_coef": float(options.get("moe_aux", "=0.0").partition("=")[2]),
            "decoder_sparse_step": step,
            "mlp_only_layers": dense,
        }
    default = CONFIG_MAPPING[kind]()
    return {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        "model_type": kind,
        # Of the run, and written with the folder.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **{
            name: value
            for name, value in given.items()
            if hasattr(default, name) or (name == "head_dim" and kind in _ANY_HEAD_DIM)
        },
    }


def _sparse_step(moe_layers: list[int], layers: int) -> tuple[int, list[int]]:
    """transformers' `decoder_sparse_step` and `mlp_only_layers` of these MoE layers."""
    for step in range(1, layers + 1):
        if list(range(step - 1, layers, step)) == moe_layers:
            return step, []
    return 1, [n for n in range(layers) if n not in moe_layers]


def _parsed(kind: str, content: dict[str, Any]) -> HFConfig:
    """What a config.json describes.

    Raises:
        Misfit: transformers refuses it.
    """
    try:
        return parse_hf_config(content)
    except Exception as error:  # transformers raises anything for invalid values
        raise Misfit("arch", kind, " ".join(str(error).split())[:200]) from error


def _misfits(options: Mapping[str, Any], config: HFConfig) -> list[Misfit]:
    """The options of which `config` says something else, the gate's last."""
    defaults = {f.name: f.default for f in dataclasses.fields(CausalLMModelOptions)}
    theirs = {**defaults, **config.options, "vocabulary": config.vocabulary}
    theirs.setdefault("moe_shared_experts", 0)
    found = []
    for name, value in options.items():
        if name == "moe_layers" and NO_LAYERS in (value, theirs[name]) and value != theirs[name]:
            return [Misfit(name, value)] * len(options)  # experts or none: nothing else compares
        if name == "rope_scaling":
            given, known = (json.loads(text or "{}") for text in (value, theirs[name]))
            fits = all(known.get(key) == part for key, part in given.items())
        else:
            fits = value == theirs.get(name)
        if not fits:
            found.append(Misfit(name, value if isinstance(value, str) else short(value)))
    return found


def _tensors(config: HFConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """transformers' names and tensors: `checkpoint.hf_weights.sources`, the other way."""
    for ours, source in sources(config).items():
        if ours == _HEAD and config.options["share_decoder_input_output_embed"]:
            continue
        value = weights[ours]
        parts = value if source.stacked else [value]
        for name, part in zip(source.names, parts, strict=True):
            yield name, part.t() if source.transposed else part
