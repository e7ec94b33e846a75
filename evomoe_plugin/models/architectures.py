"""The architectures, each registered with its own dataclass of defaults.

fairseq's Hydra entry point never calls architecture functions; with a dataclass for each,
`--arch NAME` and `model=NAME` give the same model, and every field can be overridden in both.
"""

from fairseq.models import register_model

from evomoe_plugin.models import config
from evomoe_plugin.models.language_model import MoELanguageModel


@register_model("transformer_lm_moe", dataclass=config.MoELanguageModelConfig)
class TransformerLMMoE(MoELanguageModel):
    """fairseq's base transformer_lm sizes."""


@register_model("transformer_lm_gpttiny_moe", dataclass=config.GPTTinyMoEConfig)
class GPTTinyMoE(MoELanguageModel):
    """4 layers, width 128, 4 heads."""


@register_model("transformer_lm_gptsmall_moe", dataclass=config.GPTSmallMoEConfig)
class GPTSmallMoE(MoELanguageModel):
    """12 layers, width 768, 12 heads."""


@register_model("transformer_lm_gptmedium_moe", dataclass=config.GPTMediumMoEConfig)
class GPTMediumMoE(MoELanguageModel):
    """24 layers, width 1024, 16 heads."""


@register_model("transformer_lm_gptxl_moe", dataclass=config.GPTXLMoEConfig)
class GPTXLMoE(MoELanguageModel):
    """48 layers, width 1600, 25 heads."""
