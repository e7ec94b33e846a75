"""Design invariant 8: stop at any update and resume, bit-equal to the unbroken run."""

import pytest

from tests.end_to_end.runs import assert_same_weights, load

# Of 12 updates the annealing takes 6; hard from 6.
STAGES = {"before": 1, "during": 4, "at the switch": 6, "after": 9}
ANNEAL = ("--moe-temperature-updates", "6", "--moe-temperature-end", "0.05", "--dropout", "0.1")
EXACT = (
    "loss",
    "inner_loss",
    "ppl",
    "gate_loss_balance",
    "gnorm",
    "experts_per_token",
    "temperature",
    "lr",
)


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(folder, *ANNEAL)


@pytest.mark.parametrize(
    "stage",
    [
        "at the switch",
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("before", "during", "after")),
    ],
)
def test_resumed_run_is_bit_equal(stage, unbroken, train, tmp_path):
    folder, whole = unbroken
    update = STAGES[stage]
    # The schedule does not depend on --max-update here, so a shorter run is a stopped one.
    train(tmp_path, *ANNEAL, "--max-update", update)
    resumed = train(tmp_path, *ANNEAL)
    wanted = whole.logged("train_inner")[update:]
    got = resumed.logged("train_inner")
    assert [record["num_updates"] for record in got] == list(range(update + 1, 13))
    for a, b in zip(got, wanted, strict=True):
        assert {k: a[k] for k in EXACT} == {k: b[k] for k in EXACT}
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")
    assert resumed.logged("valid")[-1]["valid_loss"] == whole.logged("valid")[-1]["valid_loss"]


def test_the_run_really_passes_through_all_stages(unbroken):
    folder, whole = unbroken
    experts = [record["experts_per_token"] for record in whole.logged("train_inner")]
    assert experts[0] > 3.5
    assert 1 < experts[5] < 3.5
    assert experts[6:] == [1] * 6
    assert load(folder / "checkpoint_last.pt")["model"]["decoder.layers.1.moe.num_updates"] == 12


# Seven updates are an epoch: the batches of later epochs must be those of the unbroken run too.
# What changes after an update must continue too: running means and the bias.
MEANS = (
    "--moe-lexical",
    "normal:2",
    "--moe-gate-centre",
    "0.9",
    "--moe-weight-scale",
    "mean",
    "--moe-bias-update-rate",
    "0.01",
)
EPOCHS = (*ANNEAL, *MEANS, "--batch-size", "56")


@pytest.fixture(scope="module")
def two_epochs(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-epochs")
    return folder, train(folder, *EPOCHS)


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(7, marks=pytest.mark.slow, id="at an epoch's end"),
        pytest.param(9, id="in the second epoch"),
    ],
)
def test_resumed_later_epochs_are_bit_equal(update, two_epochs, train, tmp_path):
    folder, whole = two_epochs
    records = whole.logged("train_inner")
    assert [record["epoch"] for record in records] == [1] * 7 + [2] * 5
    train(tmp_path, *EPOCHS, "--max-update", update)
    got = train(tmp_path, *EPOCHS).logged("train_inner")
    assert len(got) == 12 - update
    for a, b in zip(got, records[update:], strict=True):
        assert {k: a[k] for k in EXACT} == {k: b[k] for k in EXACT}
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


@pytest.mark.parametrize(
    "given",
    [
        ("--bf16",),
        *(
            pytest.param(given, marks=pytest.mark.slow)
            for given in (
                ("--fp16",),
                ("--fp16", "--fp16-no-flatten-grads"),
                ("--memory-efficient-bf16",),
                (
                    "--fp16",
                    "--distributed-world-size",
                    "2",
                    "--ddp-backend",
                    "legacy_ddp",
                    "--moe-expert-parallel-size",
                    "2",
                ),
                (
                    "--fp16",
                    "--distributed-world-size",
                    "2",
                    "--ddp-backend",
                    "legacy_ddp",
                    "--moe-expert-parallel-size",
                    "2",
                    "--moe-ep-checkpoint",
                    "sharded",
                ),
            )
        ),
    ],
    ids=lambda given: " ".join(word.lstrip("-") for word in given),
)
def test_half_precision_resumes_bit_equal(given, train, tmp_path):
    whole = train(tmp_path / "whole", *ANNEAL, *given, "--max-update", "8")
    train(tmp_path / "part", *ANNEAL, *given, "--max-update", "4")
    got = train(tmp_path / "part", *ANNEAL, *given, "--max-update", "8").logged("train_inner")
    for a, b in zip(got, whole.logged("train_inner")[4:], strict=True):
        assert {k: a[k] for k in EXACT} == {k: b[k] for k in EXACT}
    assert_same_weights(tmp_path / "part/checkpoint_last.pt", tmp_path / "whole/checkpoint_last.pt")
