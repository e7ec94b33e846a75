"""`--optimizer fused_adamw` in real runs: what `adam` trains, in every layout, through restarts."""

import pytest
import torch

from tests.end_to_end.runs import assert_same_weights, load

FUSED = ("--optimizer", "fused_adamw", "--adam-betas", "(0.9,0.98)", "--weight-decay", "0.1")
PLAIN = ("--optimizer", "adam", *FUSED[2:])
COURSE = (
    "--moe-temperature-updates",
    "6",
    "--moe-temperature-end",
    "0.1",
    "--dropout",
    "0.1",
    "--save-interval-updates",
    "6",
    "--disable-validation",
)
TWO = (
    "--distributed-world-size",
    "2",
    "--ddp-backend",
    "fully_sharded",
    "--min-params-to-wrap",
    "0",
)
EXACT = ("loss", "inner_loss", "gnorm", "experts_per_token", "lr")


def saved(folder, updates=6):
    (path,) = folder.glob(f"checkpoint_*_{updates}.pt")
    return path


def assert_same_course(run, wanted, tolerance=2e-3):
    ours, theirs = run.logged("train_inner"), wanted.logged("train_inner")
    assert ours
    for a, b in zip(ours, theirs[-len(ours) :], strict=True):
        for key in EXACT:
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), key


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adam")
    return folder, train(folder, *PLAIN, *COURSE)


@pytest.fixture(scope="module")
def fused(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    return folder, train(folder, *FUSED, *COURSE)


def test_trains_as_adam_and_resumes_bit_equal_and_from_either(plain, fused, train, tmp_path):
    folder, run = fused
    assert_same_course(run, plain[1])
    assert_same_weights(folder / "checkpoint_last.pt", plain[0] / "checkpoint_last.pt", 1e-4)
    state = load(folder / "checkpoint_last.pt")["last_optimizer_state"]
    assert {type(entry["step"]) for entry in state["state"].values()} == {int}
    again = train(tmp_path / "again", *FUSED, *COURSE, "--restore-file", saved(folder))
    assert_same_course(again, run, tolerance=0)
    assert_same_weights(tmp_path / "again/checkpoint_last.pt", folder / "checkpoint_last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("then", [PLAIN, FUSED], ids=["fused, then adam", "adam, then fused"])
def test_a_run_can_change_between_them(plain, fused, train, tmp_path, then):
    (first, _), (_, wanted) = (plain, fused) if then is FUSED else (fused, plain)
    run = train(tmp_path, *then, *COURSE, "--restore-file", saved(first))
    assert len(run.logged("train_inner")) == 6
    assert_same_course(run, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [(), ("--use-sharded-state",)], ids=["one file", "shards"])
def test_fully_sharded_it_resumes_bit_equal_and_after_adam(train, tmp_path, sharded):
    def run(name, optimizer, *given):
        return train(tmp_path / name, *optimizer, *COURSE, *TWO, *sharded, *given)

    wanted = run("adam", PLAIN)
    whole = run("whole", FUSED)
    assert_same_course(whole, wanted)
    name = "checkpoint_1_6.pt"
    for first, tolerance in (("whole", 0), ("adam", 2e-3)):
        again = run(f"after-{first}", FUSED, "--restore-file", tmp_path / first / name)
        assert len(again.logged("train_inner")) == 6
        assert_same_course(again, whole, tolerance)


@pytest.mark.slow
def test_one_process_goes_on_from_shards_of_two(train, tmp_path):
    train(tmp_path / "two", *FUSED, *COURSE, *TWO, "--use-sharded-state", "--max-update", "6")
    runs = [
        train(
            tmp_path / name, *given, *COURSE, "--restore-file", tmp_path / "two/checkpoint_1_6.pt"
        )
        for name, given in (("adam", PLAIN), ("fused", FUSED))
    ]
    assert [len(run.logged("train_inner")) for run in runs] == [6, 6]
    assert_same_course(*runs)


@pytest.mark.slow
def test_spawned_experts_and_frozen_weights(train, tmp_path):
    """Moments are edited at the spawn, weights that mask made zero stay so."""
    given = (
        "--moe-spawn-updates",
        "3",
        "--moe-temperature-updates",
        "3",
        "--max-update",
        "7",
        "--moe-spawn-trainable-masked",
        "false",
        "--save-interval-updates",
        "1",
        "--disable-validation",
        "--dropout",
        "0",
    )
    wanted = train(tmp_path / "adam", *PLAIN, *given)
    run = train(tmp_path / "fused", *FUSED, *given)
    assert "update 3: spawned 4 experts" in run.output
    assert_same_course(run, wanted)
    name = "decoder.layers.1.moe.experts.fc1_weight"
    masks = [load(tmp_path / "fused" / f"checkpoint_1_{n}.pt")["model"][name] == 0 for n in (3, 7)]
    assert masks[0].any() and torch.equal(*masks)
    again = train(
        tmp_path / "again", *FUSED, *given, "--restore-file", tmp_path / "fused/checkpoint_1_2.pt"
    )
    assert_same_course(again, run, tolerance=0)
    assert_same_weights(*(tmp_path / n / "checkpoint_last.pt" for n in ("again", "fused")))


@pytest.mark.slow
def test_only_what_is_trained_has_a_state(train, tmp_path):
    given = ("--moe-train-only", "experts,gate", "--max-update", "3", "--disable-validation")
    wanted = train(tmp_path / "adam", *PLAIN, *given)
    run = train(tmp_path / "fused", *FUSED, *given)
    assert_same_course(run, wanted)
    states = [
        load(tmp_path / name / "checkpoint_last.pt")["last_optimizer_state"]["state"]
        for name in ("adam", "fused")
    ]
    assert len(states[0]) == len(states[1]) > 0


@pytest.mark.slow
def test_divided_experts_are_saved_and_read(train, tmp_path):
    given = (
        *COURSE,
        "--distributed-world-size",
        "2",
        "--ddp-backend",
        "legacy_ddp",
        "--moe-expert-parallel-size",
        "2",
        "--moe-ep-checkpoint",
        "sharded",
    )
    wanted = train(tmp_path / "adam", *PLAIN, *given)
    run = train(tmp_path / "fused", *FUSED, *given)
    assert_same_course(run, wanted)
    again = train(
        tmp_path / "again", *FUSED, *given, "--restore-file", tmp_path / "fused/checkpoint_1_6.pt"
    )
    assert_same_course(again, run, tolerance=0)


MUON = ("--optimizer", "muon", *FUSED[2:])


def test_muon_resumes_bit_equal_over_a_spawn(train, tmp_path):
    spawn = ("--moe-spawn-updates", "3", "--moe-temperature-updates", "3", "--max-update", "7")
    given = (*spawn, "--save-interval-updates", "1", "--disable-validation", "--dropout", "0")
    run = train(tmp_path / "whole", *MUON, *given)
    losses = [record["loss"] for record in run.logged("train_inner")]
    assert losses[-1] < losses[0]
    state = load(tmp_path / "whole/checkpoint_last.pt")["last_optimizer_state"]["state"]
    assert {len(entry) for entry in state.values()} == {2, 3}  # of Muon, and of Adam
    for update in (2, 5):
        saved = tmp_path / f"whole/checkpoint_1_{update}.pt"
        again = train(tmp_path / f"from-{update}", *MUON, *given, "--restore-file", saved)
        assert_same_course(again, run, tolerance=0)
        assert_same_weights(
            tmp_path / f"from-{update}/checkpoint_last.pt", tmp_path / "whole/checkpoint_last.pt"
        )
