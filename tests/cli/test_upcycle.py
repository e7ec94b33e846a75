"""`evomoe upcycle` and `evomoe import-hf`, as typed: one line each, nothing half-written."""

import os
import re

import pytest
import torch
from fairseq.data.indexed_dataset import make_builder

from evomoe_plugin.cli import main
from tests.checkpoint.test_reading import Program
from tests.evolve.dense_models import VOCABULARY, dictionary_of, save_dense

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
    out = capsys.readouterr().out
    assert "moe.pt: 1 of 4 layers with 2 experts of width 24 each, by copy" in out
    assert re.search(
        r"^logits equal to the dense model's \(max difference \S+ on 64 random "
        r"tokens\)$",
        out,
        re.M,
    )
    state = torch.load(path, weights_only=True)  # plain data
    assert state["cfg"]["model"]["_name"] == "transformer_lm_moe"
    assert state["cfg"]["model"]["moe_freq"] == 4
    assert os.listdir(tmp_path) == ["moe.pt"]


def test_an_existing_file_is_kept_without_overwrite(dense, tmp_path, capsys):
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
        capsys, "upcycle", dense, folder, *GATE, "--overwrite"
    )
    assert "there is no folder" in refused(
        capsys, "upcycle", dense, tmp_path / "gone" / "moe.pt", *GATE
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--decoder-embed-dim", "32"), "--decoder-embed-dim 32: the dense checkpoint"),
        (("--no-scale-embedding",), "--no-scale-embedding True: the dense checkpoint"),
        (("--method", "slice", "--moe-expert-ffn-dim", "7"), "--moe-expert-ffn-dim 7: the dense"),
        (("--method", "half"), "--method half: one of"),
        (("--moe-top-k", "9", "--moe-top-p", "0"), "--moe-top-k 9: an MoE layer has 2 candidates"),
        (("--data", "nowhere"), "--data nowhere: has no dict.txt"),
        (("--seed", 2**70), f"--seed {2**70}: give 0 to 4294967295"),
        (("--seed", "-1"), "--seed -1: give 0 to 4294967295"),
        (("--max-update", "-1"), "--max-update -1: give 1 or more, or leave it out"),
        (("--tokens-per-sample", "0"), "--tokens-per-sample 0: give 1 or more"),
        (("--tokens-per-sample", "-1"), "--tokens-per-sample -1: give 1 or more"),
        (("--dropout", "7"), "--dropout 7.0: it is a probability"),
        (
            ("--method", "mask", "--moe-spawn-updates", "5"),
            "--method mask: --moe-spawn-updates makes",
        ),
    ],
)
def test_one_line_and_nothing_written(dense, tmp_path, capsys, given, message):
    assert message in refused(capsys, "upcycle", dense, tmp_path / "moe.pt", *GATE, *given)
    assert not os.listdir(tmp_path)


def test_files_that_are_no_dense_checkpoint(dense, tmp_path, capsys):
    out = tmp_path / "out.pt"
    torch.save({"model": {}, "cfg": Program(tmp_path / "trace")}, tmp_path / "bad.pt")
    assert "could run a program: refused" in refused(
        capsys, "upcycle", tmp_path / "bad.pt", out, *GATE
    )
    (tmp_path / "cut.pt").write_bytes(dense.read_bytes()[:5000])
    assert "cut short" in refused(capsys, "upcycle", tmp_path / "cut.pt", out, *GATE)
    assert "there is no such file" in refused(capsys, "upcycle", tmp_path / "gone.pt", out, *GATE)
    assert main(["upcycle", str(dense), str(tmp_path / "moe.pt"), *GATE]) == 0
    capsys.readouterr()
    assert "is an MoE model already" in refused(capsys, "upcycle", tmp_path / "moe.pt", out, *GATE)
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "cut.pt", "moe.pt"]


@pytest.fixture
def data(tmp_path):
    """A data set of three sentences, and a dense checkpoint with positions for 32 tokens."""
    folder = tmp_path / "data"
    folder.mkdir()
    dictionary_of().save(str(folder / "dict.txt"))

    def write(*lengths):
        builder = make_builder(str(folder / "valid.bin"), impl="mmap", vocab_size=VOCABULARY)
        for length in lengths:
            builder.add_item(torch.arange(4, 4 + length))
        builder.finalize(str(folder / "valid.idx"))

    write(30, 20, 10)
    return folder, write


def test_rows_that_would_be_left_out_of_the_evaluation(dense, data, tmp_path, capsys):
    """They had the perplexity of what was left: 1, where nothing was."""
    folder, _ = data
    out = tmp_path / "moe.pt"
    given = (dense, out, *GATE, "--data", folder, "--tokens-per-sample")
    for length in (33, 64, 10**6):
        assert (
            f"--tokens-per-sample {length}: {dense} has positions for 32 tokens, longer rows "
            "would be left out of the evaluation: give 1 to 32"
        ) in refused(capsys, "upcycle", *given, length)
        assert not out.exists()
    assert main(["upcycle", *map(str, given), "32"]) == 0
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"dense ([\d.]+), MoE ([\d.]+)", out).groups())
    assert before == pytest.approx(after, rel=1e-4) and before > 10


@pytest.mark.parametrize(
    ("suffix", "keep"),
    [
        ("bin", 0),
        ("bin", 50),
        ("bin", -2),
        ("idx", 0),
        ("idx", 5),
        ("idx", 20),
        ("idx", -3),
    ],
)
def test_data_that_is_cut_short(dense, data, tmp_path, capsys, suffix, keep):
    folder, _ = data
    file = folder / f"valid.{suffix}"
    file.write_bytes(file.read_bytes()[:keep])
    out = refused(capsys, "upcycle", dense, tmp_path / "moe.pt", *GATE, "--data", folder)
    assert f"--subset valid: {folder}/valid.idx and {folder}/valid.bin hold nothing" in out
    assert not (tmp_path / "moe.pt").exists()


def test_data_without_a_sentence(dense, data, tmp_path, capsys):
    folder, write = data
    write()
    out = refused(capsys, "upcycle", dense, tmp_path / "moe.pt", *GATE, "--data", folder)
    assert "--subset valid: " in out and "hold" in out
