"""fairseq's evaluation commands on our checkpoints."""

import subprocess
import sys

import pytest

from tests.end_to_end.runs import evaluate, load

STAGES = {"dense": 1, "annealing": 4, "hard": 9}
ANNEAL = ("--moe-temperature-updates", "6", "--moe-temperature-end", "0.1")


@pytest.fixture(scope="module")
def checkpoints(train, tmp_path_factory):
    """One run, validated and saved at every update."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, train(folder, *ANNEAL, "--max-update", "9", "--save-interval-updates", "1")


@pytest.mark.parametrize("stage", STAGES)
def test_eval_lm_equals_the_validation_of_training(stage, checkpoints, data_bin):
    folder, run = checkpoints
    update = STAGES[stage]
    result = evaluate(data_bin, folder / f"checkpoint_1_{update}.pt", "--batch-size", "4")
    record = next(r for r in run.logged("valid") if r["valid_num_updates"] == update)
    assert result["loss"].item() == pytest.approx(record["valid_inner_loss"], abs=6e-4)
    assert record["valid_loss"] == record["valid_inner_loss"]


def test_the_result_does_not_depend_on_batch_size(checkpoints, data_bin):
    path = checkpoints[0] / f"checkpoint_1_{STAGES['annealing']}.pt"
    losses = [
        evaluate(data_bin, path, "--batch-size", size)["loss"].item() for size in ("1", "3", "16")
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_another_gate_on_request(checkpoints, data_bin):
    path = checkpoints[0] / "checkpoint_1_1.pt"
    reached, top1, dense = (
        evaluate(
            data_bin, path, "--batch-size", "8", "--model-overrides", repr({"moe_eval_gate": gate})
        )["loss"].item()
        for gate in ("reached", "top1", "dense")
    )
    assert abs(reached - dense) < 1e-3  # nearly all experts still pass the threshold
    assert abs(reached - top1) > 1e-3


def test_validate_agrees(checkpoints, data_bin, run_command):
    folder, run = checkpoints
    validated = run_command(
        "validate",
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--task",
        "language_modeling",
        "--path",
        folder / "checkpoint_1_9.pt",
        "--valid-subset",
        "valid",
        "--batch-size",
        "4",
        "--tokens-per-sample",
        "32",
        "--log-format",
        "json",
        "--num-workers",
        "0",
    )
    wanted = run.logged("valid")[-1]
    (got,) = validated.logged("valid")
    assert got["valid_inner_loss"] == pytest.approx(wanted["valid_inner_loss"], abs=2e-3)


def test_generate_and_interactive(checkpoints, data_bin, run_command):
    path = checkpoints[0] / "checkpoint_1_9.pt"
    common = (
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--task",
        "language_modeling",
        "--path",
        path,
        "--beam",
        "2",
        "--max-len-b",
        "8",
        "--num-workers",
        "0",
    )
    generated = run_command(
        "generate",
        *common,
        "--gen-subset",
        "valid",
        "--batch-size",
        "4",
        "--sample-break-mode",
        "eos",
        "--skip-invalid-size-inputs-valid-test",
        "--tokens-per-sample",
        "32",
    )
    assert "Generate valid with beam=2" in generated.output
    lines = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.interactive", *map(str, common)],
        input="w1 w2\nw3\n",
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert lines.returncode == 0, lines.stderr[-3000:]
    hypotheses = [
        line.split("\t")[2] for line in lines.stdout.splitlines() if line.startswith("H-")
    ]
    assert len(hypotheses) == 2
    assert hypotheses[0].startswith("w1 w2") and hypotheses[1].startswith("w3")


def test_best_checkpoint_by_perplexity(train, tmp_path):
    run = train(
        tmp_path,
        *ANNEAL,
        "--best-checkpoint-metric",
        "ppl",
        "--max-update",
        "4",
        "--validate-interval-updates",
        "2",
        "--save-interval-updates",
        "2",
    )
    best = load(tmp_path / "checkpoint_best.pt")["extra_state"]
    wanted = min(record["valid_ppl"] for record in run.logged("valid"))
    assert best["best"] == pytest.approx(wanted, abs=0.01)
