"""fairseq's evaluation commands on our checkpoints."""

import re
import shutil

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


def validated(run_command, data_bin, path, *given) -> list[float]:
    """The loss that `fairseq-validate` logs, as often as it does."""
    run = run_command(
        "validate",
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--path",
        path,
        "--batch-size",
        "4",  # 9 batches
        "--log-format",
        "json",
        "--num-workers",
        "0",
        *given,
    )
    return [record["valid_inner_loss"] for record in run.logged("valid")]


def test_validate_agrees(checkpoints, data_bin, run_command):
    folder, run = checkpoints
    (loss,) = validated(run_command, data_bin, folder / "checkpoint_1_9.pt")
    assert loss == pytest.approx(run.logged("valid")[-1]["valid_inner_loss"], abs=2e-3)


def test_generate_and_interactive(checkpoints, data_bin, run_command, tmp_path):
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
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2\nw3\n")
    lines = run_command("interactive", *common, "--input", prompts).output.splitlines()
    hypotheses = [line.split("\t")[2] for line in lines if line.startswith("H-")]
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


# --- several ranks

RANKS = ("--distributed-world-size", "2")
SHARDED = (*RANKS, "--moe-expert-parallel-size", "2")


@pytest.fixture(scope="module")
def sharded(train, tmp_path_factory):
    """A checkpoint with the experts of two ranks beside it."""
    folder = tmp_path_factory.mktemp("sharded")
    train(
        folder,
        *SHARDED,
        *ANNEAL,
        "--ddp-backend",
        "legacy_ddp",
        "--moe-ep-checkpoint",
        "sharded",
        "--max-update",
        "4",
    )
    assert len(list(folder.glob("checkpoint_last.experts/*/*.safetensors"))) == 2
    return folder / "checkpoint_last.pt"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def evaluated(run_command, data_bin, path, *given, **more):
    """What the command prints, once, of how many tokens and with which loss."""
    run = run_command(
        "eval_lm",
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--path",
        path,
        "--gen-subset",
        "valid",
        "--tokens-per-sample",
        "32",
        "--num-workers",
        "0",
        *given,
        **more,
    )
    ((tokens,), (loss,)) = (
        re.findall(pattern, run.output)
        for pattern in (r"Evaluated ([\d,]+) tokens", r"Loss \(base 2\): ([\d.]+), Perplexity")
    )
    return tokens, float(loss)


# 33 samples: 17 batches, 9 for one rank; 1 batch, none for the other.
@pytest.mark.parametrize(
    "ranks, batch_size",
    [(RANKS, "2"), (SHARDED, "64"), *(slow(*case) for case in ((RANKS, "64"), (SHARDED, "2")))],
    ids=lambda value: "experts" if value is SHARDED else "data" if value is RANKS else value,
)
def test_two_ranks_print_the_result_of_one(checkpoints, data_bin, run_command, ranks, batch_size):
    path = checkpoints[0] / f"checkpoint_1_{STAGES['annealing']}.pt"
    one = evaluate(data_bin, path, "--batch-size", batch_size)["loss"].item()
    found = evaluated(run_command, data_bin, path, "--batch-size", batch_size, *ranks)
    assert found == ("1,040", pytest.approx(one, abs=6e-5))


def test_each_rank_reads_its_own_experts(sharded, data_bin, run_command):
    one = evaluate(data_bin, sharded, "--batch-size", "2")["loss"].item()
    overrides = (*RANKS, "--model-overrides", repr({"moe_expert_parallel_size": 2}))
    for given in (SHARDED, overrides):
        found = evaluated(run_command, data_bin, sharded, "--batch-size", "2", *given)
        assert found == ("1,040", pytest.approx(one, abs=6e-5))


def test_contexts_do_not_depend_on_the_ranks(checkpoints, data_bin, run_command):
    path = checkpoints[0] / f"checkpoint_1_{STAGES['annealing']}.pt"
    given = ("--context-window", "20", "--batch-size", "2")
    one = evaluate(data_bin, path, *given)["loss"].item()
    found = evaluated(run_command, data_bin, path, *given, *SHARDED)
    assert found == ("1,040", pytest.approx(one, abs=6e-5))


def test_validation_on_two_ranks_that_shard_experts(checkpoints, data_bin, run_command):
    """Each rank logs the loss of all."""
    folder, run = checkpoints
    overrides = ("--model-overrides", repr({"moe_expert_parallel_size": 2}))
    losses = validated(run_command, data_bin, folder / "checkpoint_1_9.pt", *RANKS, *overrides)
    wanted = run.logged("valid")[-1]["valid_inner_loss"]
    assert losses == pytest.approx([wanted] * len(losses), abs=2e-3) and losses


def test_a_rank_that_fails_ends_the_others(sharded, data_bin, run_command, tmp_path):
    """Only the second rank reads the file that was altered."""
    copy = tmp_path / "checkpoint_last.pt"
    shutil.copy(sharded, copy)
    shutil.copytree(sharded.with_suffix(".experts"), copy.with_suffix(".experts"))
    (altered,) = copy.with_suffix(".experts").glob("*/00001-of-00002.safetensors")
    altered.write_bytes(altered.read_bytes()[:-4] + b"\0\0\0\0")
    arguments = (
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--path",
        copy,
        "--gen-subset",
        "valid",
        "--tokens-per-sample",
        "32",
    )
    run = run_command("eval_lm", *arguments, *SHARDED, check=False)
    assert run.status == 2
    errors = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{altered} has been altered" in errors[0]
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_ranks_that_torchrun_started(sharded, data_bin, run_command):
    one = evaluate(data_bin, sharded, "--batch-size", "2")["loss"].item()
    run = run_command(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fairseq_cli.eval_lm",
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--path",
        sharded,
        "--gen-subset",
        "valid",
        "--tokens-per-sample",
        "32",
        "--batch-size",
        "2",
        "--moe-expert-parallel-size",
        "2",
    )
    (loss,) = re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity", run.output)
    assert float(loss) == pytest.approx(one, abs=6e-5)


def test_experts_that_are_not_there_cannot_be_sharded(runs, capsys):
    """A dense model."""
    trained = runs.train("dense", updates=1)
    status = runs.run(
        "eval_lm",
        runs.data,
        "--path",
        trained.folder / "checkpoint_last.pt",
        "--gen-subset",
        "valid",
        *SHARDED,
    )
    assert status == 2
    assert "has no experts: leave it out" in capsys.readouterr().err
