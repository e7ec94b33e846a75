"""`evomoe upcycle` and `evomoe import-hf`, as typed: one line each, nothing half-written."""

import os

import pytest
import torch

from evomoe_plugin.cli import main
from tests.checkpoint.test_reading import Program
from tests.evolve.dense_models import save_dense

GATE = ("--moe-gate", "top_p", "--moe-expert-count", "2")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "dense.pt")


def refused(capsys, *argv) -> str:
    assert main(list(map(str, argv))) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert not captured.out
    return captured.err


def test_what_it_says_and_writes(dense, tmp_path, capsys):
    path = tmp_path / "moe.pt"
    assert main(["upcycle", str(dense), str(path), *GATE, "--moe-freq", "4"]) == 0
    told = capsys.readouterr().out
    assert "moe.pt: 1 of 4 layers with 2 experts of width 24 each, by copy" in told
    assert "logits: equal to the dense model's: the weights of the picks sum to 1" in told
    state = torch.load(path, weights_only=True)  # plain data
    assert state["cfg"]["model"]["_name"] == "transformer_lm_moe"
    assert state["cfg"]["model"]["moe_freq"] == 4
    assert os.listdir(tmp_path) == ["moe.pt"]


def test_an_existing_file_is_kept_unless_told_otherwise(dense, tmp_path, capsys):
    path = tmp_path / "moe.pt"
    path.write_text("precious")
    assert f"MOE {path}: exists already" in refused(capsys, "upcycle", dense, path, *GATE)
    assert path.read_text() == "precious"
    assert main(["upcycle", str(dense), str(path), *GATE, "--overwrite"]) == 0
    capsys.readouterr()
    assert "moe" in "".join(torch.load(path, weights_only=True)["model"])
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "exists already, and is no file" in refused(
        capsys, "upcycle", dense, folder, *GATE, "--overwrite")
    assert "there is no folder" in refused(
        capsys, "upcycle", dense, tmp_path / "gone" / "moe.pt", *GATE)


@pytest.mark.parametrize(("given", "message"), [
    (("--decoder-embed-dim", "32"), "--decoder-embed-dim 32: the dense checkpoint"),
    (("--no-scale-embedding",), "--no-scale-embedding True: the dense checkpoint"),
    (("--method", "slice", "--moe-expert-ffn-dim", "7"), "--moe-expert-ffn-dim 7: the dense"),
    (("--method", "half"), "--method half: one of"),
    (("--moe-top-k", "9", "--moe-top-p", "0"), "--moe-top-k 9: an MoE layer has 2 candidates"),
    (("--data", "nowhere"), "--data nowhere: has no dict.txt"),
])
def test_one_line_and_nothing_written(dense, tmp_path, capsys, given, message):
    assert message in refused(capsys, "upcycle", dense, tmp_path / "moe.pt", *GATE, *given)
    assert not os.listdir(tmp_path)


def test_files_that_are_no_dense_checkpoint(dense, tmp_path, capsys):
    out = tmp_path / "out.pt"
    torch.save({"model": {}, "cfg": Program(tmp_path / "trace")}, tmp_path / "bad.pt")
    assert "could run a program: refused" in refused(
        capsys, "upcycle", tmp_path / "bad.pt", out, *GATE)
    (tmp_path / "cut.pt").write_bytes(dense.read_bytes()[:5000])
    assert "cut short" in refused(capsys, "upcycle", tmp_path / "cut.pt", out, *GATE)
    assert "there is no such file" in refused(capsys, "upcycle", tmp_path / "gone.pt", out, *GATE)
    assert main(["upcycle", str(dense), str(tmp_path / "moe.pt"), *GATE]) == 0
    capsys.readouterr()
    assert "is an MoE model already" in refused(
        capsys, "upcycle", tmp_path / "moe.pt", out, *GATE)
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "cut.pt", "moe.pt"]
