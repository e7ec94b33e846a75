"""Design invariants 7 and 8 for FSDP: one process and two give the same model."""

import re

import pytest

from tests.end_to_end.runs import assert_same_weights, copy_as_last, evaluate

SHARDED = ("--ddp-backend", "fully_sharded")
# Nested wrapping, so that each layer is gathered on its own.
NESTED = (*SHARDED, "--min-params-to-wrap", "0")
ANNEAL = ("--moe-temperature-updates", "6", "--moe-temperature-end", "0.1")
# Dropout masks depend on the split of the batch; everything else of ours does not.
SAME = (*ANNEAL, "--dropout", "0", "--attention-dropout", "0")
TWO = ("--distributed-world-size", "2")


@pytest.fixture(scope="module")
def one_process(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, train(folder, *SAME, "--update-freq", "2")


@pytest.fixture(scope="module")
def two_ranks(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, train(
        folder, *SAME, *NESTED, *TWO, "--checkpoint-activations", "--save-interval-updates", "4"
    )


def assert_same_course(one, other, tolerance=2e-3):
    pairs = zip(one.logged("train_inner"), other.logged("train_inner"), strict=True)
    for a, b in pairs:
        for key in (
            "loss",
            "inner_loss",
            "gate_loss_balance",
            "experts_per_token",
            "temperature",
            "gnorm",
            "load_max",
            "gate_entropy",
            "mflops_per_token",
        ):
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), key


def test_two_ranks_equal_one_process_with_twice_the_update_frequency(one_process, two_ranks):
    assert_same_course(one_process[1], two_ranks[1])
    assert_same_weights(
        one_process[0] / "checkpoint_last.pt", two_ranks[0] / "checkpoint_last.pt", atol=1e-4
    )


def test_each_rank_holds_about_half_of_the_parameters(one_process, two_ranks):
    whole, held = (
        int(re.search(r"num\. shared model params: ([\d,]+)", run.output)[1].replace(",", ""))
        for _, run in (one_process, two_ranks)
    )
    assert whole / 2 <= held < 0.52 * whole  # padded to equal shares


@pytest.mark.slow
def test_one_process_fully_sharded_equals_plain(one_process, train, tmp_path):
    run = train(tmp_path, *SAME, *SHARDED, "--update-freq", "2")
    assert_same_course(one_process[1], run)
    assert_same_weights(
        one_process[0] / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt", atol=1e-5
    )


@pytest.mark.parametrize(
    "sharded_state",
    [(), pytest.param(("--use-sharded-state",), marks=pytest.mark.slow)],
    ids=["consolidated", "sharded"],
)
def test_two_ranks_resume_bit_equal(two_ranks, train, data_bin, tmp_path, sharded_state):
    given = (*SAME, *NESTED, *TWO, "--checkpoint-activations", *sharded_state)
    if sharded_state:
        train(tmp_path, *given, "--max-update", "4")
    else:
        copy_as_last(two_ranks[0], 4, tmp_path)
    resumed = train(tmp_path, *given)
    wanted = two_ranks[1].logged("train_inner")[4:]
    for a, b in zip(resumed.logged("train_inner"), wanted, strict=True):
        assert (a["loss"], a["gnorm"]) == (b["loss"], b["gnorm"])
    # eval-lm finds the one file, or puts the shards together.
    result = evaluate(data_bin, tmp_path / "checkpoint_last.pt", "--batch-size", "4")
    wanted = two_ranks[1].logged("valid")[-1]["valid_inner_loss"]
    assert result["loss"].item() == pytest.approx(wanted, abs=6e-4)
    if not sharded_state:
        assert_same_weights(tmp_path / "checkpoint_last.pt", two_ranks[0] / "checkpoint_last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_checkpoint_resumes_on_another_number_of_processes(
    first, then, one_process, train, tmp_path
):
    layouts = {1: (*SAME, *SHARDED, "--update-freq", "2"), 2: (*SAME, *NESTED, *TWO)}
    train(tmp_path, *layouts[first], "--max-update", "4")
    resumed = train(tmp_path, *layouts[then])
    for a, b in zip(
        resumed.logged("train_inner"), one_process[1].logged("train_inner")[4:], strict=True
    ):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=2e-3)
        assert a["gnorm"] == pytest.approx(b["gnorm"], abs=2e-3)
    assert_same_weights(
        one_process[0] / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt", atol=1e-4
    )
