"""`evomoe import-hf` and `evomoe upcycle` of Hugging Face folders: what they write and refuse."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomoe_plugin.cli import main
from evomoe_plugin.evolve.convert import convert
from evomoe_plugin.evolve.import_hf import import_hf
from evomoe_plugin.evolve.upcycle import Recipe
from tests.evolve.dense_models import build, dictionary_of
from tests.models.hf_models import VOCABULARY, save_hf


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    save_hf(path, "qwen2")
    return {
        "config.json": json.loads((path / "config.json").read_text()),
        "model.safetensors": load_file(path / "model.safetensors"),
    }


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a Qwen2 to spoil: a maker, given a change of its config and tensors."""
    path = tmp_path / "hf"
    path.mkdir()

    def make(change=lambda config, weights: None):
        config, weights = (
            json.loads(json.dumps(saved["config.json"])),
            dict(saved["model.safetensors"]),
        )
        change(config, weights)
        (path / "config.json").write_text(json.dumps(config))
        save_file(weights, path / "model.safetensors")
        return path

    return make


def refused(capsys, folder, tmp_path) -> str:
    """The one line of both verbs, which write nothing."""
    errors = []
    before = sorted(p.name for p in tmp_path.iterdir())
    for verb, *more in (["import-hf"], ["upcycle", "--moe-gate", "switch"]):
        assert main([verb, str(folder), str(tmp_path / "out.pt"), *more]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
        assert not captured.out
        errors.append(captured.err.replace("DENSE", "DIR"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert errors[0] == errors[1]
    return errors[0]


def test_a_dense_model_and_one_with_experts(folder, tmp_path, capsys):
    dense, moe = tmp_path / "dense.pt", tmp_path / "moe.pt"
    assert main(["import-hf", str(folder()), str(dense)]) == 0
    said = capsys.readouterr().out
    assert "dense.pt: 2 layers of width 32, 40 token ids, no experts, float32" in said
    options = "--moe-gate top_k --moe-top-k-weights renormalized --moe-expert-count 2".split()
    assert main(["upcycle", str(folder()), str(moe), *options, "--moe-freq", "1"]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 layers with 2 experts of width 48 each, by copy" in said
    assert "logits equal to the dense model's" in said
    tokens = torch.randint(4, VOCABULARY, (2, 9))
    logits = []
    for path in (dense, moe):
        state = torch.load(path, weights_only=True)  # plain data
        with torch.no_grad():
            logits.append(build(state, dictionary_of(VOCABULARY))(tokens)[0])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert main(["import-hf", str(folder()), str(dense)]) == 2
    assert "exists already: give another path, or --overwrite" in capsys.readouterr().err


def test_a_mixtral_becomes_a_checkpoint_to_train_on(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    save_hf(tmp_path / "hf", "mixtral", torch.bfloat16)
    assert main(["import-hf", str(tmp_path / "hf"), str(tmp_path / "moe.pt")]) == 0
    said = capsys.readouterr().out
    assert "40 token ids, 4 experts in each of 2 layers, bfloat16" in said
    state = torch.load(tmp_path / "moe.pt", weights_only=True)
    model = build(state, dictionary_of(VOCABULARY)).train()
    logits, extra = model(torch.randint(4, VOCABULARY, (2, 9)))
    (logits.logsumexp(-1).sum() + extra["moe_aux"]["balance"].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert state["cfg"]["criterion"]["_name"] == "moe_cross_entropy"


def _set(**values):
    return lambda config, weights: config.update(values)


def _tensor(name, change):
    def spoil(config, weights):
        weights[name] = change(weights[name]).contiguous()

    return spoil


FIRST = "model.layers.0.mlp.gate_proj.weight"
BAD = [
    (
        _set(model_type="gemma7"),
        'holds a model of type "gemma7"; known: gpt2, llama, mistral, mixtral, olmoe, phi, '
        "qwen2, qwen2_moe, qwen3, qwen3_moe, stablelm",
    ),
    (_set(model_type=None), "holds a model of type null; known:"),
    (_set(quantization_config={"bits": 4}), "has quantised weights: give the model in 16"),
    (_tensor(FIRST, lambda w: w.to(torch.int8)), f"{FIRST} is of the type I8: give weights of 16"),
    (
        _set(intermediate_size=40),
        f"{FIRST} has the shape (48, 32), where config.json says (40, 32)",
    ),
    (
        _set(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "its weights have no model.layers.2.",
    ),
    (_set(num_hidden_layers=1, layer_types=["full_attention"]), "its weights have model.layers.1."),
    (lambda c, w: w.pop(FIRST), f"its weights have no {FIRST}"),
    (
        lambda c, w: w.update(extra=torch.ones(2)),
        "its weights have extra, for which a qwen2 has no place",
    ),
    (_tensor(FIRST, lambda w: w * float("nan")), f"{FIRST} holds NaN or infinity"),
    (_set(num_key_value_heads=3), "num_key_value_heads 3, which does not divide"),
    (_set(hidden_act="mish2"), 'hidden_act "mish2"; known: gelu'),
    (_set(hidden_size="many"), "its config.json has an invalid value"),
    (
        _set(rope_parameters={"rope_type": "dynamic", "rope_theta": 10.0, "factor": 2.0}),
        'rope_type "dynamic"; known: default, linear, llama3, yarn',
    ),
    (_set(tie_word_embeddings=True), "its input and output embeddings differ, though"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m.split(":")[0][:40] for _, m in BAD])
def test_what_does_not_fit_is_one_line(folder, tmp_path, capsys, change, message):
    assert message in refused(capsys, folder(change), tmp_path)


def test_folders_without_weights(folder, tmp_path, capsys):
    path = folder()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "has no model.safetensors; pickled weights" in refused(capsys, path, tmp_path)
    (path / "config.json").unlink()
    assert "has no config.json: give the folder" in refused(capsys, path, tmp_path)
    (path / "config.json").write_text("[")
    assert "its config.json is not JSON" in refused(capsys, path, tmp_path)


def test_files_that_are_cut_short_or_missing(folder, tmp_path, capsys):
    path = folder()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is no file of safetensors, or cut short" in refused(capsys, path, tmp_path)
    index = {"weight_map": {FIRST: "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "there is no such file" in refused(capsys, path, tmp_path)
    index = {"weight_map": {FIRST: "../model.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names files of other folders" in refused(capsys, path, tmp_path)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 0, "b": 40}}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 41, "content": "<x>"}]},
        {"model": {"vocab": [["a", -1.0]] * 41}},
    ],
    ids=["bpe", "added", "unigram"],
)
def test_a_tokenizer_with_more_ids_than_embeddings(folder, tmp_path, capsys, tokenizer):
    path = folder()
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its embeddings only 40 rows" in refused(capsys, path, tmp_path)


def test_without_transformers(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    error = refused(capsys, folder(), tmp_path)
    assert "is read by transformers: pip install 'evomoe_plugin[hf]'" in error


def test_a_dictionary_with_more_entries(folder, tmp_path, capsys):
    """Rows beyond the model's token ids hardly change its probabilities."""
    extra = 8
    data, dense = tmp_path / "data", tmp_path / "dense.pt"
    data.mkdir()
    dictionary = dictionary_of(VOCABULARY + extra)
    dictionary.save(str(data / "dict.txt"))
    argv = ["import-hf", str(folder()), str(dense), "--dict", str(data / "dict.txt")]
    assert main(argv) == 0
    options = {"moe_gate": "top_k", "moe_top_k_weights": "renormalized", "moe_expert_count": "2"}
    converted = convert(str(folder()), options, Recipe(), data=str(data), max_update=9)
    assert converted.logits.equal
    assert converted.state["model"]["decoder.embed_tokens.weight"].shape == (48, 32)
    plain = build(import_hf("DIR", str(folder())), dictionary_of(VOCABULARY))
    grown = build(torch.load(dense, weights_only=True), dictionary)
    tokens = torch.randint(4, VOCABULARY, (3, 9))
    with torch.no_grad():
        wanted, logits = plain(tokens)[0], grown(tokens)[0]
    torch.testing.assert_close(logits[..., :VOCABULARY], wanted, rtol=0, atol=1e-5)
    change = logits.logsumexp(-1) - wanted.logsumexp(-1)
    assert (change > 0).all() and (change <= math.log(1 + extra / VOCABULARY) + 1e-5).all()
    dictionary_of(VOCABULARY - 8).save(str(data / "dict.txt"))
    capsys.readouterr()
    assert main([*argv, "--overwrite"]) == 2
    assert "--dict (32 entries): the model has 40 token ids" in capsys.readouterr().err
