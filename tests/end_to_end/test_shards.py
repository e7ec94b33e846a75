"""Checkpoints of `--use-sharded-state`, given to the verbs that read checkpoints."""

import shutil

import pytest
import torch

from evomoe_plugin.checkpoint.tensor_files import read_safetensors
from evomoe_plugin.cli import main

pytestmark = pytest.mark.slow
TWO = (
    "--ddp-backend",
    "fully_sharded",
    "--distributed-world-size",
    "2",
    "--min-params-to-wrap",
    "0",
    "--max-update",
    "3",
    "--disable-validation",
)
NAMES = ("checkpoint_last.pt", "checkpoint_last-shard0.pt", "checkpoint_last-shard1.pt")


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """The same run, saved as one file and as shards."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "whole", *TWO)
    train(folder / "sharded", *TWO, "--use-sharded-state")
    assert {path.name for path in (folder / "sharded").glob("*last*")} == set(NAMES[1:])
    return folder


def told(capsys, *argv) -> str:
    assert main(list(map(str, argv))) == 0
    return capsys.readouterr().out


def test_generate_takes_shards(runs, capsys):
    prompt = ("--prompt", "w1 w2", "--prompt", "w30", "--max-new-tokens", "8", "--cpu")
    wanted = told(capsys, "generate", "--path", runs / "whole/checkpoint_last.pt", *prompt)
    for name in NAMES:
        given = told(capsys, "generate", "--path", runs / "sharded" / name, *prompt)
        assert given == wanted and "w1 w2 w" in given


def test_export_takes_shards(runs, tmp_path):
    paths = [runs / "whole/checkpoint_last.pt", *(runs / "sharded" / name for name in NAMES[:2])]
    folders = [tmp_path / str(n) for n in range(len(paths))]
    for path, folder in zip(paths, folders, strict=True):
        assert main(["export", str(path), str(folder)]) == 0
    wanted, *given = [read_safetensors("", str(folder / "model.safetensors")) for folder in folders]
    for tensors in given:
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_shards_that_are_not_all_there(runs, tmp_path, capsys, verb):
    shutil.copy(runs / "sharded" / NAMES[1], tmp_path / NAMES[1])
    path, out = tmp_path / NAMES[0], tmp_path / "out"
    given = ["--path", path, "--prompt", "w1"] if verb == "generate" else [path, out]
    assert main([verb, *map(str, given)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert f"{path}: shard 1 of 2 is missing" in captured.err
    assert not out.exists()


def test_upcycle_takes_shards(runs, run_command, data_bin, tmp_path, capsys):
    """Of a dense model: the same experts as from one file."""
    weights = []
    for name, given in (("whole", ()), ("sharded", ("--use-sharded-state",))):
        run_command(
            "train",
            data_bin,
            "--user-dir",
            "evomoe_plugin",
            "--task",
            "language_modeling",
            "--arch",
            "transformer_lm",
            "--decoder-layers",
            "2",
            "--decoder-embed-dim",
            "32",
            "--decoder-ffn-embed-dim",
            "64",
            "--decoder-attention-heads",
            "2",
            "--decoder-input-dim",
            "32",
            "--decoder-output-dim",
            "32",
            "--tokens-per-sample",
            "32",
            "--batch-size",
            "4",
            "--optimizer",
            "adam",
            "--lr",
            "0.003",
            "--num-workers",
            "0",
            "--no-epoch-checkpoints",
            "--seed",
            "7",
            "--save-dir",
            tmp_path / name,
            *TWO,
            *given,
        )
        out = tmp_path / f"{name}.pt"
        told(
            capsys,
            "upcycle",
            tmp_path / name / "checkpoint_last.pt",
            out,
            "--moe-gate",
            "gshard",
            "--moe-expert-count",
            "2",
        )
        weights.append(torch.load(out, weights_only=True)["model"])
    assert "decoder.layers.1.moe.experts.fc1_weight" in weights[0]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
