"""Sizes, defaults, and that each architecture really is an MoE model."""

import pytest
import torch
from fairseq.models import build_model

from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.accounting import count_parameters

ARCHITECTURES = {  # layers, width, FFN width, heads: EvoMoE's code; tiny ones and Llamas are ours
    "transformer_lm_gptxl_moe": (48, 1600, 6400, 25),
    "transformer_lm_gptmedium_moe": (24, 1024, 4096, 16),
    "transformer_lm_gptsmall_moe": (12, 768, 3072, 12),
    "transformer_lm_gpttiny_moe": (4, 128, 512, 4),
    "transformer_lm_llama_tiny_moe": (4, 128, 352, 4),
    "transformer_lm_llama_small_moe": (12, 768, 2048, 12),
    "transformer_lm_llama_medium_moe": (24, 1024, 2816, 16),
}
VARIANTS = {
    "as it is": {},
    "tied": {"share_decoder_input_output_embed": True},
    "growing experts": {"moe_expert_count": "2:7", "moe_expert_ffn_dim": 33, "moe_freq": 1},
    "learned positions": {"decoder_learned_pos": True, "layernorm_embedding": True},
    "projections": {"decoder_input_dim": 24, "decoder_output_dim": 40},
    "no final norm": {"no_decoder_final_norm": True, "no_token_positional_embeddings": True},
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture_is_the_moe_model_it_says(arch, task, make_config):
    layers, width, ffn, heads = ARCHITECTURES[arch]
    with torch.device("meta"):
        model = build_model(make_config(arch), task)
    assert len(model.decoder.layers) == layers
    assert model.decoder.embed_dim == width
    assert model.decoder.layers[0].fc1.weight.shape == (ffn, width)
    assert {layer.self_attn.num_heads for layer in model.decoder.layers} == {heads}
    moe = [m for m in model.modules() if isinstance(m, MoELayer)]
    assert len(moe) == layers // 2
    assert {tuple(m.experts.fc1_weight.shape) for m in moe} == {(16, ffn, width)}
    assert {m.experts.gated for m in moe} == {"llama" in arch}
    assert "llama" in arch or model.decoder.layers[1].normalize_before


OF_LLAMAS = {
    "as it is": {},
    "tied": {"share_decoder_input_output_embed": True},
    "layer norms": {"decoder_norm": "layer", "decoder_qk_norm": "separate"},
    "of Phi's kind": {
        "decoder_norm": "layer",
        "decoder_ffn": "plain",
        "decoder_ffn_bias": True,
        "decoder_qkv_bias": True,
        "decoder_out_bias": True,
        "decoder_parallel": True,
        "decoder_logits_bias": True,
        "decoder_qk_norm": "shared",
    },
    "of OLMoE's kind": {"moe_freq": 1, "decoder_qk_norm": "joint", "decoder_head_dim": 24},
    "dense": {"moe_layers": "none", "decoder_ffn_bias": True},
}
COUNTED = [
    *((arch, given) for arch in ARCHITECTURES if "gpt" in arch for given in VARIANTS.values()),
    *(("transformer_lm_llama_tiny_moe", given) for given in OF_LLAMAS.values()),
    ("transformer_lm_llama_medium_moe", {}),
]


@pytest.mark.parametrize("arch, given", COUNTED, ids=str)
def test_parameter_counts_equal_the_built_model(arch, given, task, make_config):
    cfg = make_config(arch, **given)
    counted = count_parameters(make_config(arch, **{**given, "max_target_positions": 64}), 40)
    with torch.device("meta"):
        model = build_model(cfg, task)
    assert counted.total == sum(p.numel() for p in model.parameters())
    moe = [m for m in model.modules() if isinstance(m, MoELayer)]
    experts = [sum(p.numel() for p in m.experts.parameters()) for m in moe]
    assert counted.experts == sum(experts)
    idle = sum(n - n // m.num_experts for n, m in zip(experts, moe, strict=True))
    assert counted.active_top1 == counted.total - idle


def test_sizes_are_logged(make_model, caplog):
    caplog.set_level("INFO")
    model = make_model()
    total = sum(p.numel() for p in model.parameters())
    assert f"parameters: {total:,} in total" in caplog.text
    assert "2 of 4 layers, gate dense_to_sparse, experts per layer 4" in caplog.text
