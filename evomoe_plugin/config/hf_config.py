"""Options of a `causal_lm` decoder from the config.json of a Hugging Face model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import NO_LAYERS
from evomoe_plugin.config.options import CausalLMModelOptions

CONFIG = "config.json"
# transformers' name -> fairseq's; gelu_accurate is the tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "swish",
    "swish": "swish",
    "tanh": "tanh",
    "linear": "linear",
}


@dataclass(frozen=True)
class HFConfig:
    """A decoder that a config.json describes."""

    kind: str
    """Its `model_type`."""
    options: dict[str, Any]
    """By the names of `CausalLMModelOptions` and, of an MoE model, of the gate's options."""
    vocabulary: int
    """Rows of the embeddings."""

    @property
    def is_moe(self) -> bool:
        """Whether it has MoE layers."""
        return self.options["moe_layers"] != NO_LAYERS


def read_hf_config(option: str, path: str) -> HFConfig:
    """Read a config.json; nothing in its folder is executed.

    Args:
        option: what the user named it with, for messages.
        path: the file, or its folder.
    Raises:
        OptionError: it is missing, unreadable or of an unknown kind of model, a value is invalid
            or cannot be expressed, or there is no transformers.
    """
    content = _content(option, path)
    kind = content.get("model_type")
    if kind not in KINDS:
        # GPT-2 is imported, but is no `causal_lm` to train from scratch.
        known = sorted({*KINDS, "gpt2"} if option != "hf_config" else KINDS)
        raise OptionError(
            option, path, f"holds a model of type {short(kind)}; known: {', '.join(known)}"
        )
    if content.get("quantization_config") is not None:
        raise OptionError(option, path, "has quantised weights: give the model in 16 or 32 bits")
    try:
        return parse_hf_config(content)
    except ImportError as error:
        raise OptionError(
            option, path, f"is read by transformers: pip install 'evomoe_plugin[hf]' ({error})"
        ) from error
    except Unsupported as error:
        raise OptionError(option, path, f"its {CONFIG} has {error}") from None
    except Exception as error:  # transformers raises anything for invalid values
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise OptionError(option, path, f"its {CONFIG} has an invalid value ({why})") from error


def parse_hf_config(content: dict[str, Any]) -> HFConfig:
    """The decoder of a config.json's content, whose `model_type` is one of `KINDS`.

    Raises:
        ImportError: there is no transformers.
        Unsupported: no option expresses it. Anything: transformers refuses a value.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = content["model_type"]
    config = CONFIG_MAPPING[kind].from_dict(content)
    return HFConfig(kind, _decoder(config) | KINDS[kind](config), int(config.vocab_size))


def model_type(option: str, path: str) -> Any:
    """The `model_type` of a config.json.

    Raises:
        OptionError: it is missing or no JSON object.
    """
    return _content(option, path).get("model_type")


def _content(option: str, path: str) -> dict[str, Any]:
    folder, name = (path, CONFIG) if os.path.isdir(path) else os.path.split(path)
    if not os.path.isfile(os.path.join(folder, name)):
        raise OptionError(
            option, path, f"has no {CONFIG}: give the folder of a model of Hugging Face"
        )
    return read_json(option, folder, name)


def resolve_hf_config(options: Any) -> None:
    """Set what the config.json of `--hf-config` says, in place, and clear the option: checkpoints
    do not depend on the file. Without it, the folder of `--moe-init-from-dense`, if it is one.

    Raises:
        OptionError: as `read_hf_config`, or a given option contradicts the file.
    """
    if not hasattr(options, "hf_config"):
        return
    option, path = "hf_config", options.hf_config
    if path is None:
        option, path = "moe_init_from_dense", options.moe_init_from_dense
        if path is None or not os.path.isdir(path):
            return
    config = read_hf_config(option, path)
    if config.is_moe:
        raise OptionError(
            option,
            path,
            f"is a {config.kind}, which has experts already: `evomoe import-hf` makes a "
            "checkpoint of it",
        )
    defaults = {f.name: f.default for f in dataclasses.fields(CausalLMModelOptions)}
    with open_dict(options):
        for name, value in config.options.items():
            if name == "moe_layers":
                continue
            given = getattr(options, name)
            if given not in (value, defaults[name]):
                raise OptionError(name, given, f"{path} says {value}: leave it out, or give that")
            setattr(options, name, value)
        options.hf_config = None


def read_json(option: str, folder: str, name: str) -> dict[str, Any]:
    """The JSON object in a file of `folder`.

    Raises:
        OptionError: it is no JSON object.
    """
    try:
        content = json.loads(Path(folder, name).read_text(encoding="utf-8"))
    except RecursionError:
        raise OptionError(option, folder, f"its {name} is nested too deeply") from None
    except (ValueError, OSError) as error:
        raise OptionError(option, folder, f"its {name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise OptionError(option, folder, f"its {name} is JSON, but no object")
    return content


def short(value: Any) -> str:
    """JSON of at most about 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class Unsupported(Exception):
    """What a config has that no option expresses."""


def _require(config: Any, name: str, value: Any, remedy: str) -> None:
    given = getattr(config, name, value)
    if given != value:
        raise Unsupported(f"{name} {short(given)}, which is not supported: {remedy}")


def _decoder(config: Any) -> dict[str, Any]:
    """What all kinds have."""
    activation = ACTIVATIONS.get(config.hidden_act)
    if activation is None:
        raise Unsupported(f"hidden_act {short(config.hidden_act)}; known: {', '.join(ACTIVATIONS)}")
    heads, width = config.num_attention_heads, config.hidden_size
    kv_heads = config.num_key_value_heads or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    for name, number in (
        ("num_hidden_layers", config.num_hidden_layers),
        ("hidden_size", width),
        ("intermediate_size", config.intermediate_size),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("vocab_size", config.vocab_size),
    ):
        if number < 1:
            raise Unsupported(f"{name} {number}, which must be at least 1")
    if heads % kv_heads:
        raise Unsupported(
            f"num_key_value_heads {kv_heads}, which does not divide num_attention_heads {heads}"
        )
    positions = config.max_position_embeddings
    if window := getattr(config, "sliding_window", None):
        # Up to this length a sliding window is the whole text.
        positions = min(positions, window)
    rope = dict(config.rope_parameters)
    theta, fraction = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    rope.pop("type", None)
    scaling = None if rope["rope_type"] == "default" else json.dumps(rope, sort_keys=True)
    if scaling is not None and rope["rope_type"] not in ("linear", "llama3", "yarn"):
        raise Unsupported(
            f"rope_type {short(rope['rope_type'])}; known: default, linear, llama3, yarn"
        )
    return {
        "decoder_layers": config.num_hidden_layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": config.intermediate_size,
        "decoder_attention_heads": heads,
        "decoder_kv_heads": kv_heads,
        "decoder_head_dim": head_dim,
        "activation_fn": activation,
        "share_decoder_input_output_embed": bool(config.tie_word_embeddings),
        "max_target_positions": positions,
        "rope_theta": float(theta),
        "rope_fraction": float(fraction),
        "rope_scaling": scaling,
        "moe_layers": NO_LAYERS,
    }


def _rms(config: Any, **given: Any) -> dict[str, Any]:
    return {"decoder_norm": "rms", "decoder_norm_eps": config.rms_norm_eps, **given}


def _layer(config: Any, **given: Any) -> dict[str, Any]:
    return {"decoder_norm": "layer", "decoder_norm_eps": config.layer_norm_eps, **given}


def _biases(bias: bool, out: bool | None = None) -> dict[str, bool]:
    """Of attention."""
    return {"decoder_qkv_bias": bool(bias), "decoder_out_bias": bool(bias if out is None else out)}


def _llama(config: Any) -> dict[str, Any]:
    return _rms(config, **_biases(config.attention_bias), decoder_ffn_bias=bool(config.mlp_bias))


def _mistral(config: Any) -> dict[str, Any]:
    return _rms(config)


def _qwen2(config: Any) -> dict[str, Any]:
    return _rms(config, **_biases(True, out=False))


def _qwen3(config: Any) -> dict[str, Any]:
    return _rms(config, **_biases(config.attention_bias), decoder_qk_norm="shared")


def _phi(config: Any) -> dict[str, Any]:
    return _layer(
        config,
        **_biases(True),
        decoder_ffn="plain",
        decoder_ffn_bias=True,
        decoder_parallel=True,
        decoder_logits_bias=True,
        decoder_qk_norm="shared" if config.qk_layernorm else "none",
    )


def _stablelm(config: Any) -> dict[str, Any]:
    return _layer(
        config,
        **_biases(config.use_qkv_bias, out=False),
        decoder_parallel=bool(config.use_parallel_residual),
        decoder_qk_norm="separate" if config.qk_layernorm else "none",
    )


def _experts(config: Any, ffn_dim: int, count: int, renormalized: bool) -> dict[str, Any]:
    """The MoE layers, where transformers has them."""
    dense = getattr(config, "mlp_only_layers", None) or []
    step = getattr(config, "decoder_sparse_step", 1)
    if step < 1 or count < 1:
        raise Unsupported(f"decoder_sparse_step {step} and {count} experts: it has no MoE layer")
    layers = [n for n in range(config.num_hidden_layers) if n not in dense and (n + 1) % step == 0]
    if not layers:
        raise Unsupported(
            f"mlp_only_layers {short(dense)} and decoder_sparse_step {step}: it has no MoE layer"
        )
    return {
        "moe_layers": ",".join(map(str, layers)),
        "moe_expert_count": str(count),
        "moe_expert_ffn_dim": ffn_dim,
        "moe_expert_gated": True,
        "moe_gate": "top_k",
        "moe_top_k": config.num_experts_per_tok,
        "moe_top_k_weights": "renormalized" if renormalized else "raw",
        "moe_aux": f"balance={config.router_aux_loss_coef}",
    }


def _mixtral(config: Any) -> dict[str, Any]:
    _require(config, "router_jitter_noise", 0.0, "set it to 0")
    return _rms(
        config, **_experts(config, config.intermediate_size, config.num_local_experts, True)
    )


def _olmoe(config: Any) -> dict[str, Any]:
    _require(config, "clip_qkv", None, "queries, keys and values cannot be clipped")
    return _rms(
        config,
        **_biases(config.attention_bias),
        decoder_qk_norm="joint",
        **_experts(config, config.intermediate_size, config.num_experts, config.norm_topk_prob),
    )


def _qwen2_moe(config: Any) -> dict[str, Any]:
    return _rms(
        config,
        **_biases(config.qkv_bias, out=False),
        **_experts(config, config.moe_intermediate_size, config.num_experts, config.norm_topk_prob),
        moe_shared_experts=1,
        moe_shared_ffn_dim=config.shared_expert_intermediate_size,
        moe_shared_combine="sigmoid",
    )


def _qwen3_moe(config: Any) -> dict[str, Any]:
    return _rms(
        config,
        **_biases(config.attention_bias),
        decoder_qk_norm="shared",
        **_experts(config, config.moe_intermediate_size, config.num_experts, config.norm_topk_prob),
    )


KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi": _phi,
    "stablelm": _stablelm,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}
