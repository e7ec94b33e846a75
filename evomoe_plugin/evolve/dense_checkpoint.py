"""Read the dense language model's checkpoint that experts are made from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)
from omegaconf import DictConfig
from torch import Tensor

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.reading import plain_config, read_checkpoint
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import UNSUPPORTED
from evomoe_plugin.models.language_model import MoELanguageModel

# Options that decide what a dense transformer_lm computes; the MoE model has the same.
SIZES = ("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_attention_heads")
STRUCTURE = (
    *SIZES,
    "decoder_input_dim",
    "decoder_output_dim",
    "activation_fn",
    "share_decoder_input_output_embed",
    "decoder_learned_pos",
    "no_scale_embedding",
    "layernorm_embedding",
    "no_token_positional_embeddings",
    "no_decoder_final_norm",
    "max_target_positions",
)


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense transformer_lm as fairseq saved it."""

    option: str
    """What the user named the file with."""
    path: str
    cfg: DictConfig
    """The whole run's."""
    model: Mapping[str, Any]
    """The options of fairseq's transformer_lm, resolved."""
    weights: Mapping[str, Tensor]
    """By fairseq's names."""

    def misfit(self, why: str) -> OptionError:
        """An error that says what is wrong with it."""
        return OptionError(self.option, self.path, why)

    @property
    def vocabulary(self) -> int:
        """Rows of the dictionary it was trained with."""
        return self.weights["decoder.embed_tokens.weight"].size(0)

    @functools.cached_property
    def dictionary(self) -> Dictionary:
        """One of that many rows; the checkpoint has neither their names nor their counts."""
        dictionary = Dictionary()
        for n in range(self.vocabulary - len(dictionary)):
            dictionary.add_symbol(f"token{n}")
        return dictionary

    @property
    def post_norm(self) -> bool:
        """Whether layers normalise their output rather than their input."""
        return not self.model["decoder_normalize_before"]

    def ffn(self, layer: int) -> dict[str, Tensor]:
        """The feed-forward network of a layer by the names of `ExpertFFN`: fc1_weight [F, D],
        fc1_bias [F], fc2_weight [F, D] (transposed), fc2_bias [D]."""
        prefix = f"decoder.layers.{layer}"
        named = {
            f"{part}_{kind}": self.weights[f"{prefix}.{part}.{kind}"]
            for part in ("fc1", "fc2")
            for kind in ("weight", "bias")
        }
        return {**named, "fc2_weight": named["fc2_weight"].t()}


def read_dense_checkpoint(option: str, path: str) -> DenseCheckpoint:
    """Read a dense language model.

    Args:
        option: what the user named the file with, for messages.
    Raises:
        OptionError: unreadable, another kind of model, or one with parts that no MoE architecture
            has.
    """
    state, misfit = read_checkpoint(option, path), functools.partial(OptionError, option, path)
    cfg, weights = state["cfg"], state["model"]
    name = cfg.model.get("_name") or cfg.model.get("arch")
    kind = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if any(".moe." in key for key in weights) or (
        isinstance(kind, type) and issubclass(kind, MoELanguageModel)
    ):
        raise misfit(f"is an MoE model already ({name}): give the checkpoint of a dense one")
    if not (isinstance(kind, type) and issubclass(kind, TransformerLanguageModel)):
        raise misfit(f"is a model {name}, not one of fairseq's transformer_lm")
    with report_config_faults(option, path):
        model = _model_options(cfg, weights)
    for field in UNSUPPORTED:
        if model[field]:
            raise misfit(
                f"was trained with --{field.replace('_', '-')} {model[field]}, which no "
                "MoE architecture has"
            )
    dense = DenseCheckpoint(option, path, cfg, model, weights)
    with report_config_faults(option, path):
        _check_weights(dense)
    return dense


def _check_weights(dense: DenseCheckpoint) -> None:
    """Raise `OptionError` unless the weights of experts and vocabulary exist and are finite."""
    model, weights = dense.model, dense.weights
    D, F = model["decoder_embed_dim"], model["decoder_ffn_embed_dim"]
    shapes = {"fc1.weight": (F, D), "fc1.bias": (F,), "fc2.weight": (D, F), "fc2.bias": (D,)}
    wanted: dict[str, tuple[int, ...] | None] = {
        f"decoder.layers.{layer}.{name}": shape
        for layer in range(model["decoder_layers"])
        for name, shape in shapes.items()
    }
    wanted["decoder.embed_tokens.weight"] = None
    for name, value in weights.items():
        if value.layout != torch.strided or not value.is_floating_point():
            raise dense.misfit(
                f"{name} is not a plain tensor of floating point numbers "
                f"({value.layout}, {value.dtype})"
            )
        if not value.isfinite().all():
            raise dense.misfit(f"{name} holds NaN or infinity: take an earlier checkpoint")
    for name, shape in wanted.items():
        if name not in weights:
            raise dense.misfit(f"has no {name}, which its own options ask for")
        given = tuple(weights[name].shape)
        if len(given) != 2 if shape is None else given != shape:
            raise dense.misfit(
                f"{name} has the shape {given}, where its own options ask for "
                f"{shape or 'two dimensions'}"
            )


def _model_options(cfg: DictConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options; fairseq's defaults where an old checkpoint has none."""
    saved = plain_config(cfg.model)
    task = cfg.get("task") or {}
    options = {}
    for field in dataclasses.fields(TransformerLanguageModelConfig):
        default = field.default
        if isinstance(default, str) and default.startswith("${task."):
            default = task.get(field.name)
        value = saved.get(field.name, default)
        options[field.name] = getattr(value, "value", value)
    positions = weights.get("decoder.embed_positions.weight")
    if options["decoder_learned_pos"] and positions is not None:
        # fairseq adds two rows for the padding index and its offset.
        options["max_target_positions"] = positions.size(0) - 2
    elif options["max_target_positions"] is None:
        options["max_target_positions"] = options["tokens_per_sample"]
    return options
