"""The architectures, each registered with its own dataclass of defaults.

fairseq's Hydra entry point never calls architecture functions; with a dataclass for each,
`--arch NAME` and `model=NAME` give the same model, and every field can be overridden in both.
"""

from fairseq.models import register_model

from evomoe_plugin.models import config
from evomoe_plugin.models.language_model import MoELanguageModel

ARCHITECTURES: dict[str, type[config.MoELanguageModelConfig]] = {
    "transformer_lm_moe": config.MoELanguageModelConfig,
    "transformer_lm_gpttiny_moe": config.GPTTinyMoEConfig,
    "transformer_lm_gptsmall_moe": config.GPTSmallMoEConfig,
    "transformer_lm_gptmedium_moe": config.GPTMediumMoEConfig,
    "transformer_lm_gptxl_moe": config.GPTXLMoEConfig,
}
for _name, _options in ARCHITECTURES.items():
    _model = type(
        _options.__name__.removesuffix("Config"),
        (MoELanguageModel,),
        {"__doc__": _options.__doc__, "__module__": __name__},
    )
    register_model(_name, dataclass=_options)(_model)
