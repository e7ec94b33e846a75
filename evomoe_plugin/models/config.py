"""The options of an MoE language model: fairseq's transformer_lm, ours and those of gates."""

# No `from __future__ import annotations`: fairseq reads the types of these fields at run time.

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import II

from evomoe_plugin.config.moe_layers import NO_LAYERS
from evomoe_plugin.config.options import ACTIVATIONS, CausalLMOptions, MoEOptions, flag
from evomoe_plugin.gates.registry import option_fields

GateOptions: Any = dataclasses.make_dataclass(
    "GateOptions",
    [
        (option.name, option.type, field(default=option.default, metadata=option.metadata))
        for option in option_fields().values()
    ],
)


@dataclass
class MoELanguageModelConfig(GateOptions, MoEOptions, TransformerLanguageModelConfig):
    """Fields of every MoE architecture; architectures differ only in defaults."""

    # 0 follows the width of the model, also if overridden; fairseq's 512 would add a projection.
    decoder_input_dim: int = flag(0, "decoder input dimension; 0: --decoder-embed-dim")
    decoder_output_dim: int = flag(0, "decoder output dimension; 0: --decoder-embed-dim")
    # Any name that fairseq implements; its own list of choices lacks swish.
    activation_fn: str = flag(
        "relu", "activation of the feed-forward networks: " + ", ".join(ACTIVATIONS)
    )
    # From other groups: gate noise depends on the seed, default schedules on the run's length.
    seed: int = II("common.seed")
    max_update: Optional[int] = II("optimization.max_update")


@dataclass
class GPTTinyMoEConfig(MoELanguageModelConfig):
    """For laptops: 4 layers, width 128, 4 heads."""

    decoder_layers: int = 4
    decoder_embed_dim: int = 128
    decoder_ffn_embed_dim: int = 512
    decoder_attention_heads: int = 4
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_fn: str = "gelu"


@dataclass
class CausalLMMoEConfig(CausalLMOptions, MoELanguageModelConfig):
    """Llama's kind of decoder; `--hf-config` gives the sizes and options of another."""

    activation_fn: str = flag(
        "swish", "activation of the feed-forward networks: " + ", ".join(ACTIVATIONS)
    )
    dropout: float = 0.0


@dataclass
class CausalLMConfig(CausalLMMoEConfig):
    """The same without MoE layers."""

    moe_layers: Optional[str] = NO_LAYERS


@dataclass
class LlamaTinyMoEConfig(CausalLMMoEConfig):
    """For laptops: 4 layers, width 128, 4 heads, 2 key/value heads."""

    decoder_layers: int = 4
    decoder_embed_dim: int = 128
    decoder_ffn_embed_dim: int = 352
    decoder_attention_heads: int = 4
    decoder_kv_heads: int = 2


def _sized(
    cls_name: str, base: type, layers: int, width: int, heads: int, source: str, **more: int
) -> type:
    """The options of a larger model."""
    sizes = {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": 4 * width,
        "decoder_attention_heads": heads,
        **more,
    }
    doc = f"{layers} layers, width {width}, {heads} heads ({source})."
    fields = [(name, int, size) for name, size in sizes.items()]
    return dataclasses.make_dataclass(
        cls_name, fields, bases=(base,), namespace={"__doc__": doc, "__module__": __name__}
    )


_GPT = "EvoMoE's code"
GPTSmallMoEConfig = _sized("GPTSmallMoEConfig", GPTTinyMoEConfig, 12, 768, 12, _GPT)
GPTMediumMoEConfig = _sized("GPTMediumMoEConfig", GPTTinyMoEConfig, 24, 1024, 16, _GPT)
GPTXLMoEConfig = _sized("GPTXLMoEConfig", GPTTinyMoEConfig, 48, 1600, 25, _GPT)
# The depth and width of those GPTs; FFNs of 8/3 of the width, as Llama's.
_LLAMA = "those of GPT, as Llama"
LlamaSmallMoEConfig = _sized(
    "LlamaSmallMoEConfig",
    LlamaTinyMoEConfig,
    12,
    768,
    12,
    _LLAMA,
    decoder_ffn_embed_dim=2048,
    decoder_kv_heads=4,
)
LlamaMediumMoEConfig = _sized(
    "LlamaMediumMoEConfig",
    LlamaTinyMoEConfig,
    24,
    1024,
    16,
    _LLAMA,
    decoder_ffn_embed_dim=2816,
    decoder_kv_heads=4,
)
