"""Evaluation reads every layout; what cannot be read or does not fit is said in one line."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from fairseq import options

ROOT = Path(__file__).parents[2]
FSDP = ("--ddp-backend", "fully_sharded")
SHARDED = (*FSDP, "--use-sharded-state", "--min-params-to-wrap", "0")


@pytest.fixture(scope="module")
def trained(module_runs):
    whole = module_runs.train("whole", "--update-freq", "2", validate=True)
    sharded = module_runs.train("sharded", *SHARDED, world=2, validate=True)
    assert whole.status == sharded.status == 0
    return whole, sharded


def evaluate(runs, caplog, path, *more):
    caplog.clear()
    status = runs.run(
        "eval_lm",
        runs.data,
        "--path",
        path,
        "--gen-subset",
        "valid",
        "--batch-size",
        "4",
        "--tokens-per-sample",
        "32",
        *more,
    )
    found = re.search(r"Loss \(base 2\): ([\d.]+)", caplog.text)
    return status, found and float(found[1])


def test_shards_evaluate_as_one_file_and_as_in_training(trained, module_runs, caplog):
    whole, sharded = trained
    caplog.set_level("INFO")
    status, one = evaluate(module_runs, caplog, whole.folder / "checkpoint_last.pt")
    assert status == 0
    status, other = evaluate(module_runs, caplog, sharded.folder / "checkpoint_last.pt")
    assert status == 0
    assert other == pytest.approx(one, abs=2e-3)
    validated = [line["valid_loss"] for line in whole.log if "valid_loss" in line]
    assert float(validated[-1]) == pytest.approx(one, abs=2e-3)


@pytest.mark.slow
def test_a_missing_shard_is_named(trained, module_runs, caplog, capsys):
    _, sharded = trained
    shard = sharded.folder / "checkpoint_last-shard1.pt"
    shard.rename(shard.with_suffix(".away"))
    try:
        status, _ = evaluate(module_runs, caplog, sharded.folder / "checkpoint_last.pt")
    finally:
        shard.with_suffix(".away").rename(shard)
    assert status == 2
    assert f"shard 1 of 2 is missing: {shard}" in capsys.readouterr().err


def test_a_path_that_does_not_exist_is_named(module_runs, caplog, capsys):
    status, _ = evaluate(module_runs, caplog, "nowhere.pt")
    assert status == 2
    assert capsys.readouterr().err.endswith(
        "error: --path nowhere.pt: there is no such checkpoint\n"
    )


def test_a_restore_file_that_does_not_exist_is_named(module_runs, capsys):
    assert module_runs.train("none", "--restore-file", "nowhere.pt").status == 2
    assert "error: --restore-file nowhere.pt: there is no" in capsys.readouterr().err


def test_another_number_of_shards_is_refused_with_the_remedy(trained, runs, capsys):
    _, sharded = trained
    result = runs.train(
        "one", *SHARDED, "--restore-file", sharded.folder / "checkpoint_last.pt", updates=8
    )
    assert result.status == 2
    assert (
        "error: --distributed-world-size 1: the checkpoint has 2 shards: give 2, or leave "
        "--use-sharded-state out"
    ) in capsys.readouterr().err


def test_one_file_is_refused_where_shards_are_asked_for(trained, runs, capsys):
    whole, _ = trained
    result = runs.train(
        "one", *SHARDED, "--restore-file", whole.folder / "checkpoint_last.pt", updates=8
    )
    assert result.status == 2
    assert "is one file for all ranks: resume without --use-sharded-state" in (
        capsys.readouterr().err
    )


def test_a_model_of_another_size_is_refused(trained, runs, capsys):
    whole, _ = trained
    result = runs.train(
        "wide",
        "--decoder-ffn-embed-dim",
        "128",
        "--restore-file",
        whole.folder / "checkpoint_last.pt",
    )
    error = capsys.readouterr().err
    assert result.status == 2
    assert "does not fit the model: size mismatch for decoder.layers.0.fc1.weight" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "command, more",
    [
        ("validate", ("--valid-subset", "valid")),
        pytest.param(
            "generate",
            (
                "--task",
                "language_modeling",
                "--gen-subset",
                "valid",
                "--beam",
                "1",
                "--prefix-size",
                "4",
                "--max-len-b",
                "40",
                "--skip-invalid-size-inputs-valid-test",
                "--sample-break-mode",
                "eos",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_other_commands_read_shards(trained, module_runs, command, more):
    _, sharded = trained
    path = sharded.folder / "checkpoint_last.pt"
    assert (
        module_runs.run(command, module_runs.data, "--path", path, "--batch-size", "4", *more) == 0
    )


@pytest.mark.slow
def test_the_perplexity_is_printed(trained, module_runs):
    """iopath keeps upstream's command silent, which only a process of its own shows."""
    whole, _ = trained
    status, out, err = module_runs.output(
        "eval_lm",
        module_runs.data,
        "--user-dir",
        "evomoe_plugin",
        "--gen-subset",
        "valid",
        "--path",
        whole.folder / "checkpoint_last.pt",
        "--batch-size",
        "4",
        "--tokens-per-sample",
        "32",
        cwd=ROOT,
    )
    assert status == 0, err
    assert len(re.findall(r"Perplexity: \d{2,}\.", out + err)) == 1


BAD = [
    (
        ("--context-window", "32"),
        "--context-window 32: is a part of --tokens-per-sample (32): give less than that",
    ),
    (("--context-window", "-1"), "--context-window -1: is a part of"),
    (("--model-overrides", "moe=1"), "--model-overrides moe=1: is no dictionary of Python"),
    (("--shard-id", "1"), "--shard-id 1: give 0 to 0, less than --num-shards"),
    (
        ("--num-shards", "2", "--distributed-world-size", "2"),
        "--num-shards 2: the 2 ranks share the data already: leave it out",
    ),
    (
        ("--output-word-stats", "--distributed-world-size", "2"),
        "--output-word-stats with 2 ranks: each has a share of the words: start one process",
    ),
    (
        ("--moe-expert-parallel-size", "2"),
        "--moe-expert-parallel-size 2: does not divide the 1 ranks",
    ),
    (("--moe-expert-parallel-size", "0"), "--moe-expert-parallel-size 0: give 1 or more"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[m[:32] for _, m in BAD])
def test_bad_options_are_refused_in_one_line(module_runs, caplog, capsys, given, message):
    status, _ = evaluate(module_runs, caplog, "not_read.pt", *given)
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert lines[-1].startswith(f"error: {message}")


def test_samples_longer_than_the_model_are_no_result(trained, module_runs, caplog, capsys):
    """Where all are, upstream prints a perplexity of 1."""
    path = trained[0].folder / "checkpoint_last.pt"
    status, loss = evaluate(module_runs, caplog, path, "--tokens-per-sample", "64")
    assert (status, loss) == (1, None)
    assert re.search(
        r"^error: \d+ of \d+ samples, with \d+ of \d+ tokens, are longer than 32 tokens; at most "
        r"10% of a data set may be left out: give --tokens-per-sample 32 or less",
        capsys.readouterr().err,
        re.M,
    )


def test_a_context_window_gives_one_number(trained, module_runs, caplog):
    caplog.set_level("INFO")
    path = trained[0].folder / "checkpoint_last.pt"
    found = {
        evaluate(module_runs, caplog, path, "--context-window", "16", "--num-workers", workers)
        for workers in (0, 2)
    }
    assert len(found) == 1 and None not in found.pop()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_named(trained, module_runs, caplog, capsys, tmp_path, value):
    state = trained[0].checkpoint()
    state["model"]["decoder.layers.1.fc1.weight"][3, 5] = value
    torch.save(state, tmp_path / "broken.pt")
    status, loss = evaluate(module_runs, caplog, tmp_path / "broken.pt")
    assert (status, loss) == (2, None)
    assert capsys.readouterr().err.endswith(
        "broken.pt: decoder.layers.1.fc1.weight has 1 NaN/Inf values: take an earlier one\n"
    )


@pytest.mark.parametrize("task", ["language_modeling", "language_modeling_sft"])
def test_validation_takes_the_task_of_the_checkpoint(trained, tmp_path, task):
    state = trained[0].checkpoint()
    state["cfg"]["task"]["_name"] = task
    torch.save(state, tmp_path / "other.pt")
    words = ["data", "--path", str(tmp_path / "other.pt"), "--tokens-per-sample", "16"]
    args = options.parse_args_and_arch(options.get_validation_parser(), words)
    assert (args.task, args.data, args.tokens_per_sample) == (task, "data", 16)
    assert hasattr(args, "pack_examples") == task.endswith("sft")


def test_validation_of_no_checkpoint(module_runs, capsys):
    for given, told in (("nowhere.pt",), "nowhere.pt: there is no such file"), ((), "(not given)"):
        path = ("--path", *given) if given else ()
        assert module_runs.run("validate", module_runs.data, *path) == 2
        assert f"error: --path {told}" in capsys.readouterr().err


def test_training_on_a_small_part_of_the_data_is_refused(runs, capsys):
    result = runs.train("part", "--max-tokens", "16", "--batch-size", "4")
    assert (result.status, result.log) == (1, [])
    assert "give --max-tokens 32 or more" in capsys.readouterr().err


def test_no_user_dir_is_needed_where_the_plugin_is_installed(module_runs, hydra_path, tmp_path):
    """An MoE checkpoint, in a folder where there is no evomoe_plugin."""
    model = (
        "--arch",
        "transformer_lm_gpttiny_moe",
        "--decoder-layers",
        "2",
        "--moe-freq",
        "2",
        "--moe-expert-count",
        "2",
        "--criterion",
        "moe_cross_entropy",
    )
    trained = module_runs.train("moe", *model, updates=2)
    assert trained.status == 0
    status, out, err = module_runs.output(
        "eval_lm",
        module_runs.data,
        "--gen-subset",
        "valid",
        "--batch-size",
        "4",
        "--tokens-per-sample",
        "32",
        "--path",
        trained.folder / "checkpoint_last.pt",
        env={"PYTHONPATH": hydra_path},
        cwd=tmp_path,
    )
    assert status == 0, err
    # iopath keeps upstream's command silent, which only a process of its own shows.
    assert len(re.findall(r"Perplexity: \d{2,}\.", out + err)) == 1
