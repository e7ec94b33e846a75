"""GPT-2 of transformers against what is made of it."""

import json
import sys

import pytest
import torch

from evomoe_plugin.checkpoint.huggingface import import_gpt2
from evomoe_plugin.evolve.convert import convert
from evomoe_plugin.evolve.upcycle import Recipe
from evomoe_plugin.options import OptionError
from tests.evolve.dense_models import build

VOCABULARY, LENGTH, SPECIALS = 50, 32, 4


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A maker of tiny random models of transformers, saved, in evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        # As in tests/gates/test_hf_parity.py: a torchaudio that cannot be imported. Before
        # transformers is, which asks for it once.
        patch.setitem(sys.modules, "torchaudio", None)
        pytest.importorskip("transformers")
        from transformers import GPT2Config, GPT2LMHeadModel

        def make(**given):
            save = given.pop("save", {})
            torch.manual_seed(1)
            config = GPT2Config(**{
                "vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 3,
                "n_head": 2, "eos_token_id": VOCABULARY - 1, "bos_token_id": VOCABULARY - 1,
                **given})
            model = GPT2LMHeadModel(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp("gpt2")
            model.save_pretrained(folder, **save)
            return model, str(folder)

        yield make


def both_logits(model, imported, rows=None):
    """On random ids; of ours, the columns of the ids."""
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    rows = torch.arange(VOCABULARY) + SPECIALS if rows is None else rows
    with torch.no_grad():
        theirs = model(ids).logits
        ours = build(imported.state, imported.dictionary)(rows[ids])[0]
    assert theirs.std() > 0.3
    return theirs, ours[..., rows], ours


@pytest.mark.parametrize("given", [
    {}, {"activation_function": "gelu"}, {"activation_function": "relu"},
    {"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 40},
    {"tie_word_embeddings": False}, {"n_head": 4, "n_layer": 1},
    {"save": {"max_shard_size": "10KB"}},
], ids=str)
def test_equal_logits(gpt2, given):
    model, folder = gpt2(**given)
    theirs, ours, _ = both_logits(model, import_gpt2(folder))
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_rows_that_are_no_ids_have_the_logit_of_the_end_of_text(gpt2):
    model, folder = gpt2()
    _, ids, whole = both_logits(model, import_gpt2(folder))
    assert torch.allclose(whole[..., :SPECIALS], ids[..., -1:].expand(*ids.shape[:-1], SPECIALS))


def test_the_order_of_another_dictionary(gpt2):
    from fairseq.data import Dictionary

    model, folder = gpt2()
    dictionary = Dictionary()
    order = torch.randperm(VOCABULARY).tolist()
    for n in order:
        dictionary.add_symbol(str(n), n=5)
    dictionary.finalize(padding_factor=8)
    imported = import_gpt2(folder, dictionary)
    rows = torch.tensor([dictionary.index(str(n)) for n in range(VOCABULARY)])
    theirs, ours, whole = both_logits(model, imported, rows)
    assert torch.allclose(theirs, ours, atol=1e-5) and whole.size(-1) == 56
    dictionary.add_symbol("word")
    with pytest.raises(OptionError, match="word: is no token id of the model .0 to 49."):
        import_gpt2(folder, dictionary)


def test_an_imported_model_is_upcycled_with_equal_logits(gpt2, tmp_path):
    model, folder = gpt2()
    imported = import_gpt2(folder)
    torch.save(imported.state, tmp_path / "dense.pt")
    converted = convert(str(tmp_path / "dense.pt"),
                        {"moe_gate": "top_p", "moe_expert_count": "3"}, Recipe(), max_update=10)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        ours = build(converted.state, imported.dictionary)(ids + SPECIALS)[0][..., SPECIALS:]
        assert torch.allclose(model(ids).logits, ours, atol=1e-5)


def changed(folder, **values):
    path = f"{folder}/config.json"
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump({**config, **values}, file)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("model_type", "llama", "holds a model of type llama: gpt2 can be imported"),
    ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon 1e-06; fairseq's is 1e-05"),
    ("activation_function", "silu", "activation_function silu; one of: gelu"),
    ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx True, which"),
    ("n_layer", 2, "its weights have h.2.*, for which"),
    ("n_layer", 4, "its weights have no h.3.ln_1.weight"),
    ("n_inner", 30, r"h.0.mlp.c_fc.weight has the shape \(16, 64\), where config.json says"),
])
def test_models_that_do_not_fit(gpt2, name, value, message):
    _, folder = gpt2()
    changed(folder, **{name: value})
    with pytest.raises(OptionError, match=message) as caught:
        import_gpt2(folder)
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_fit(gpt2, tmp_path):
    with pytest.raises(OptionError, match="has no config.json"):
        import_gpt2(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OptionError, match="its config.json is not JSON"):
        import_gpt2(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OptionError, match="pickled weights, which could run a program, are not"):
        import_gpt2(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(OptionError, match="names files of other folders"):
        import_gpt2(str(tmp_path))
