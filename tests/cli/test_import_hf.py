"""`evomoe import-hf`, as typed."""

import json
import os
import re

import pytest
import torch
from fairseq.data import Dictionary

from evomoe_plugin.checkpoint import atomic_files
from evomoe_plugin.cli import main
from tests.checkpoint.test_tensor_files import written
from tests.data.test_dictionary import BAD_DICTIONARIES
from tests.evolve.dense_models import build

V, D, F, LENGTH = 12, 8, 20, 16


@pytest.fixture
def folder(tmp_path):
    """A model as transformers would have saved it, without transformers."""
    shapes = {
        "wte.weight": (V, D),
        "wpe.weight": (LENGTH, D),
        "ln_f.weight": (D,),
        "ln_f.bias": (D,),
    }
    for n in range(2):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{n}.{norm}.weight": (D,), f"h.{n}.{norm}.bias": (D,)}
        for name, into, out in (
            ("attn.c_attn", D, 3 * D),
            ("attn.c_proj", D, D),
            ("mlp.c_fc", D, F),
            ("mlp.c_proj", F, D),
        ):
            shapes |= {f"h.{n}.{name}.weight": (into, out), f"h.{n}.{name}.bias": (out,)}
        shapes[f"h.{n}.attn.bias"] = (1, 1, LENGTH, LENGTH)  # the mask of old files
    path = tmp_path / "hf"
    path.mkdir()
    written(path / "model.safetensors", {k: torch.randn(shape) for k, shape in shapes.items()})
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "n_layer": 2,
                "n_head": 2,
                "n_embd": D,
                "n_inner": F,
                "n_positions": LENGTH,
                "vocab_size": V,
                "eos_token_id": V - 1,
            }
        )
    )
    return path


def test_a_folder_of_checkpoint_and_dictionary(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["import-hf", str(folder), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "model.pt: 2 layers of width 8, 16 token ids, gelu_accurate" in printed
    assert "--dict DATA/dict.txt" in printed
    dictionary = Dictionary.load(str(out / "dict.txt"))
    assert dictionary.symbols[4:] == [str(n) for n in range(V)]
    state = torch.load(out / "model.pt", weights_only=True)
    model = build(state, dictionary)
    with torch.no_grad():
        assert model(torch.arange(4, V + 4).unsqueeze(0))[0].shape == (1, V, V + 4)
    moe = tmp_path / "moe.pt"
    assert (
        main(
            [
                "upcycle",
                str(out / "model.pt"),
                str(moe),
                "--moe-gate",
                "hash",
                "--moe-expert-count",
                "2",
                "--moe-hash",
                "random",
            ]
        )
        == 0
    )


def test_nothing_is_overwritten_and_nothing_half_written(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dict.txt").write_text("precious 1\n")
    assert main(["import-hf", str(folder), str(out)]) == 2
    assert "exists already: give another path, or --overwrite" in capsys.readouterr().err
    assert os.listdir(out) == ["dict.txt"]
    assert main(["import-hf", str(folder), str(out), "--overwrite"]) == 0
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["import-hf", str(folder), str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cut short" in error
    assert not (tmp_path / "other").exists()


class FullDisk:
    """`open` where the disk is full once the model is written."""

    def __init__(self, name):
        self.name = name

    def __call__(self, path, mode="r", **given):
        if self.name in str(path) and "w" in mode:
            raise OSError(28, "No space left on device")
        return open(path, mode, **given)


@pytest.mark.parametrize("full", ["dict.txt", "model.pt"])
def test_two_files_or_none(folder, tmp_path, capsys, monkeypatch, full):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("dict.txt", "model.pt"):
        (out / name).write_text("precious")
    monkeypatch.setattr(atomic_files, "open", FullDisk(full), raising=False)
    assert main(["import-hf", str(folder), str(out), "--overwrite"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(
        rf"{full}: No space left on device \(\d+ MiB free\); nothing is changed", error
    )
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "dict.txt": "precious",
        "model.pt": "precious",
    }


def test_a_write_that_fails_inside_torch(folder, tmp_path, capsys, monkeypatch):
    """torch reports a full disk as a RuntimeError."""

    def fail(state, file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None

    monkeypatch.setattr(torch, "save", fail)
    assert main(["import-hf", str(folder), str(tmp_path / "out")]) == 1
    assert re.search(
        r"model.pt: No space left on device \(\d+ MiB free\); nothing is changed",
        capsys.readouterr().err,
    )
    assert not os.listdir(tmp_path / "out")


def test_a_place_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (tmp_path / "file", "is no folder"),
        (tmp_path / "file" / "deep" / "out", "is no folder"),
    ):
        assert main(["import-hf", str(folder), str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    (tmp_path / "taken" / "model.pt").mkdir(parents=True)
    assert main(["import-hf", str(folder), str(tmp_path / "taken"), "--overwrite"]) == 2
    assert "exists already, and is no file" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), BAD_DICTIONARIES)
def test_a_dictionary_that_is_none(folder, tmp_path, capsys, content, message):
    (tmp_path / "dict.txt").write_bytes(content)
    assert (
        main(
            ["import-hf", str(folder), str(tmp_path / "out"), "--dict", str(tmp_path / "dict.txt")]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--dict {tmp_path}/dict.txt: {message}" in error
    assert not (tmp_path / "out").exists()


def test_the_order_of_a_prepared_dictionary(folder, tmp_path):
    rows = [3, 1, 2, 0, *range(4, V)]
    (tmp_path / "dict.txt").write_text("".join(f"{n} 5\n" for n in rows))
    for name, given in (("own", ()), ("given", ("--dict", str(tmp_path / "dict.txt")))):
        assert main(["import-hf", str(folder), str(tmp_path / name), *given]) == 0
    own, given = (
        torch.load(tmp_path / name / "model.pt", weights_only=True)["model"][
            "decoder.embed_tokens.weight"
        ]
        for name in ("own", "given")
    )
    assert torch.equal(given[4:], own[4:][rows])
    assert torch.equal(own[[0, 1, 3, 4 + V - 1]], own[:1].expand(4, -1))  # those without a token
    assert not torch.equal(own[0], own[2])
    assert (tmp_path / "given" / "dict.txt").read_text() == (tmp_path / "dict.txt").read_text()
