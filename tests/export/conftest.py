"""Tiny models of every gate, exported and loaded in transformers."""

import importlib
import types

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import build_model

from evomoe_plugin.export.folder import export
from evomoe_plugin.generation.loading import TrainedModel
from evomoe_plugin.generation.text import TextCodec
from tests.models.conftest import make_config  # noqa: F401  a fixture

SIZES = {
    "decoder_layers": 3,
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 24,
    "decoder_attention_heads": 2,
    "moe_expert_count": "5",
    "moe_layers": "0,2",
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


@pytest.fixture(scope="session")
def transformers():
    """The package, imported late: that takes seconds."""
    return importlib.import_module("transformers")


@pytest.fixture
def words(tmp_path):
    """A folder with only a dictionary of 36 words."""
    folder = tmp_path / "data"
    folder.mkdir()
    dictionary = Dictionary()
    for n in range(36):
        dictionary.add_symbol(f"w{n}", n=100 // (n + 1))
    dictionary.save(str(folder / "dict.txt"))
    return folder


@pytest.fixture
def make_trained(words, make_config):  # noqa: F811
    """A tiny model in evaluation mode after some updates, as `load_trained_model` returns it."""

    def make(updates=0, arch="transformer_lm_gpttiny_moe", start="</s>", dictionary=None, **given):
        own = Dictionary.load(str(words / "dict.txt"))
        dictionary = own if dictionary is None else dictionary
        task = types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
        sizes = (
            SIZES
            if "moe" in arch
            else {name: value for name, value in SIZES.items() if not name.startswith("moe_")}
        )
        if "moe_freq" in given or "moe_start_layer" in given:
            sizes = {k: v for k, v in sizes.items() if k != "moe_layers"}
        args = make_config(arch, **{**sizes, **given})
        model = build_model(args, task)
        with torch.no_grad():
            for layer in getattr(model.decoder, "moe_layers", ()):
                for parameter in layer.gate.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(3)  # fresh scores are nearly equal
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.set_num_updates(updates)
        cfg = types.SimpleNamespace(
            model=args, task=types.SimpleNamespace(add_bos_token=start == "<s>")
        )
        return TrainedModel(model.eval(), cfg, dictionary, TextCodec(words, own), words)

    return make


@pytest.fixture
def exported(tmp_path, transformers):
    """Export a model in our format and load it in transformers."""

    def load(trained, loading=None, **given):
        folder = tmp_path / "exported"
        export(trained, str(folder), **{"format": "evomoe", **given})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, **(loading or {})
        )
        return model.eval()

    return load
