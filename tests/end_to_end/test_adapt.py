"""DynMoE's adaptive process in real runs: in every layout, and through a restart, the same."""

import re

import pytest
import torch

from tests.end_to_end.runs import assert_same_weights, load

# Updates 2, 3, 5 and 6 are recorded; experts are adapted after 3 and 6. Updates of 256 tokens.
ADAPT = (
    "--moe-gate",
    "top_any",
    "--moe-expert-count",
    "3",
    "--moe-max-experts",
    "5",
    "--moe-adapt-record-interval",
    "3",
    "--moe-adapt-window",
    "2",
    "--moe-top-any-learned-scale",
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
    "--max-update",
    "6",
    "--update-freq",
    "2",
)
GATE = "decoder.layers.1.moe.gate"
EXACT = ("loss", "inner_loss", "gate_loss_diversity", "gnorm", "experts_per_token", "lr")
TWO = ("--distributed-world-size", "2", "--update-freq", "1")
SHARDED = (*TWO, "--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")


@pytest.fixture(scope="module")
def start(train, tmp_path_factory):
    """A checkpoint of update 1 in which no token can reach the experts 0 and 1."""
    folder = tmp_path_factory.mktemp("start")
    train(folder, *ADAPT, "--max-update", "1", "--disable-validation")
    state = load(folder / "checkpoint_last.pt")
    state["model"][f"{GATE}.threshold"][:2] = 5.0
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
    assert len(changes(run)) == 1
    assert (
        "update 3: removed experts 0, 1, which no token reached; added expert 0 for"
        in (changes(run)[0])
    )
    assert changes(run)[0].endswith("its network a copy of expert 2's; 2 of 5 experts now")
    records = run.logged("train_inner")
    assert [record["num_updates"] for record in records] == [2, 3, 4, 5, 6]
    assert [record["active_experts"] for record in records] == [3, 3, 2, 2, 2]
    assert records[1]["dead_experts"] == pytest.approx(2 / 3, abs=1e-3)
    assert records[2]["dead_experts"] == 0
    last = load(folder / "checkpoint_last.pt")["model"]
    assert last[f"{GATE}.active_E"].tolist() == [True, False, True, False, False]
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
@pytest.mark.parametrize(
    "layout",
    [SHARDED, (*TWO, "--ddp-backend", "pytorch_ddp")],
    ids=["fully_sharded", "pytorch_ddp"],
)
def test_two_ranks_equal_one_process(unbroken, start, layout, train, tmp_path):
    folder, plain = unbroken
    run = train(tmp_path, *ADAPT, *layout, "--restore-file", start)
    assert_same_course(plain, run)
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt", atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ("--fp16",),
        ("--fp16", "--fp16-no-flatten-grads"),
        ("--memory-efficient-fp16",),
        ("--bf16",),
        ("--fp16", *SHARDED),
    ],
    ids=["flat", "one by one", "memory-efficient", "bf16", "fully_sharded"],
)
def test_in_half_precision_the_same_experts_change(unbroken, start, given, train, tmp_path):
    run = train(tmp_path, *ADAPT, *given, "--restore-file", start, "--reset-optimizer")
    assert [line.split("; added")[0] for line in changes(run)] == [
        "decoder.layers.1.moe, update 3: removed experts 0, 1, which no token reached"
    ]
    losses = [record["inner_loss"] for record in run.logged("train_inner")]
    wanted = [record["inner_loss"] for record in unbroken[1].logged("train_inner")]
    # Without the optimizer's state updates count from 0.
    assert losses[-1] == pytest.approx(wanted[-1], abs=0.3)
    state = load(tmp_path / "checkpoint_last.pt")["model"]
    assert state[f"{GATE}.active_E"].tolist() == [True, False, True, False, False]
    assert state[f"{GATE}.threshold"][0].abs() < 0.1  # not what a master still had
