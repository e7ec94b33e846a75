"""DynMoE's adaptive process in real runs: in every layout, and through a restart, the same."""

import re

import pytest
import torch

from tests.end_to_end.runs import assert_same_weights, load

# Recorded updates 2, 3, 5, 6, 8, 9; adapted after 3, 6, 9. Updates of 256 tokens.
ADAPT = (
    "--moe-gate", "top_any", "--moe-expert-count", "3", "--moe-max-experts", "5",
    "--moe-adapt-record-interval", "3", "--moe-adapt-window", "2", "--moe-top-any-learned-scale",
    "--dropout", "0", "--attention-dropout", "0", "--max-update", "9", "--update-freq", "2",
)
GATE = "decoder.layers.1.moe.gate"
EXACT = ("loss", "inner_loss", "gate_loss_diversity", "gnorm", "experts_per_token", "lr")
SHARDED = ("--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0", "--update-freq", "1",
           "--distributed-world-size", "2")


@pytest.fixture(scope="module")
def start(train, tmp_path_factory):
    """A checkpoint of update 1 in which no token can reach expert 1."""
    folder = tmp_path_factory.mktemp("start")
    train(folder, *ADAPT, "--max-update", "1", "--disable-validation")
    state = load(folder / "checkpoint_last.pt")
    state["model"][f"{GATE}.threshold"][1] = 5.0
    torch.save(state, folder / "start.pt")
    return folder / "start.pt"


@pytest.fixture(scope="module")
def unbroken(train, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = train(folder, *ADAPT, "--restore-file", start, "--save-interval-updates", "2")
    return folder, run


def changes(run):
    return re.findall(r"(decoder\.layers\.1\.moe, update .*)$", run.output, re.M)


def assert_same_course(one, other, tolerance=2e-3):
    assert changes(one) == changes(other)
    for a, b in zip(one.logged("train_inner"), other.logged("train_inner"), strict=True):
        for key in (*EXACT, "load_max", "dead_experts"):
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), key


def test_experts_are_removed_and_added_and_it_is_logged(unbroken):
    folder, run = unbroken
    first, second, *_ = changes(run)
    assert "update 3: removed expert 1, which no token reached; added expert 1 for" in first
    assert "3 of 5 experts now" in first
    assert "update 6: added expert 3 for" in second
    assert "4 of 5 experts now" in second
    records = run.logged("train_inner")
    assert [record["active_experts"] for record in records] == [3] * 2 + [3] * 3 + [4] * 3
    assert records[0]["dead_experts"] > 0.3 and records[2]["dead_experts"] == 0
    last = load(folder / "checkpoint_last.pt")["model"]
    assert last[f"{GATE}.active_E"].sum() == 5
    assert not last[f"{GATE}.record.routed_E"].any()


def test_resumed_amid_recording_it_is_bit_equal(unbroken, train, tmp_path):
    folder, whole = unbroken
    middle = next(folder.glob("checkpoint_*_2.pt"))
    recorded = load(middle)["model"]
    assert recorded[f"{GATE}.record.routed_E"].any()
    resumed = train(tmp_path, *ADAPT, "--restore-file", middle)
    assert changes(resumed) == changes(whole)
    wanted = whole.logged("train_inner")[1:]
    for a, b in zip(resumed.logged("train_inner"), wanted, strict=True):
        assert {key: a[key] for key in EXACT} == {key: b[key] for key in EXACT}
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(unbroken, start, train, tmp_path):
    folder, plain = unbroken
    run = train(tmp_path, *ADAPT, "--restore-file", start, "--checkpoint-activations")
    assert_same_course(plain, run, tolerance=0)
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


@pytest.mark.slow
def test_two_ranks_fully_sharded_equal_one_process(unbroken, start, train, tmp_path):
    folder, plain = unbroken
    run = train(tmp_path, *ADAPT, *SHARDED, "--restore-file", start)
    assert_same_course(plain, run)
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt", atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("given", [
    ("--fp16",), ("--fp16", "--fp16-no-flatten-grads"), ("--memory-efficient-fp16",), ("--bf16",),
    ("--fp16", *SHARDED),
], ids=lambda given: "".join(given[:2]))
def test_in_half_precision_the_same_experts_change(unbroken, start, given, train, tmp_path):
    run = train(tmp_path, *ADAPT, *given, "--restore-file", start, "--reset-optimizer",
                "--reset-lr-scheduler", "--max-update", "8")
    # A restart of the optimizer counts updates from 0.
    assert [re.search(r"(removed|added).*?(?= for|,)", line)[0] for line in changes(run)][0] == (
        "removed expert 1")
    assert run.logged("train_inner")[-1]["active_experts"] >= 4
