"""GPT-2 of transformers against what is made of it."""

import json

import pytest
import torch
from fairseq.data import Dictionary
from safetensors.torch import load_file, save_file

from evomoe_plugin.checkpoint.huggingface import import_gpt2
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.dictionary import TokenizerDictionary
from evomoe_plugin.data.huggingface_tokenizer import SpecialToken
from evomoe_plugin.evolve.convert import convert
from evomoe_plugin.evolve.upcycle import Recipe
from tests.evolve.dense_models import build

VOCABULARY, LENGTH, SPECIALS = 50, 32, 4
EOS, END = 2, VOCABULARY - 1  # of fairseq's dictionary; of the ids
ROWS = torch.cat([torch.arange(VOCABULARY - 1) + SPECIALS, torch.tensor([EOS])])  # of the ids


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A maker of tiny random models of transformers, saved, in evaluation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(**given):
        save = given.pop("save", {})
        torch.manual_seed(1)
        config = GPT2Config(
            **{
                "vocab_size": VOCABULARY,
                "n_positions": LENGTH,
                "n_embd": 16,
                "n_layer": 3,
                "n_head": 2,
                "eos_token_id": END,
                "bos_token_id": END,
                **given,
            }
        )
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("gpt2")
        model.save_pretrained(folder, **save)
        return model, str(folder)

    return make


def both_logits(model, imported, rows=None):
    """On random ids; of ours, the columns of the ids."""
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    rows = ROWS if rows is None else rows
    with torch.no_grad():
        theirs = model(ids).logits
        ours = build(imported.state, imported.dictionary)(rows[ids])[0]
    assert theirs.std() > 0.3
    return theirs, ours[..., rows], ours


def test_a_tokenizers_own_ids_are_the_rows(gpt2):
    """With the dictionary of `prepare --tokenizer` the embedding keeps its order."""
    model, folder = gpt2()
    words = {"bos": END, "eos": END, "unk": VOCABULARY, "pad": VOCABULARY + 1}
    dictionary = TokenizerDictionary({n: SpecialToken(i, f"<{n}>") for n, i in words.items()})
    for entry in [*map(str, range(VOCABULARY)), "<unk>", "<pad>"]:
        dictionary.add_symbol(entry)
    dictionary.pad_to_multiple_(8)
    imported = import_gpt2(folder, dictionary)
    ids = torch.arange(VOCABULARY)
    theirs, ours, whole = both_logits(model, imported, ids)
    assert torch.allclose(theirs, ours, atol=1e-5)
    table = imported.state["model"]["decoder.embed_tokens.weight"]
    assert torch.equal(table[:VOCABULARY], model.transformer.wte.weight)
    positions = imported.state["model"]["decoder.embed_positions.weight"]
    assert positions.shape == (LENGTH + 2, 16)
    assert (whole[..., VOCABULARY:] < theirs.amin(-1, keepdim=True)).all()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": 40},
        {"tie_word_embeddings": False},
        {"n_head": 4, "n_layer": 1},
        {"save": {"max_shard_size": "10KB"}},
    ],
    ids=str,
)
def test_equal_logits(gpt2, given):
    model, folder = gpt2(**given)
    theirs, ours, _ = both_logits(model, import_gpt2(folder))
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_weights_in_half_precision_stay_so(gpt2):
    model, folder = gpt2()
    model.bfloat16().save_pretrained(folder)
    imported = import_gpt2(folder)
    weights = imported.state["model"]
    assert {w.dtype for n, w in weights.items() if n != "decoder.version"} == {torch.bfloat16}
    imported.state["model"] = {name: value.float() for name, value in weights.items()}
    theirs, ours, _ = both_logits(model.float(), imported)
    assert torch.allclose(theirs, ours, atol=1e-5)


def losses(logits, targets):
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_loss_is_that_of_the_model(gpt2, is_tied):
    """On texts with their ends: no row beside the tokens takes a share, nor does a second end."""
    model, folder = gpt2(tie_word_embeddings=is_tied)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(10)  # logits from -100 to 100
        model.save_pretrained(folder)
    dictionary = Dictionary()
    for n in range(VOCABULARY):
        dictionary.add_symbol(str(n))
    dictionary.finalize(padding_factor=64)  # 10 fillers
    imported = import_gpt2(folder, dictionary)
    assert imported.has_masked_rows
    rows = torch.tensor([dictionary.index(str(n)) for n in range(END)] + [EOS])
    ids = torch.randint(0, END, (4, LENGTH))
    ids[:, ::5] = END
    with torch.no_grad():
        theirs = losses(model(ids).logits[:, :-1], ids[:, 1:])
        logits = build(imported.state, dictionary)(rows[ids])[0][:, :-1]
    assert torch.allclose(losses(logits, rows[ids][:, 1:]), theirs, atol=1e-4, rtol=1e-5)
    others = torch.ones(len(dictionary), dtype=torch.bool)
    others[rows] = False
    assert others.sum() == 3 + 1 + 10
    assert logits.softmax(-1)[..., others].max() < 1e-9 / VOCABULARY


def test_a_model_without_a_masked_row_says_so(gpt2):
    """Where the last LayerNorm has no bias, every row's logit is of either sign somewhere."""
    model, folder = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias.zero_()
    model.save_pretrained(folder)
    imported = import_gpt2(folder)
    assert not imported.has_masked_rows
    theirs, ours, whole = both_logits(model, imported)
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert torch.allclose(whole[..., :SPECIALS], ours[..., -1:].expand(*ours.shape[:-1], SPECIALS))


def test_the_order_of_another_dictionary(gpt2):
    model, folder = gpt2()
    dictionary = Dictionary()
    order = torch.randperm(VOCABULARY).tolist()
    for n in order:
        dictionary.add_symbol(str(n), n=5)
    dictionary.finalize(padding_factor=8)
    imported = import_gpt2(folder, dictionary)
    rows = torch.tensor([dictionary.index(str(n)) for n in range(END)] + [EOS])
    theirs, ours, whole = both_logits(model, imported, rows)
    assert torch.allclose(theirs, ours, atol=1e-5) and whole.size(-1) == 56
    dictionary.add_symbol("word")
    with pytest.raises(OptionError, match="word: is no token id of the model .0 to 49."):
        import_gpt2(folder, dictionary)


def test_an_imported_model_is_upcycled_with_equal_logits(gpt2, tmp_path):
    model, folder = gpt2()
    imported = import_gpt2(folder)
    torch.save(imported.state, tmp_path / "dense.pt")
    converted = convert(
        str(tmp_path / "dense.pt"),
        {"moe_gate": "top_p", "moe_expert_count": "3"},
        Recipe(),
        max_update=10,
    )
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        ours = build(converted.state, imported.dictionary)(ROWS[ids])[0][..., ROWS]
        assert torch.allclose(model(ids).logits, ours, atol=1e-5)


def changed(folder, **values):
    path = f"{folder}/config.json"
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump({**config, **values}, file)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tie_word_embeddings", False, "its weights have no lm_head.weight"),
        (
            "vocab_size",
            100,
            r"wte.weight has the shape \(50, 16\), where config.json says \(100, 16\)",
        ),
        ("n_layer", 2, "its weights have h.2.*, for which"),
        ("n_layer", 4, "its weights have no h.3.ln_1.weight"),
        ("n_inner", 30, r"h.0.mlp.c_fc.weight has the shape \(16, 64\), where config.json says"),
    ],
)
def test_models_that_do_not_fit(gpt2, name, value, message):
    _, folder = gpt2()
    changed(folder, **{name: value})
    with pytest.raises(OptionError, match=message) as caught:
        import_gpt2(folder)
    assert "\n" not in str(caught.value)


def spoil(weights, **given):
    """One tensor changed, by its name with _ for a dot."""
    for name, change in given.items():
        name = next(known for known in weights if known.replace(".", "_").endswith(name))
        weights[name] = change(weights[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: spoil(w, wte_weight=lambda t: t[0].clone()),
            r"wte.weight has the shape \(16,\)",
        ),
        (
            lambda w: spoil(w, wte_weight=lambda t: t[:0].clone()),
            r"wte.weight has the shape \(0, 16\)",
        ),
        (
            lambda w: spoil(w, h_1_mlp_c_fc_weight=lambda t: t.to(torch.int8)),
            "h.1.mlp.c_fc.weight is of the type I8: give weights of 16 or 32 bits",
        ),
        (
            lambda w: w.update({"wte.weight": w["transformer.wte.weight"].clone()}),
            "wte.weight twice",
        ),
        (
            lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}),
            "have lm_head.weight beside wte.weight, though config.json has "
            "tie_word_embeddings true",
        ),
        (lambda w: w.update({"extra": torch.ones(1)}), "have extra, for which"),
    ],
)
def test_weights_that_do_not_fit(gpt2, change, message):
    _, folder = gpt2()
    weights = load_file(f"{folder}/model.safetensors")
    change(weights)
    save_file(weights, f"{folder}/model.safetensors")
    with pytest.raises(OptionError, match=message) as caught:
        import_gpt2(folder)
    assert "\n" not in str(caught.value)


def test_an_index_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    index = tmp_path / "model.safetensors.index.json"
    for content in ({"weight_map": {"a": 3}}, {"weight_map": "x"}, {}):
        index.write_text(json.dumps(content))
        with pytest.raises(OptionError, match="has no weight_map of file names"):
            import_gpt2(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    for name in ("one", "two"):
        save_file({"wte.weight": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(OptionError, match="two of its files have wte.weight"):
        import_gpt2(str(tmp_path))


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
        json.dumps({"weight_map": {"a": "../other.safetensors"}})
    )
    with pytest.raises(OptionError, match="names files of other folders"):
        import_gpt2(str(tmp_path))
