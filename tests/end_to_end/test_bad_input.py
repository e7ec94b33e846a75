"""What a user sees on a mistake: one line, before the first step; and nothing is lost."""

import sys

import pytest
import torch
from fairseq.data import Dictionary
from fairseq_cli import eval_lm
from fairseq_cli import train as fairseq_train

from tests.end_to_end.conftest import TINY
from tests.end_to_end.runs import load


def run(monkeypatch, capsys, command, *arguments) -> tuple[int, str]:
    """Exit status and standard error of a command, run in this process."""
    argv = [
        "fairseq",
        *map(str, arguments),
        "--user-dir",
        "evomoe_plugin",
        "--task",
        "language_modeling",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        command.cli_main()
    return end.value.code, capsys.readouterr().err


def common(data_bin, save_dir):
    return (
        data_bin,
        *TINY,
        "--criterion",
        "moe_cross_entropy",
        "--tokens-per-sample",
        "32",
        "--batch-size",
        "4",
        "--optimizer",
        "adam",
        "--lr",
        "0.003",
        "--max-update",
        "3",
        "--num-workers",
        "0",
        "--save-dir",
        save_dir,
    )


@pytest.fixture
def other_dictionary(data_bin, tmp_path):
    """The data with a longer dictionary."""
    folder = tmp_path / "other-data"
    folder.mkdir()
    for path in data_bin.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "dict.txt").unlink()
    dictionary = Dictionary.load(str(data_bin / "dict.txt"))
    for n in range(24):
        dictionary.add_symbol(f"new{n}")
    dictionary.save(str(folder / "dict.txt"))
    return folder


@pytest.mark.parametrize(
    "given, message",
    [
        (("--moe-gate", "dense2sparse"), "--moe-gate dense2sparse: unknown gate; one of: base"),
        (("--moe-freq", "9", "--distributed-world-size", "2"), "--moe-freq 9: gives no MoE layer"),
        (("--moe-gate-loss-wt", "-1"), "--moe-gate-loss-wt -1.0: give a weight of 0 or more"),
        (("--scale-attn",), "--scale-attn True: not supported"),
    ],
)
def test_bad_options_end_in_one_line(data_bin, tmp_path, monkeypatch, capsys, given, message):
    status, error = run(monkeypatch, capsys, fairseq_train, *common(data_bin, tmp_path), *given)
    assert status == 2
    assert f"error: {message}" in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.pt"))


def test_missing_data(tmp_path, monkeypatch, capsys):
    status, error = run(monkeypatch, capsys, fairseq_train, *common(tmp_path / "nowhere", tmp_path))
    assert status == 2
    assert "nowhere: no such folder; give a folder made by `evomoe prepare`" in error


def test_a_dictionary_that_does_not_fit_the_checkpoint(
    data_bin, other_dictionary, train, tmp_path, monkeypatch, capsys
):
    save_dir = tmp_path / "run"
    train(save_dir, "--max-update", "1")
    message = "error: DATA dict.txt: has 88 token ids, the checkpoint has 64"
    status, error = run(monkeypatch, capsys, fairseq_train, *common(other_dictionary, save_dir))
    assert (status, "Traceback" in error) == (2, False)
    assert message in error
    status, error = run(
        monkeypatch,
        capsys,
        eval_lm,
        other_dictionary,
        "--path",
        save_dir / "checkpoint_last.pt",
        "--gen-subset",
        "valid",
        "--tokens-per-sample",
        "32",
    )
    assert (status, "Traceback" in error) == (2, False)
    assert message in error


def test_errors_of_commands_that_do_not_catch_them_are_one_line(data_bin, run_command, tmp_path):
    (tmp_path / "text.pt").write_text("text")
    options = ("--user-dir", "evomoe_plugin", "--task", "language_modeling")
    run = run_command("generate", data_bin, "--path", tmp_path / "text.pt", *options, check=False)
    assert run.status == 1 and "Traceback" not in run.output
    assert "text.pt: cannot be read" in run.output.splitlines()[-1]


@pytest.mark.parametrize(
    "value, status, message",
    [
        (
            float("nan"),
            2,
            "bad.pt: decoder.layers.1.moe.gate.scorer.weight has 128 NaN/Inf values: take an",
        ),
        # Its products overflow.
        (3e38, 1, "error: decoder.layers.1.moe: gate logits are NaN/Inf for"),
    ],
)
def test_nan_is_named_and_leaves_the_last_good_checkpoint(
    data_bin, train, tmp_path, monkeypatch, capsys, value, status, message
):
    train(tmp_path, "--max-update", "1")
    good = tmp_path / "checkpoint_last.pt"
    before = good.read_bytes()
    bad = load(good)
    bad["model"]["decoder.layers.1.moe.gate.scorer.weight"].fill_(value)
    torch.save(bad, tmp_path / "bad.pt")
    found, error = run(
        monkeypatch,
        capsys,
        fairseq_train,
        *common(data_bin, tmp_path),
        "--restore-file",
        tmp_path / "bad.pt",
    )
    assert found == status
    assert message in error
    assert "Traceback" not in error
    assert good.read_bytes() == before
    kept = ["bad.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    if status == 1:
        kept.append("crash.pt")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == kept
