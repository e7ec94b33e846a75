"""Small models of every kind of option."""

import types

import pytest
from fairseq.data import Dictionary
from fairseq.dataclass.utils import merge_with_parent
from fairseq.models import MODEL_DATACLASS_REGISTRY, build_model
from omegaconf import OmegaConf

VOCABULARY = 40


@pytest.fixture
def task():
    dictionary = Dictionary()
    for n in range(VOCABULARY - len(dictionary)):
        dictionary.add_symbol(f"w{n}")
    return types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


@pytest.fixture
def make_config():
    """Resolved options of an architecture, as fairseq hands them to `build_model`."""

    def make(arch="transformer_lm_gpttiny_moe", **given):
        run = OmegaConf.create(
            {
                "common": {"seed": 1, "tpu": False},
                "task": {
                    "add_bos_token": False,
                    "tokens_per_sample": 64,
                    "max_target_positions": None,
                },
                "optimization": {"max_update": 100},
                "model": {"_name": arch, **given},
            }
        )
        cfg = merge_with_parent(MODEL_DATACLASS_REGISTRY[arch](), run.model)
        return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))

    return make


FAMILIES = {
    "gpt": {},
    "llama": {
        "arch": "causal_lm_moe",
        "decoder_kv_heads": 1,
        "decoder_qk_norm": "shared",
        "rope_fraction": 0.5,
    },
}
BOTH_FAMILIES = pytest.mark.parametrize("make_model", FAMILIES, indirect=True)


@pytest.fixture
def make_model(task, make_config, request):
    """A maker of tiny models, GPTs unless parametrised, without dropout unless asked for."""
    family = FAMILIES[getattr(request, "param", "gpt")]

    def make(**given):
        small = {
            "decoder_layers": 4,
            "decoder_embed_dim": 16,
            "decoder_ffn_embed_dim": 24,
            "decoder_attention_heads": 2,
            "moe_expert_count": "4",
            "dropout": 0.0,
            "attention_dropout": 0.0,
            **family,
        }
        if "hf_config" in given:
            small = {}
        return build_model(make_config(**{**small, **given}), task)

    make.family = family
    return make
