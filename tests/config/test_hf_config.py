"""`--hf-config`, and the options of decoders of Llama's kind."""

import dataclasses
import json

import pytest
from omegaconf import OmegaConf

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import read_hf_config, resolve_hf_config
from evomoe_plugin.config.options import CausalLMModelOptions
from evomoe_plugin.gates.registry import option_fields

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}


def options(**given):
    fields = {f.name: f.default for f in dataclasses.fields(CausalLMModelOptions)}
    gates = {name: field.default for name, field in option_fields().items()}
    return OmegaConf.create({**fields, **gates, "max_update": 100, **given})


@pytest.fixture
def folder(tmp_path):
    def make(model_type, **given):
        content = {"model_type": model_type, **SIZES, **given}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return str(tmp_path)

    return make


@pytest.mark.parametrize("inside", [True, False])
def test_sizes_and_options_are_the_files(folder, inside):
    path = folder("phi", partial_rotary_factor=0.5, layer_norm_eps=1e-6)
    given = options(hf_config=path if inside else f"{path}/config.json", moe_freq=1)
    resolve_hf_config(given)
    validate(given)
    assert given.hf_config is None  # a checkpoint does not depend on the file
    assert (given.decoder_layers, given.decoder_embed_dim, given.decoder_kv_heads) == (4, 32, 2)
    assert (given.decoder_norm, given.decoder_norm_eps, given.rope_fraction) == ("layer", 1e-6, 0.5)
    assert given.decoder_parallel and given.decoder_logits_bias and given.decoder_ffn == "plain"
    assert given.activation_fn == "gelu_accurate" and given.moe_layers is None
    resolve_hf_config(given)  # there is nothing left to do


def test_the_folder_of_a_dense_model_gives_sizes_too(folder, tmp_path):
    given = options(moe_init_from_dense=folder("qwen2"))
    resolve_hf_config(given)
    assert given.decoder_ffn_embed_dim == 48 and given.decoder_qkv_bias
    assert given.moe_init_from_dense == str(tmp_path)
    unread = options(moe_init_from_dense="dense.pt")
    resolve_hf_config(unread)
    assert unread.decoder_ffn_embed_dim == 2048


def test_a_sliding_window_limits_the_length(folder):
    assert (
        read_hf_config("x", folder("mistral", sliding_window=48)).options["max_target_positions"]
        == 48
    )
    assert (
        read_hf_config("x", folder("qwen2", sliding_window=16)).options["max_target_positions"]
        == 64
    )  # which it does not use


def test_layers_with_experts_are_those_of_the_config(folder):
    given = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    read = read_hf_config(
        "x", folder("qwen3_moe", **given, decoder_sparse_step=2, mlp_only_layers=[3])
    ).options
    assert (read["moe_layers"], read["moe_top_k_weights"]) == ("1", "raw")
    read = read_hf_config("x", folder("qwen2_moe", **given, norm_topk_prob=True)).options
    assert (read["moe_layers"], read["moe_top_k_weights"]) == ("0,1,2,3", "renormalized")
    assert (read["moe_shared_experts"], read["moe_shared_combine"]) == (1, "sigmoid")


REFUSED = [
    (
        ("qwen3_moe", {"num_experts": 4, "mlp_only_layers": [0, 1, 2, 3]}),
        "has mlp_only_layers .* no MoE layer",
    ),
    (("olmoe", {"clip_qkv": 8.0}), "has clip_qkv 8.0, which is not supported"),
    (("mixtral", {"router_jitter_noise": 0.1}), "has router_jitter_noise 0.1"),
    (("llama", {"hidden_act": "xielu"}), 'has hidden_act "xielu"; known: gelu'),
    (
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        'has rope_type "dynamic"; known: default, linear',
    ),
]


@pytest.mark.parametrize("given, message", REFUSED, ids=[g[0] + m[4:20] for g, m in REFUSED])
def test_what_cannot_be_expressed_is_named(folder, given, message):
    kind, config = given
    with pytest.raises(OptionError, match=message):
        read_hf_config("hf_config", folder(kind, **config))


def test_what_contradicts_the_file_is_refused(folder):
    with pytest.raises(OptionError, match="--decoder-layers 8: .* says 4: leave it out"):
        resolve_hf_config(options(hf_config=folder("llama"), decoder_layers=8))
    with pytest.raises(OptionError, match="is a mixtral, which has experts already"):
        resolve_hf_config(options(hf_config=folder("mixtral")))
    with pytest.raises(OptionError, match='holds a model of type "gpt2"; known: llama'):
        resolve_hf_config(options(hf_config=folder("gpt2")))


BAD = [
    ({"decoder_norm": "batch"}, "--decoder-norm batch: one of: rms, layer"),
    ({"decoder_qk_norm": "all"}, "--decoder-qk-norm all: one of: none, shared, separate, joint"),
    ({"decoder_ffn": "moe"}, "--decoder-ffn moe: one of: gated, plain"),
    ({"decoder_norm_eps": 0.0}, "--decoder-norm-eps 0.0: give a number above 0"),
    ({"decoder_kv_heads": 3}, "--decoder-kv-heads 3: give a divisor"),
    ({"decoder_kv_heads": -1}, "--decoder-kv-heads -1: give 1 or more"),
    ({"decoder_attention_heads": 7}, "--decoder-attention-heads 7: does not divide"),
    ({"rope_theta": -1.0}, "--rope-theta -1.0: give a number above 0"),
    ({"rope_fraction": 1.5}, "--rope-fraction 1.5: give a share above 0"),
    ({"rope_fraction": 0.01}, "--rope-fraction 0.01: rotates 0 of 64"),
    ({"moe_attention": "stock"}, "--moe-attention stock: causal_lm architectures have no such"),
    ({"moe_post_norm": True}, "--moe-post-norm True: causal_lm architectures"),
    ({"decoder_learned_pos": True}, "--decoder-learned-pos True: causal_lm"),
    ({"decoder_input_dim": 16}, "--decoder-input-dim 16: causal_lm"),
    (
        {"moe_layers": "none", "moe_spawn_updates": 5},
        "--moe-spawn-updates 5: the model has no MoE layer",
    ),
    (
        {"moe_layers": "none", "moe_capacity_factor": 1.0},
        "--moe-capacity-factor 1.0: the model has no MoE layer",
    ),
]


@pytest.mark.parametrize("given, message", BAD, ids=[m.split(":")[0] for _, m in BAD])
def test_options_that_make_no_sense(given, message):
    with pytest.raises(OptionError, match=message):
        validate(options(**given))
