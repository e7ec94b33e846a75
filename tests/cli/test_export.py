"""`evomoe export`: from a checkpoint file to a folder, or one line."""

import json

import pytest
import torch

from evomoe_plugin.cli import main
from tests.cli.checkpoints import save_checkpoint
from tests.export.conftest import make_trained, transformers, words  # noqa: F401  fixtures
from tests.models.conftest import make_config  # noqa: F401  a fixture


@pytest.fixture
def trained(make_trained):  # noqa: F811
    return make_trained(20, moe_gate="dense_to_sparse")


@torch.no_grad()
def test_a_checkpoint_becomes_a_folder(trained, tmp_path, transformers, capsys):  # noqa: F811
    path = save_checkpoint(trained, tmp_path / "checkpoint.pt")
    out = tmp_path / "deep" / "exported"
    assert main(["export", str(path), str(out)]) == 0
    said = capsys.readouterr().out
    assert f"AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)" in said
    assert "format: evomoe, with its code, because gpt2 has no --moe-layers (layers with 5" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    x = torch.randint(4, 40, (2, 9))
    assert torch.allclose(model(x).logits, trained.model(x)[0], atol=1e-5)
    assert json.loads((out / "config.json").read_text())["routing"]["temperature"] < 2


def test_a_class_of_transformers_is_taken_and_named(
    make_trained,  # noqa: F811
    tmp_path,
    transformers,  # noqa: F811
    capsys,
):
    trained = make_trained(20, arch="causal_lm_moe", moe_gate="gshard", moe_layers="0,1,2")
    path = save_checkpoint(trained, tmp_path / "checkpoint.pt")
    out = tmp_path / "exported"
    assert main(["export", str(path), str(out), "--max-shard-size", "20KB"]) == 0
    said = capsys.readouterr().out
    assert "format: mixtral, a class of transformers\n" in said and "trust_remote_code" not in said
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (out / "model.safetensors.index.json").exists()
    capsys.readouterr()
    for arguments, message in (
        (["--format", "olmoe"], "--format olmoe: it has no --decoder-qk-norm none: give --format"),
        (["--format", "gpt5"], "--format gpt5: one of: auto, llama,"),
        (["--max-shard-size", "big"], "--max-shard-size big: give a size, such as 5GB or 200MB"),
    ):
        assert main(["export", str(path), str(tmp_path / "other"), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
        assert not (tmp_path / "other").exists()


def test_bad_input_is_one_line(trained, tmp_path, capsys):
    path = save_checkpoint(trained, tmp_path / "checkpoint.pt")
    there = tmp_path / "there"
    there.write_text("mine")
    for arguments, message in (
        ([str(path), str(there)], f"DIR {there}: exists already: give another path"),
        ([str(path), str(there / "out")], f"DIR {there}/out: {there} is no folder"),
        (["absent.pt", str(tmp_path / "out")], "CKPT absent.pt: there is no such file"),
        ([str(path), str(tmp_path / "out"), "--data", "absent"], "--data absent: has no dict.txt"),
        ([str(there), str(tmp_path / "out")], "cannot be read"),
    ):
        assert main(["export", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
    assert there.read_text() == "mine"
    assert not (tmp_path / "out").exists()
