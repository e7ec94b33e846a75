"""GPT-2 models of Hugging Face as dense checkpoints of fairseq, with equal logits.

Source of the architecture: GPT-2 (Radford et al., 2019) as transformers' GPT2LMHeadModel has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import options as fairseq_options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from torch import Tensor

from evomoe_plugin.checkpoint.first import first_checkpoint
from evomoe_plugin.checkpoint.safetensors import read_safetensors
from evomoe_plugin.options import OptionError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
END_OF_TEXT = "<|endoftext|>"
# transformers' name -> fairseq's. The three of the middle are one formula, with the tanh.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate", "relu": "relu", "tanh": "tanh", "linear": "linear",
}
LAYER_NORM_EPSILON = 1e-5  # fairseq has no other
# Buffers that old files hold: causal masks, which are computed.
_BUFFERS = (".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class Imported:
    """A model of Hugging Face in fairseq's form, not written yet."""

    state: dict[str, Any]
    """fairseq's checkpoint."""
    dictionary: Dictionary


def import_gpt2(folder: str, dictionary: Dictionary | None = None) -> Imported:
    """Read a GPT-2 from `folder`.

    The symbol of token id n is n in decimal, as fairseq's `--bpe gpt2` has it. fairseq's own
    symbols and rows that only fill the dictionary up get the embedding of the end of text, so that
    no logit of theirs stands out.

    Args:
        folder: with config.json and model.safetensors, or its parts and their index.
        dictionary: rows in another order than that of the ids; None: that order.
    Raises:
        OptionError: files are missing or unfit, or the model is built otherwise than fairseq's.
    """
    config = _config(folder)
    weights = _Weights(folder, _weights(folder))
    table = weights.take("wte.weight")
    if dictionary is None:
        dictionary = _dictionary_of_ids(table.size(0))
    rows_V = _rows(dictionary, config, table.size(0))
    model = _model(config, weights, rows_V, table)
    weights.check_all_taken()
    sizes = {"vocabulary": table.size(0), "width": table.size(1)}
    cfg = _run_config(config, sizes, tied="decoder.output_projection.weight" not in model or (
        model["decoder.output_projection.weight"] is model["decoder.embed_tokens.weight"]))
    return Imported(first_checkpoint(cfg, model, criterion="CrossEntropyCriterion"), dictionary)


def _config(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        raise OptionError("DIR", folder, f"has no {CONFIG}: give the folder of a model of Hugging "
                                         "Face")
    try:
        config = json.loads(Path(path).read_text())
        kind = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise OptionError("DIR", folder, f"its {CONFIG} is not JSON ({error})") from error
    if kind != "gpt2":
        raise OptionError("DIR", folder, f"holds a model of type {kind}: gpt2 can be imported")
    defaults = {
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True, "resid_pdrop": 0.1,
        "attn_pdrop": 0.1, "eos_token_id": None, "n_layer": 12, "n_head": 12, "n_embd": 768,
        "n_positions": 1024,
    }
    config = {**defaults, **config}
    wanted = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "add_cross_attention": False}
    for name, value in wanted.items():
        if config[name] != value:
            raise OptionError("DIR", folder, f"its {CONFIG} has {name} {config[name]}, which "
                                             "fairseq's transformer_lm cannot compute")
    if config["layer_norm_epsilon"] != LAYER_NORM_EPSILON:
        raise OptionError("DIR", folder, f"its {CONFIG} has layer_norm_epsilon "
                                         f"{config['layer_norm_epsilon']}; fairseq's is "
                                         f"{LAYER_NORM_EPSILON}, and logits would differ")
    if config["activation_function"] not in ACTIVATIONS:
        raise OptionError("DIR", folder, f"its {CONFIG} has activation_function "
                                         f"{config['activation_function']}; one of: "
                                         f"{', '.join(ACTIVATIONS)}")
    return config


def _weights(folder: str) -> dict[str, Tensor]:
    index = os.path.join(folder, INDEX)
    if os.path.isfile(index):
        try:
            parts = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise OptionError("DIR", folder, f"its {INDEX} cannot be read ({error})") from error
        if any(os.path.basename(part) != part for part in parts):
            raise OptionError("DIR", folder, f"its {INDEX} names files of other folders")
    else:
        parts = [WEIGHTS]
        if not os.path.isfile(os.path.join(folder, WEIGHTS)):
            raise OptionError("DIR", folder, f"has no {WEIGHTS}; pickled weights, which could run "
                                             "a program, are not read: save the model again with "
                                             "safe_serialization=True")
    weights: dict[str, Tensor] = {}
    for part in parts:
        weights.update(read_safetensors("DIR", os.path.join(folder, part)))
    return weights


class _Weights:
    """The tensors of a file, each asked for once."""

    def __init__(self, folder: str, weights: Mapping[str, Tensor]):
        self._folder = folder
        self._left = {name.removeprefix("transformer."): value for name, value in weights.items()
                      if not name.endswith(_BUFFERS)}

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor, fp32."""
        value = self._left.pop(name, None)
        if value is None:
            raise OptionError("DIR", self._folder, f"its weights have no {name}")
        if shape is not None and value.shape != shape:
            raise OptionError("DIR", self._folder, f"{name} has the shape {tuple(value.shape)}, "
                                                   f"where {CONFIG} says {shape}")
        return value.float()

    def has(self, name: str) -> bool:
        return name in self._left

    def check_all_taken(self) -> None:
        if self._left:
            raise OptionError("DIR", self._folder,
                              f"its weights have {sorted(self._left)[0]}, for which fairseq's "
                              "transformer_lm has no place")


def _dictionary_of_ids(size: int) -> Dictionary:
    dictionary = Dictionary()
    for n in range(size):
        dictionary.add_symbol(str(n))
    return dictionary


def _rows(dictionary: Dictionary, config: Mapping[str, Any], size: int) -> Tensor:
    """The token id whose embedding each row of the dictionary gets, int64 [V]."""
    end = config["eos_token_id"]
    end = end if isinstance(end, int) and 0 <= end < size else size - 1
    rows = []
    for row, symbol in enumerate(dictionary.symbols):
        is_own = row < dictionary.nspecial or symbol.startswith("madeupword")
        if not is_own and not (symbol.isascii() and symbol.isdigit() and int(symbol) < size):
            raise OptionError("dict", symbol, f"is no token id of the model (0 to {size - 1}): "
                                              "give a dictionary made with --gpt2-bpe")
        rows.append(end if is_own else int(symbol))
    return torch.tensor(rows)


def _model(config: Mapping[str, Any], weights: _Weights, rows_V: Tensor,
           table: Tensor) -> dict[str, Tensor]:
    D = table.size(1)
    F = config["n_inner"] or 4 * config["n_embd"]
    positions = weights.take("wpe.weight", (config["n_positions"], config["n_embd"]))
    embedding = table[rows_V]
    # fairseq counts positions from its padding index + 1 = 2 on.
    model = {
        "decoder.version": torch.tensor([3.0]),
        "decoder.embed_tokens.weight": embedding,
        "decoder.embed_positions.weight": torch.cat([torch.zeros(2, D), positions]),
    }

    def put(name: str, source: str, *shape: int, transpose: bool = False) -> None:
        value = weights.take(source, shape)
        model[f"decoder.{name}"] = value.t().contiguous() if transpose else value

    for n in range(config["n_layer"]):
        ours, theirs = f"layers.{n}", f"h.{n}"
        for norm, ln in (("self_attn_layer_norm", "ln_1"), ("final_layer_norm", "ln_2")):
            for kind in ("weight", "bias"):
                put(f"{ours}.{norm}.{kind}", f"{theirs}.{ln}.{kind}", D)
        # Conv1D multiplies from the left: its weights are nn.Linear's transposed.
        weight = weights.take(f"{theirs}.attn.c_attn.weight", (D, 3 * D)).t()
        bias = weights.take(f"{theirs}.attn.c_attn.bias", (3 * D,))
        for part, w, b in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            model[f"decoder.{ours}.self_attn.{part}_proj.weight"] = w.contiguous()
            model[f"decoder.{ours}.self_attn.{part}_proj.bias"] = b.clone()
        for name, source, into, out in (("self_attn.out_proj", "attn.c_proj", D, D),
                                        ("fc1", "mlp.c_fc", D, F), ("fc2", "mlp.c_proj", F, D)):
            put(f"{ours}.{name}.weight", f"{theirs}.{source}.weight", into, out, transpose=True)
            put(f"{ours}.{name}.bias", f"{theirs}.{source}.bias", out)
    for kind in ("weight", "bias"):
        put(f"layer_norm.{kind}", f"ln_f.{kind}", D)
    model["decoder.output_projection.weight"] = embedding
    if weights.has("lm_head.weight"):
        head = weights.take("lm_head.weight", tuple(table.shape))
        if not config["tie_word_embeddings"]:
            model["decoder.output_projection.weight"] = head[rows_V]
    return model


def _run_config(config: Mapping[str, Any], sizes: Mapping[str, int], tied: bool) -> dict[str, Any]:
    """fairseq's configuration of a run that would have trained the model."""
    width, length = sizes["width"], config["n_positions"]
    arguments = {
        "--decoder-layers": config["n_layer"], "--decoder-embed-dim": width,
        "--decoder-ffn-embed-dim": config["n_inner"] or 4 * width,
        "--decoder-attention-heads": config["n_head"], "--decoder-input-dim": width,
        "--decoder-output-dim": width,
        "--activation-fn": ACTIVATIONS[config["activation_function"]],
        "--dropout": config["resid_pdrop"], "--attention-dropout": config["attn_pdrop"],
        "--tokens-per-sample": length, "--max-target-positions": length, "--optimizer": "adam",
        "--max-tokens": length, "--task": "language_modeling", "--arch": "transformer_lm",
    }
    flags = ["--decoder-normalize-before", "--decoder-learned-pos", "--no-scale-embedding"]
    if tied:
        flags.append("--share-decoder-input-output-embed")
    parser = fairseq_options.get_training_parser(default_task="language_modeling")
    args = fairseq_options.parse_args_and_arch(
        parser, ["data-bin", *flags, *(str(x) for pair in arguments.items() for x in pair)])
    cfg = convert_namespace_to_omegaconf(args)
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
