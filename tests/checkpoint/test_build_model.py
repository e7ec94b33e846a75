"""Checkpoints whose own configuration cannot work: one line that names the file."""

import os

import pytest
import torch

from evomoe_plugin.cli import main
from tests.data.test_dictionary import BAD_DICTIONARIES
from tests.evolve.dense_models import dictionary_of, save_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint, and the folder with its dictionary."""
    folder = tmp_path_factory.mktemp("dense")
    dictionary_of().save(str(folder / "dict.txt"))
    return save_dense(folder / "dense.pt", data=str(folder))


def verbs(path, out):
    return {
        "upcycle": ["upcycle", path, out, "--moe-gate", "top_p", "--moe-expert-count", "2"],
        "generate": ["generate", "--path", path, "--prompt", "w1", "--cpu"],
        "export": ["export", path, out],
    }


def refused(capsys, arguments) -> str:
    assert main(list(map(str, arguments))) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


def option(name, value):
    return lambda state: state["cfg"]["model"].update({name: value})


def rename(state):
    state["model"] = dict(enumerate(state["model"].values()))


def reshape(state):
    name = "decoder.layers.2.fc2.weight"
    state["model"][name] = state["model"][name][None]


CANNOT = "no model can be built from the options and weights that it holds"
ALL, BUILDERS = ("upcycle", "generate", "export"), ("generate", "export")
SPOILT = {
    "a string as cfg.model": (
        lambda s: s["cfg"].update(model="transformer_lm"),
        ALL,
        "its options (cfg) name no model",
    ),
    "a list as cfg": (lambda s: s.update(cfg=[1, 2]), ALL, "is no checkpoint of fairseq"),
    "names that are numbers": (rename, ALL, "0 of its 'model' is no tensor"),
    "heads that do not divide": (option("decoder_attention_heads", 3), ALL, CANNOT),
    "no heads": (option("decoder_attention_heads", 0), ALL, CANNOT),
    "layers in words": (option("decoder_layers", "four"), ALL, CANNOT),
    "a width that is a list": (option("decoder_embed_dim", [16]), ALL, ""),
    "an interpolation of nothing": (
        option("activation_fn", "${nowhere.at.all}"),
        ALL,
        "InterpolationKeyError",
    ),
    "an activation of its own": (option("activation_fn", "mine"), ALL, ""),
    "a name that is a list": (option("_name", ["transformer_lm"]), ALL, ""),
    "weights of another shape": (reshape, ("upcycle",), "fc2.weight has the shape (1, 16, 24)"),
    "and for the others": (reshape, BUILDERS, "does not fit the model"),
    "no task": (lambda s: s["cfg"].pop("task"), BUILDERS, "was trained with the task None"),
    "a string as the task": (lambda s: s["cfg"].update(task="language_modeling"), BUILDERS, CANNOT),
    "no common": (lambda s: s["cfg"].pop("common"), ("upcycle",), CANNOT),
    "no optimization": (lambda s: s["cfg"].pop("optimization"), ("upcycle",), CANNOT),
}


@pytest.mark.parametrize("spoil, concerned, message", SPOILT.values(), ids=SPOILT)
def test_one_line_from_every_verb(dense, tmp_path, capsys, spoil, concerned, message):
    state = torch.load(dense, weights_only=False)
    spoil(state)
    path = tmp_path / "bad.pt"
    torch.save(state, path)
    for name, arguments in verbs(path, tmp_path / "out").items():
        if name in concerned:
            out = refused(capsys, arguments)
            assert message in out and ("bad.pt" in out or not message)
    assert os.listdir(tmp_path) == ["bad.pt"]


@pytest.mark.parametrize(("content", "message"), BAD_DICTIONARIES[:1])
def test_a_dictionary_that_is_none(dense, tmp_path, capsys, content, message):
    (tmp_path / "dict.txt").write_bytes(content)
    for arguments in verbs(dense, tmp_path / "out").values():
        out = refused(capsys, [*arguments, "--data", tmp_path])
        assert f"--data {tmp_path}/dict.txt: {message}" in out
    assert os.listdir(tmp_path) == ["dict.txt"]
