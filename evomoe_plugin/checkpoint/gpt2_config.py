"""Read and check the config.json of a Hugging Face GPT-2 for fairseq's transformer_lm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomoe_plugin.config.errors import OptionError

CONFIG = "config.json"
# transformers' name -> fairseq's; gelu_accurate is the tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate", "relu": "relu", "tanh": "tanh", "linear": "linear",
}
LAYER_NORM_EPSILON = 1e-5  # fairseq has no other


@dataclass(frozen=True)
class GPT2Config:
    """Checked sizes and options, by transformers' names."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None
    activation_function: str
    layer_norm_epsilon: float
    resid_pdrop: float
    attn_pdrop: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    add_cross_attention: bool
    tie_word_embeddings: bool
    eos_token_id: int
    quantization_config: None

    @property
    def ffn_dim(self) -> int:
        """Feed-forward hidden units."""
        return self.n_inner or 4 * self.n_embd

    @property
    def activation(self) -> str:
        """fairseq's name."""
        return ACTIVATIONS[self.activation_function]


@dataclass(frozen=True)
class _Field:
    """What a value must be, and transformers' default."""

    default: Any
    fits: Callable[[Any], bool]
    wanted: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _size(default: int) -> _Field:
    return _Field(default, _is_whole, "a whole number from 1 on")


def _probability(default: float) -> _Field:
    return _Field(default, lambda p: _is_number(p) and 0 <= p <= 1, "a probability")


def _only(value: Any, why: str) -> _Field:
    return _Field(value, lambda given: type(given) is type(value) and given == value,
                  f"{json.dumps(value)}: {why}")


_OTHERWISE = "fairseq's transformer_lm computes nothing else"
_FIELDS = {
    "vocab_size": _size(50257),
    "n_positions": _size(1024),
    "n_embd": _size(768),
    "n_layer": _size(12),
    "n_head": _size(12),
    "n_inner": _Field(None, lambda n: n is None or _is_whole(n),
                      "null or a whole number from 1 on"),
    "activation_function": _Field(
        "gelu_new", lambda name: isinstance(name, str) and name in ACTIVATIONS,
        f"one of: {', '.join(ACTIVATIONS)}"),
    "layer_norm_epsilon": _only(LAYER_NORM_EPSILON, "fairseq has no other, and logits would "
                                                    "differ"),
    "resid_pdrop": _probability(0.1),
    "attn_pdrop": _probability(0.1),
    "scale_attn_weights": _only(True, _OTHERWISE),
    "scale_attn_by_inverse_layer_idx": _only(False, _OTHERWISE),
    "add_cross_attention": _only(False, _OTHERWISE),
    "tie_word_embeddings": _Field(True, lambda tied: isinstance(tied, bool), "true or false"),
    "eos_token_id": _Field(50256, lambda n: _is_whole(n, least=0),
                           "the id of the token that ends a text, which becomes </s>"),
    "quantization_config": _only(None, "quantised weights are not read"),
}


def read_config(folder: str) -> GPT2Config:
    """The configuration of the model in `folder`.

    Raises:
        OptionError: it is missing, no JSON, of another kind of model, or has an invalid value.
    """
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        raise OptionError("DIR", folder, f"has no {CONFIG}: give the folder of a model of Hugging "
                                         "Face")
    content = read_json(folder, CONFIG)
    kind = content.get("model_type")
    if kind != "gpt2":
        raise OptionError("DIR", folder, f"holds a model of type {_short(kind)}: gpt2 can be "
                                         "imported")
    values = {name: content.get(name, field.default) for name, field in _FIELDS.items()}
    for name, field in _FIELDS.items():
        if not field.fits(values[name]):
            raise OptionError("DIR", folder, f"its {CONFIG} has {name} {_short(values[name])}, "
                                             f"which must be {field.wanted}")
    config = GPT2Config(**values)
    if config.n_embd % config.n_head:
        raise OptionError("DIR", folder, f"its {CONFIG} has n_head {config.n_head}, which does not "
                                         f"divide n_embd {config.n_embd}")
    if config.eos_token_id >= config.vocab_size:
        raise OptionError("DIR", folder, f"its {CONFIG} has eos_token_id {config.eos_token_id}, "
                                         f"and tokens up to {config.vocab_size - 1}")
    return config


def read_json(folder: str, name: str) -> dict[str, Any]:
    """The JSON object in a file of `folder`.

    Raises:
        OptionError: it is no JSON object.
    """
    try:
        content = json.loads(Path(folder, name).read_text(encoding="utf-8"))
    except RecursionError:
        raise OptionError("DIR", folder, f"its {name} is nested too deeply") from None
    except ValueError as error:
        raise OptionError("DIR", folder, f"its {name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise OptionError("DIR", folder, f"its {name} is JSON, but no object")
    return content


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
