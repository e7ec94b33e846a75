"""config.json of a GPT-2, and of what is none."""

import json

import pytest

from evomoe_plugin.checkpoint.gpt2_config import read_config
from evomoe_plugin.config.errors import OptionError

GIVEN = {
    "model_type": "gpt2",
    "vocab_size": 50,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "eos_token_id": 49,
}


def read(folder, **given):
    (folder / "config.json").write_text(json.dumps({**GIVEN, **given}))
    return read_config(str(folder))


def test_what_is_given_and_what_is_not(tmp_path):
    config = read(tmp_path, attn_pdrop=0, n_inner=40, architectures=["GPT2LMHeadModel"])
    assert (config.n_embd, config.ffn_dim, config.attn_pdrop, config.resid_pdrop) == (
        16,
        40,
        0,
        0.1,
    )
    assert (config.activation, config.tie_word_embeddings) == ("gelu_accurate", True)
    assert read(tmp_path).ffn_dim == 64


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_type", "llama", 'holds a model of type "llama": gpt2 can be imported'),
        ("model_type", ["gpt2"], "holds a model of type .*gpt2.*: gpt2 can be imported"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon 1e-06, which must be 1e-05"),
        ("activation_function", "silu", 'activation_function "silu", which must be one of: gelu'),
        ("activation_function", ["gelu"], "activation_function ..gelu.., which must be one of"),
        (
            "scale_attn_by_inverse_layer_idx",
            True,
            "scale_attn_by_inverse_layer_idx true, which must",
        ),
        (
            "quantization_config",
            {"bits": 4},
            "quantization_config .* quantised weights are not read",
        ),
        *(
            (name, value, f"{name} .*, which must be a whole number from 1 on")
            for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
            for value in ("2", None, 2.0, 0, -1, True, [3])
        ),
        ("n_inner", "x", 'n_inner "x", which must be null or a whole number'),
        ("n_inner", 0, "n_inner 0, which must be null or a whole number"),
        ("n_head", 3, "n_head 3, which does not divide n_embd 16"),
        ("resid_pdrop", None, "resid_pdrop null, which must be a probability"),
        ("attn_pdrop", 1.5, "attn_pdrop 1.5, which must be a probability"),
        ("attn_pdrop", float("nan"), "attn_pdrop NaN, which must be a probability"),
        ("tie_word_embeddings", "no", 'tie_word_embeddings "no", which must be true or false'),
        ("eos_token_id", None, "eos_token_id null, which must be the id of the token that ends"),
        ("eos_token_id", 50, "eos_token_id 50, and tokens up to 49"),
    ],
)
def test_values_that_cannot_be(tmp_path, name, value, message):
    with pytest.raises(OptionError, match=message) as caught:
        read(tmp_path, **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is nested too deeply"),
        (b"[]", "is JSON, but no object"),
        (b"\xff", "is not JSON"),
        (b"{", "is not JSON"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(OptionError, match=f"its config.json {message}") as caught:
        read_config(str(tmp_path))
    assert "\n" not in str(caught.value)
