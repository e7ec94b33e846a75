"""The architectures, each registered with its own dataclass of defaults.

fairseq's Hydra entry point never calls architecture functions; with a dataclass for each,
`--arch NAME` and `model=NAME` give the same model, and every field can be overridden in both.
"""

from fairseq.models import register_model

from evomoe_plugin.models import config
from evomoe_plugin.models.causal_lm import CausalLM
from evomoe_plugin.models.language_model import MoELanguageModel

ARCHITECTURES: dict[str, type[config.MoELanguageModelConfig]] = {
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
}
for _name, _options in ARCHITECTURES.items():
    _model = type(
        _options.__name__.removesuffix("Config"),
        (CausalLM if issubclass(_options, config.CausalLMMoEConfig) else MoELanguageModel,),
        {"__doc__": _options.__doc__, "__module__": __name__},
    )
    register_model(_name, dataclass=_options)(_model)
