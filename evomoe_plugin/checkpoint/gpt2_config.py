"""Read and check the config.json of a Hugging Face GPT-2 for fairseq's transformer_lm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import CONFIG, read_json, short

# transformers' name -> fairseq's; gelu_accurate is the tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "relu": "relu",
    "tanh": "tanh",
    "linear": "linear",
}


def _field(default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
    """transformers' default, and what a value must be."""
    return field(default=default, metadata={"fits": fits, "wanted": wanted})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _size(default: int) -> Any:
    return _field(default, _is_whole, "a whole number from 1 on")


def _probability(default: float) -> Any:
    return _field(default, lambda p: _is_number(p) and 0 <= p <= 1, "a probability")


def _only(value: Any, why: str = "fairseq's transformer_lm computes nothing else") -> Any:
    return _field(
        value,
        lambda given: type(given) is type(value) and given == value,
        f"{json.dumps(value)}: {why}",
    )


@dataclass(frozen=True)
class GPT2Config:
    """Checked sizes and options, by transformers' names."""

    vocab_size: int = _size(50257)
    n_positions: int = _size(1024)
    n_embd: int = _size(768)
    n_layer: int = _size(12)
    n_head: int = _size(12)
    n_inner: int | None = _field(
        None, lambda n: n is None or _is_whole(n), "null or a whole number from 1 on"
    )
    activation_function: str = _field(
        "gelu_new",
        lambda name: isinstance(name, str) and name in ACTIVATIONS,
        f"one of: {', '.join(ACTIVATIONS)}",
    )
    layer_norm_epsilon: float = _only(1e-5, "fairseq has no other, and logits would differ")
    resid_pdrop: float = _probability(0.1)
    attn_pdrop: float = _probability(0.1)
    scale_attn_weights: bool = _only(True)
    scale_attn_by_inverse_layer_idx: bool = _only(False)
    add_cross_attention: bool = _only(False)
    tie_word_embeddings: bool = _field(True, lambda x: isinstance(x, bool), "true or false")
    eos_token_id: int = _field(
        50256,
        lambda n: _is_whole(n, least=0),
        "the id of the token that ends a text, which becomes </s>",
    )
    quantization_config: None = _only(None, "quantised weights are not read")

    @property
    def ffn_dim(self) -> int:
        """Feed-forward hidden units."""
        return self.n_inner or 4 * self.n_embd

    @property
    def activation(self) -> str:
        """fairseq's name."""
        return ACTIVATIONS[self.activation_function]


def misfit(folder: str, why: str) -> OptionError:
    """An error that says why the model in `folder` cannot be imported."""
    return OptionError("DIR", folder, why)


def read_config(folder: str) -> GPT2Config:
    """The configuration of the model in `folder`.

    Raises:
        OptionError: it is missing, no JSON, of another kind of model, or has an invalid value.
    """
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        raise misfit(folder, f"has no {CONFIG}: give the folder of a model of Hugging Face")
    content = read_json("DIR", folder, CONFIG)
    kind = content.get("model_type")
    if kind != "gpt2":
        raise misfit(folder, f"holds a model of type {short(kind)}: gpt2 can be imported")
    known = fields(GPT2Config)
    config = GPT2Config(**{f.name: content[f.name] for f in known if f.name in content})
    for f in known:
        value, wanted = getattr(config, f.name), f.metadata["wanted"]
        if not f.metadata["fits"](value):
            why = f"its {CONFIG} has {f.name} {short(value)}, which must be {wanted}"
            raise misfit(folder, why)
    heads, width, end = config.n_head, config.n_embd, config.eos_token_id
    if width % heads:
        raise misfit(
            folder, f"its {CONFIG} has n_head {heads}, which does not divide n_embd {width}"
        )
    if end >= config.vocab_size:
        last = config.vocab_size - 1
        raise misfit(folder, f"its {CONFIG} has eos_token_id {end}, and tokens up to {last}")
    return config
