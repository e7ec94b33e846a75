"""The architectures, each registered with its own dataclass of defaults.

fairseq's Hydra entry point never calls architecture functions; with a dataclass for each,
`--arch NAME` and `model=NAME` give the same model, and every field can be overridden in both.
"""

from typing import Any

from fairseq.models import register_model

from evomoe_plugin.config.dataclass_fields import add_field, store_schemas
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import on_registration, own_options
from evomoe_plugin.models import config, encoder_config
from evomoe_plugin.models.causal_lm import CausalLM
from evomoe_plugin.models.language_model import MoELanguageModel
from evomoe_plugin.models.roberta import RobertaMoE
from evomoe_plugin.models.translation import TransformerMoE

ARCHITECTURES: dict[str, type[Any]] = {
    "transformer_lm_moe": config.MoELanguageModelConfig,
    "transformer_lm_gpttiny_moe": config.GPTTinyMoEConfig,
    "transformer_lm_gptsmall_moe": config.GPTSmallMoEConfig,
    "transformer_lm_gptmedium_moe": config.GPTMediumMoEConfig,
    "transformer_lm_gptxl_moe": config.GPTXLMoEConfig,
    "causal_lm_moe": config.CausalLMMoEConfig,
    "causal_lm": config.CausalLMConfig,
    "transformer_lm_llama_tiny_moe": config.LlamaTinyMoEConfig,
    "transformer_lm_llama_small_moe": config.LlamaSmallMoEConfig,
    "transformer_lm_llama_medium_moe": config.LlamaMediumMoEConfig,
    "roberta_base_moe": encoder_config.RobertaMoEConfig,
    "roberta_large_moe": encoder_config.RobertaLargeMoEConfig,
    "roberta_tiny_moe": encoder_config.RobertaTinyMoEConfig,
    "transformer_moe": encoder_config.TransformerMoEConfig,
    "transformer_tiny_moe": encoder_config.TransformerTinyMoEConfig,
    "transformer_iwslt_de_en_moe": encoder_config.TransformerIWSLTMoEConfig,
    "transformer_wmt_en_de_big_moe": encoder_config.TransformerWMTBigMoEConfig,
}
_MODELS: dict[type, type] = {  # of the first of these dataclasses that an architecture's is
    config.CausalLMMoEConfig: CausalLM,
    config.MoELanguageModelConfig: MoELanguageModel,
    encoder_config.RobertaMoEConfig: RobertaMoE,
    encoder_config.TransformerMoEConfig: TransformerMoE,
}
for _name, _options in ARCHITECTURES.items():
    _base = next(model for kind, model in _MODELS.items() if issubclass(_options, kind))
    _model = type(
        _options.__name__.removesuffix("Config"),
        (_base,),
        {"__doc__": _options.__doc__, "__module__": __name__},
    )
    register_model(_name, dataclass=_options)(_model)


def _add_options(gate: type[Gate]) -> None:
    """Add the options of a user's gate to every architecture."""
    for option in own_options(gate):
        known = config.MoELanguageModelConfig.__dataclass_fields__.get(option.name)
        if known is not None and (known.type, known.default) != (option.type, option.default):
            raise ValueError(
                f"{gate.__name__}: there is an option {option.name} already, of type {known.type} "
                f"and with the default {known.default}: name yours differently"
            )
        for options in ARCHITECTURES.values():
            add_field(options, option.name, option.type, option.default, option.metadata["help"])
    if own_options(gate):
        store_schemas(set(ARCHITECTURES.values()))


on_registration(_add_options)
