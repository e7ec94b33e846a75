"""Read the dense language model that experts are made from: a checkpoint, or a folder of Hugging
Face."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evomoe_plugin.checkpoint import huggingface
from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.hf_weights import HFWeights
from evomoe_plugin.checkpoint.reading import plain_config, read_checkpoint
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import model_type
from evomoe_plugin.config.moe_layers import NO_LAYERS
from evomoe_plugin.config.options import UNSUPPORTED, CausalLMOptions, is_causal_lm
from evomoe_plugin.evolve.import_hf import placeholder_dictionary, run_config
from evomoe_plugin.models.causal_lm import CausalLM
from evomoe_plugin.models.encoder_config import RobertaMoEConfig, TransformerMoEConfig
from evomoe_plugin.models.language_model import MoELanguageModel

_OF_CAUSAL_LM = tuple(
    field.name for field in dataclasses.fields(CausalLMOptions) if field.name != "hf_config"
)
# Options that decide what a dense model computes; the MoE model has the same.
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
CAUSAL_LM_STRUCTURE = (
    *SIZES,
    "activation_fn",
    "share_decoder_input_output_embed",
    *_OF_CAUSAL_LM,
)
ENCODER_SIZES = tuple(size.replace("decoder", "encoder") for size in SIZES)
ROBERTA_STRUCTURE = (
    *ENCODER_SIZES,
    "activation_fn",
    "encoder_normalize_before",
    "layernorm_embedding",
    "max_positions",
    "no_token_positional_embeddings",
    "untie_weights_roberta",
)
TRANSLATION_STRUCTURE = (
    *ENCODER_SIZES,
    *STRUCTURE,
    "encoder_normalize_before",
    "decoder_normalize_before",
    "encoder_learned_pos",
    "max_source_positions",
    "share_all_embeddings",
)
# Of each family of models: the architecture that has what a dense one has, options that decide what
# a dense one computes, names of its stacks of layers.
DEFAULT_ARCHS = {
    "gpt": "transformer_lm_moe",
    "causal_lm": "causal_lm_moe",
    "roberta": "roberta_base_moe",
    "translation": "transformer_moe",
}
_STRUCTURES = {
    "gpt": STRUCTURE,
    "causal_lm": CAUSAL_LM_STRUCTURE,
    "roberta": ROBERTA_STRUCTURE,
    "translation": TRANSLATION_STRUCTURE,
}
_OF_TRANSFORMERS = ("no_cross_attention", "cross_self_attention", "merge_src_tgt_embed")
ENCODER_FAMILIES = ("roberta", "translation")
_PATHS = {"roberta": ("encoder.sentence_encoder",), "translation": ("encoder", "decoder")}


def family_of(options: Any) -> str:
    """The family of a model with these options, or with these fields."""
    if hasattr(options, "untie_weights_roberta"):
        return "roberta"
    if hasattr(options, "encoder_layers"):
        return "translation"
    return "causal_lm" if is_causal_lm(options) else "gpt"


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense model of one of the families."""

    option: str
    """What the user named it with."""
    path: str
    cfg: DictConfig
    """The whole run's."""
    model: Mapping[str, Any]
    """The options of fairseq's transformer_lm, and those of causal_lm if it is one; or those of our
    RoBERTa or translation model that are fairseq's; resolved."""
    weights: Mapping[str, Tensor]
    """By fairseq's names; of a folder, read when they are asked for."""
    vocabulary: int
    """Rows of the embeddings, of the source if there are two."""
    keeps_dtype: bool = False
    """Whether what is made of it keeps the dtype of its weights; else it is fp32."""

    def misfit(self, why: str) -> OptionError:
        """An error that says what is wrong with it."""
        return OptionError(self.option, self.path, why)

    @functools.cached_property
    def dictionary(self) -> Dictionary:
        """One of that many rows; the checkpoint has neither their names nor their counts."""
        return placeholder_dictionary(self.vocabulary)

    @functools.cached_property
    def target_dictionary(self) -> Dictionary:
        """As `dictionary`; of the decoder of a translation model."""
        table = self.weights.get("decoder.embed_tokens.weight")
        return self.dictionary if table is None else placeholder_dictionary(len(table))

    @property
    def family(self) -> str:
        """One of `DEFAULT_ARCHS`."""
        return family_of(SimpleNamespace(**self.model))

    @property
    def is_causal_lm(self) -> bool:
        """Whether its decoder is one of `models.causal_lm`."""
        return self.family == "causal_lm"

    @property
    def structure(self) -> tuple[str, ...]:
        """Options that decide what it computes."""
        return _STRUCTURES[self.family]

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of its stacks of layers."""
        return _PATHS.get(self.family, ("decoder",))

    def ffn_dim(self, path: str) -> int:
        """Hidden width of the dense FFNs of a stack."""
        return self.model[f"{path.partition('.')[0]}_ffn_embed_dim"]

    @property
    def is_gated(self) -> bool:
        """Whether its feed-forward networks are."""
        return self.is_causal_lm and self.model["decoder_ffn"] == "gated"

    @property
    def post_norm(self) -> bool:
        """Whether layers normalise their output rather than their input."""
        return self.family == "gpt" and not self.model["decoder_normalize_before"]

    @property
    def dtype(self) -> torch.dtype:
        """Of what is made of it."""
        return (
            self.weights["decoder.layer_norm.weight"].dtype if self.keeps_dtype else torch.float32
        )

    def weight(self, name: str) -> Tensor:
        """A weight in the dtype of what is made of it."""
        value = self.weights[name]
        return value if self.keeps_dtype else value.float()

    def ffn(self, layer: int, path: str = "decoder") -> dict[str, Tensor]:
        """The feed-forward network of a layer by the names of `ExpertFFN`: fc1_weight [F, D],
        fc1_bias [F], fc2_weight [F, D] (transposed), fc2_bias [D]; gated, fc3_weight [F, D] and no
        biases."""
        kinds = ("weight",) if self.is_gated else ("weight", "bias")
        parts = ("fc1", "fc2", "fc3") if self.is_gated else ("fc1", "fc2")
        names = [f"{part}_{kind}" for part in parts for kind in kinds]
        return {name: self.ffn_tensor(path, layer, name) for name in names}

    def ffn_tensor(self, path: str, layer: int, name: str) -> Tensor:
        """One tensor of `ffn`."""
        part, kind = name.split("_")
        full = f"{path}.layers.{layer}.{part}.{kind}"
        if kind == "bias" and full not in self.weights:  # experts have biases
            width = "embed_dim" if part == "fc2" else "ffn_embed_dim"
            return torch.zeros(self.model[f"{path.partition('.')[0]}_{width}"])
        value = self.weights[full]
        return value.t() if name == "fc2_weight" else value


def read_dense(option: str, path: str, dictionary: Dictionary | None = None) -> DenseCheckpoint:
    """Read a dense language model: a checkpoint of fairseq, or a folder of Hugging Face.

    Args:
        option: what the user named it with, for messages.
        dictionary: gives the order of a GPT-2's rows (`GPT2Weights`).
    Raises:
        OptionError: as `read_dense_checkpoint`, `HFWeights` and `GPT2Weights`.
    """
    if not os.path.isdir(path):
        return read_dense_checkpoint(option, path)
    if model_type(option, path) == "gpt2":
        config, gpt2, rows_of = huggingface.read_gpt2(path, dictionary)
        cfg = OmegaConf.create(huggingface.run_config(config))
        options = transformer_options(cfg, gpt2)
        return DenseCheckpoint(option, path, cfg, options, gpt2, len(rows_of), keeps_dtype=True)
    weights = HFWeights(option, path)
    if weights.config.is_moe:
        raise OptionError(
            option,
            path,
            f"is a {weights.config.kind}, which has experts already: `evomoe import-hf` makes a "
            "checkpoint of it",
        )
    cfg = OmegaConf.create(run_config(weights.config))
    model = transformer_options(cfg, weights)
    rows = weights.config.vocabulary
    return DenseCheckpoint(option, path, cfg, model, weights, rows, keeps_dtype=True)


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
    is_ours = isinstance(kind, type) and issubclass(kind, MoELanguageModel)
    if any(".moe." in key for key in weights) or (
        is_ours and cfg.model.get("moe_layers") != NO_LAYERS
    ):
        raise misfit(f"is an MoE model already ({name}): give the checkpoint of a dense one")
    if not (isinstance(kind, type) and issubclass(kind, tuple(_READERS))):
        raise misfit(
            f"is a model {name}, not one of fairseq's transformer_lm, roberta, transformer"
        )
    return _dense_of(option, path, cfg, weights)


def _dense_of(
    option: str, path: str, cfg: DictConfig, weights: Mapping[str, Tensor]
) -> DenseCheckpoint:
    with report_config_faults(option, path):
        kind = ARCH_MODEL_REGISTRY.get(cfg.model.get("_name") or cfg.model.get("arch"))
        read = (
            reader
            for base, reader in _READERS.items()
            if isinstance(kind, type) and issubclass(kind, base)
        )
        model = next(read, transformer_options)(cfg, weights)
    saved = {**plain_config(cfg.model), **model}
    for field in (*UNSUPPORTED, *_OF_TRANSFORMERS):
        if saved.get(field):
            raise OptionError(
                option,
                path,
                f"was trained with --{field.replace('_', '-')} {saved[field]}, which no "
                "MoE architecture has",
            )
    dense = DenseCheckpoint(option, path, cfg, model, weights, 0)
    table = weights.get(f"{dense.paths[0]}.embed_tokens.weight")
    rows = table.size(0) if table is not None and table.dim() else 0
    dense = dataclasses.replace(dense, vocabulary=rows)
    with report_config_faults(option, path):
        _check_weights(dense)
    return dense


def _check_weights(dense: DenseCheckpoint) -> None:
    """Raise `OptionError` unless the weights of experts and vocabulary exist and are finite."""
    model, weights = dense.model, dense.weights
    wanted: dict[str, tuple[int, ...] | None] = {}
    for path in dense.paths:
        kind = path.partition(".")[0]
        D, F = model[f"{kind}_embed_dim"], model[f"{kind}_ffn_embed_dim"]
        shapes: dict[str, tuple[int, ...]] = {"fc1.weight": (F, D), "fc2.weight": (D, F)}
        if dense.is_gated:
            shapes["fc3.weight"] = (F, D)
        if not dense.is_causal_lm or model["decoder_ffn_bias"]:
            shapes |= {"fc1.bias": (F,), "fc2.bias": (D,)}
        for layer in range(model[f"{kind}_layers"]):
            wanted |= {f"{path}.layers.{layer}.{name}": shape for name, shape in shapes.items()}
        wanted[f"{path}.embed_tokens.weight"] = None
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


def _own_options(cfg: DictConfig, ours: type) -> dict[str, Any]:
    """The options of one of our dataclasses that a model of fairseq has too."""
    saved = plain_config(cfg.model)
    return {
        field.name: saved.get(field.name, field.default)
        for field in dataclasses.fields(ours)
        if "moe_" not in field.name and field.name not in ("_name", "seed", "max_update")
    }


def roberta_options(cfg: DictConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of fairseq's RoBERTa."""
    options = _own_options(cfg, RobertaMoEConfig)
    options["layernorm_embedding"] = str(options["layernorm_embedding"]).lower()
    positions = weights.get("encoder.sentence_encoder.embed_positions.weight")
    if positions is not None:
        options["max_positions"] = positions.size(0) - 2  # padding index and its offset
    return options


def translation_options(cfg: DictConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of fairseq's Transformer."""
    options = _own_options(cfg, TransformerMoEConfig)
    options["share_decoder_input_output_embed"] |= options["share_all_embeddings"]
    for kind, side in (("encoder", "source"), ("decoder", "target")):
        positions = weights.get(f"{kind}.embed_positions.weight")
        if positions is not None:
            options[f"max_{side}_positions"] = positions.size(0) - 2
    return options


def transformer_options(cfg: DictConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of fairseq's transformer_lm, and those of causal_lm if it is one; fairseq's
    defaults where an old checkpoint has none."""
    saved = plain_config(cfg.model)
    task = cfg.get("task") or {}
    options = {}
    fields = dataclasses.fields(TransformerLanguageModelConfig)
    kind = ARCH_MODEL_REGISTRY.get(saved.get("_name") or saved.get("arch"))
    if isinstance(kind, type) and issubclass(kind, CausalLM):
        given = dataclasses.fields(CausalLMOptions)
        fields += tuple(field for field in given if field.name in _OF_CAUSAL_LM)
    for field in fields:
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


_READERS = {
    TransformerLanguageModel: transformer_options,
    RobertaModel: roberta_options,
    TransformerModelBase: translation_options,
}
