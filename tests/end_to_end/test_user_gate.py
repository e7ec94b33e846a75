"""A user's own gate, exactly as docs/adding-a-gate.md has it."""

import re
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, TINY

PAGE = (ROOT / "docs/adding-a-gate.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the user works: the page's lines are in my_gates there."""
    package = tmp_path_factory.mktemp("work") / "my_gates"
    package.mkdir()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (package / "__init__.py").write_text(code)
    return package.parent


def options(data_bin, save_dir):
    return [
        data_bin,
        "--user-dir",
        "my_gates",
        "--task",
        "language_modeling",
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
        "--log-format",
        "json",
        "--log-interval",
        "1",
        "--num-workers",
        "0",
        "--no-epoch-checkpoints",
        "--moe-gate",
        "cautious",
        "--save-dir",
        save_dir,
    ]


def test_it_is_about_thirty_lines():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


@pytest.mark.slow
def test_it_trains_on_two_ranks_and_evaluates(folder, data_bin, run_command):
    run = run_command(
        "train",
        *options(data_bin, "ck"),
        "--moe-caution",
        "0.6",
        "--moe-scorer",
        "mlp",
        "--moe-null-experts",
        "1",
        "--moe-aux",
        "mi=0.01,z=0.001",
        "--ddp-backend",
        "fully_sharded",
        "--distributed-world-size",
        "2",
        cwd=folder,
    )
    last = run.logged("train_inner")[-1]
    assert 1 <= last["experts_per_token"] + last["null_rate"] <= 2
    assert last["null_rate"] > 0
    assert {"gate_loss_mi", "gate_loss_z"} <= last.keys()
    evaluated = run_command(
        "eval_lm",
        data_bin,
        "--user-dir",
        "my_gates",
        "--path",
        "ck/checkpoint_last.pt",
        "--gen-subset",
        "valid",
        "--tokens-per-sample",
        "32",
        "--batch-size",
        "4",
        cwd=folder,
    )
    assert "Perplexity" in evaluated.output


def test_its_options_are_checked_like_ours(folder, data_bin, run_command):
    refused = run_command(
        "train", *options(data_bin, "ck2"), "--moe-sample-top-k", "1", cwd=folder, check=False
    )
    assert refused.status == 2
    (error,) = [line for line in refused.output.splitlines() if line.startswith("error:")]
    assert error.startswith("error: --moe-sample-top-k 1: the gate cautious does not use it")


@pytest.mark.slow
def test_its_options_are_hydra_fields(folder, data_bin, run_command, hydra_path):
    run = run_command(
        "hydra_train",
        "--config-name",
        "small/evomoe_dts",
        "common.user_dir=my_gates",
        "model.moe_gate=cautious",
        "model.moe_caution=0.9",
        "hydra.job.chdir=true",
        f"task.data={data_bin}",
        "optimization.max_update=2",
        "dataset.batch_size=4",
        "task.tokens_per_sample=32",
        "common.log_interval=1",
        "dataset.disable_validation=true",
        "checkpoint.no_save=true",
        cwd=folder,
        PYTHONPATH=hydra_path,
    )
    assert "'moe_caution': 0.9" in run.output
    assert "done training" in run.output
