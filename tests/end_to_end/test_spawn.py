"""Expert-diversify in real runs: in every layout, and through a restart at any update, the same."""

import re

import pytest
import torch

from evomoe_plugin.evolve.init_methods import kept_mask, seed_of
from tests.end_to_end.runs import assert_same_weights, evaluate, load

N = 3
SEED = 7  # of the `train` fixture
# Updates of 256 tokens; the annealing takes the three after the spawn.
SPAWN = (
    "--moe-spawn-updates",
    str(N),
    "--moe-temperature-updates",
    "3",
    "--moe-temperature-end",
    "0.1",
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
    "--max-update",
    "7",
    "--update-freq",
    "2",
    "--weight-decay",
    "0.1",
)
EXPERTS = "decoder.layers.1.moe.experts"
EXACT = (
    "loss",
    "inner_loss",
    "gate_loss_balance",
    "gnorm",
    "experts_per_token",
    "lr",
    "mflops_per_token",
    "gate_entropy",
)
TWO = ("--distributed-world-size", "2", "--update-freq", "1")
SHARDED = (*TWO, "--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")
FROZEN = ("--moe-spawn-trainable-masked", "false")


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(folder, *SPAWN, "--save-interval-updates", "1")


def saved(folder, updates):
    (path,) = folder.glob(f"checkpoint_*_{updates}.pt")
    return path


def experts(path):
    """name -> [E, ...]"""
    return {
        name.removeprefix(EXPERTS + "."): value
        for name, value in load(path)["model"].items()
        if name.startswith(EXPERTS)
    }


def spawns(run):
    return re.findall(r"(update \d+: spawned .*)$", run.output, re.M)


def assert_same_course(one, other, tolerance=2e-3, skip=0):
    wanted = one.logged("train_inner")[skip:]
    for a, b in zip(other.logged("train_inner"), wanted, strict=True):
        for key in EXACT:
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), key
        assert a.get("temperature") == b.get("temperature")


def test_one_expert_until_the_spawn_and_all_from_then_on(unbroken):
    folder, run = unbroken
    assert spawns(run) == [
        "update 3: spawned 4 experts in each of 1 MoE layers from expert 0 (by mask, rate 0.3, "
        "moments copied)"
    ]
    records = run.logged("train_inner")
    assert [r["experts_per_token"] for r in records[:N]] == [1.0] * N
    assert [r["active_experts"] for r in records[:N]] == [1.0] * N
    assert [r["gate_loss_balance"] for r in records[:N]] == [0.0] * N
    assert all(r["loss"] == r["inner_loss"] and r["gate_entropy"] == 0 for r in records[:N])
    assert [r.get("temperature") for r in records] == [None] * N + [2.0, 1.3667, 0.7333, 0.1]
    assert records[N]["experts_per_token"] > 3.9 and records[-1]["experts_per_token"] == 1
    flops = [r["mflops_per_token"] for r in records]
    assert flops[0] == flops[N - 1] <= flops[-1] < flops[N]


def test_before_the_spawn_weight_decay_alone_acts_on_the_other_experts(unbroken):
    folder, _ = unbroken
    one, other = (experts(saved(folder, updates)) for updates in (1, N - 1))
    for name, value in one.items():
        rest = value[1:] != 0  # biases are drawn as zeros
        shrunk = (other[name][1:] / value[1:])[rest]
        assert not rest.any() or 0.99 < shrunk.min() <= shrunk.max() < 1
        assert torch.equal(rest, other[name][1:] != 0)
        assert not torch.equal(value[0], other[name][0])
    state = load(saved(folder, N - 1))["last_optimizer_state"]["state"]
    moments = [
        entry[key]
        for entry in state.values()
        for key in ("exp_avg", "exp_avg_sq")
        if entry[key].dim() == 3
    ]
    assert len(moments) == 4  # two of each weight matrix
    assert all(moment[0].any() and not moment[1:].any() for moment in moments)


def test_the_checkpoint_of_the_spawn_holds_all_experts(unbroken):
    folder, _ = unbroken
    before, after = experts(saved(folder, N - 1)), experts(saved(folder, N))
    weight = after["fc1_weight"]
    for e in range(1, 4):
        assert not torch.equal(before["fc1_weight"][e], before["fc1_weight"][0])
        both = (weight[e] != 0) & (weight[0] != 0)
        assert torch.equal(weight[e][both], weight[0][both])  # of one origin
        assert 0.4 < both.float().mean() < 0.6
        assert torch.equal(after["fc1_bias"][e], after["fc1_bias"][0])
        for name in ("fc1_weight", "fc2_weight"):
            kept = kept_mask(name, after[name][e].shape, "mask", key=seed_of(SEED, 0, e), rate=0.3)
            assert torch.equal(after[name][e] != 0, kept)


@pytest.mark.parametrize("updates", [N - 1, N, N + 1])
def test_resumed_around_the_spawn_it_is_bit_equal(unbroken, train, tmp_path, updates):
    folder, whole = unbroken
    resumed = train(
        tmp_path, *SPAWN, "--restore-file", saved(folder, updates), "--disable-validation"
    )
    assert len(spawns(resumed)) == (updates < N)
    assert_same_course(whole, resumed, tolerance=0, skip=updates)
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")
    one, other = (
        load(path / "checkpoint_last.pt")["last_optimizer_state"]["state"]
        for path in (tmp_path, folder)
    )
    for i in one:
        assert all(torch.equal(one[i][k], other[i][k]) for k in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("updates", [N - 1, N])
def test_evaluation_routes_as_training_did(unbroken, data_bin, updates):
    folder, run = unbroken
    result = evaluate(data_bin, saved(folder, updates), "--batch-size", "4")
    wanted = [r for r in run.logged("valid") if r["valid_num_updates"] == updates]
    assert result["loss"].item() == pytest.approx(wanted[0]["valid_inner_loss"], abs=6e-4)
    assert (wanted[0]["valid_experts_per_token"] == 1) == (updates < N)


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(unbroken, train, tmp_path):
    folder, plain = unbroken
    run = train(tmp_path, *SPAWN, "--checkpoint-activations")
    assert_same_course(plain, run, tolerance=0)
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [(), ("--moe-spawn-method", "reinit", "--moe-spawn-moments", "reset"), FROZEN],
    ids=["mask", "reinit", "frozen"],
)
@pytest.mark.parametrize(
    "layout",
    [SHARDED, (*TWO, "--ddp-backend", "pytorch_ddp")],
    ids=["fully_sharded", "pytorch_ddp"],
)
def test_two_ranks_equal_one_process_and_resume(train, tmp_path, layout, given):
    plain = train(tmp_path / "one", *SPAWN, *given, "--disable-validation")
    run = train(
        tmp_path / "two",
        *SPAWN,
        *layout,
        *given,
        "--save-interval-updates",
        "1",
        "--disable-validation",
    )
    assert spawns(run) == spawns(plain)
    assert_same_course(plain, run)
    last = tmp_path / "two/checkpoint_last.pt"
    assert_same_weights(tmp_path / "one/checkpoint_last.pt", last, atol=2e-4)
    for updates in (N - 1, N, N + 1) if given == FROZEN else (N - 1,):
        train(
            tmp_path / str(updates),
            *SPAWN,
            *layout,
            *given,
            "--disable-validation",
            "--restore-file",
            saved(tmp_path / "two", updates),
        )
        assert_same_weights(tmp_path / str(updates) / "checkpoint_last.pt", last)
    if given == FROZEN:
        held, at_spawn = experts(last), experts(saved(tmp_path / "two", N))
        for name in ("fc1", "fc2"):
            frozen = held[f"{name}_frozen"]
            assert torch.equal(frozen, at_spawn[f"{name}_weight"] == 0)
            assert torch.equal(frozen, held[f"{name}_weight"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ("--fp16",),
        ("--fp16", "--fp16-no-flatten-grads"),
        ("--memory-efficient-fp16",),
        ("--bf16",),
        ("--fp16", *SHARDED),
        ("--optimizer", "adafactor"),
        ("--optimizer", "nag", "--lr", "0.1"),
    ],
    ids=["flat", "one by one", "memory-efficient", "bf16", "fully_sharded", "adafactor", "nag"],
)
@pytest.mark.parametrize("frozen", [(), FROZEN], ids=["trainable", "frozen"])
def test_precisions_and_optimizers(given, frozen, train, tmp_path):
    run = train(
        tmp_path,
        *SPAWN,
        "--fp16-init-scale",
        "4",
        *given,
        *frozen,
        "--save-interval-updates",
        "1",
        "--disable-validation",
    )
    assert len(spawns(run)) == 1
    records = run.logged("train_inner")
    assert records[-1]["inner_loss"] < records[0]["inner_loss"]
    at_spawn, last = experts(saved(tmp_path, N)), experts(tmp_path / "checkpoint_last.pt")
    for name in ("fc1_weight", "fc2_weight"):
        zero = at_spawn[name] == 0
        assert 0.2 < zero.float().mean().item() < 0.4
        assert (last[name][zero] == 0).all() == bool(frozen)


@pytest.mark.slow
def test_fully_sharded_with_activation_checkpointing(unbroken, train, tmp_path):
    folder, plain = unbroken
    run = train(tmp_path, *SPAWN, *SHARDED, "--checkpoint-activations", "--disable-validation")
    assert spawns(run) == spawns(plain)
    assert_same_course(plain, run)
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt", atol=2e-4)


@pytest.mark.slow
def test_a_file_a_rank_and_a_resume_before_the_spawn(unbroken, train, tmp_path):
    given = (*SPAWN, *SHARDED, "--use-sharded-state", "--disable-validation")
    whole = train(tmp_path / "whole", *given)
    assert_same_course(unbroken[1], whole)
    train(tmp_path / "run", *given, "--max-update", N + 1, "--save-interval-updates", N - 1)
    for rank in (0, 1):
        (saved,) = (tmp_path / "run").glob(f"checkpoint_*_{N - 1}-shard{rank}.pt")
        saved.rename(tmp_path / "run" / f"checkpoint_last-shard{rank}.pt")
    resumed = train(tmp_path / "run", *given)
    assert spawns(resumed) == spawns(whole)
    assert_same_course(whole, resumed, tolerance=0, skip=N - 1)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [N - 1, N])
def test_resumed_on_another_number_of_processes(unbroken, train, tmp_path, updates):
    folder, whole = unbroken
    resumed = train(
        tmp_path, *SPAWN, *SHARDED, "--disable-validation", "--restore-file", saved(folder, updates)
    )
    assert len(spawns(resumed)) == (updates < N)
    assert_same_course(whole, resumed, skip=updates)
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt", atol=2e-4)


@pytest.mark.slow
def test_a_spawned_model_is_not_spawned_again(unbroken, train, tmp_path):
    folder, _ = unbroken
    last = folder / "checkpoint_last.pt"
    for given, message in [
        (("--finetune-from-model", last), "all experts of .* work already"),
        (("--restore-file", saved(folder, N), "--moe-spawn-updates", "6"), "were spawned at up"),
    ]:
        refused = train(tmp_path, *SPAWN, *given, check=False)
        assert refused.status == 2 and not list(tmp_path.glob("*.pt"))
        assert re.search(f"^error: --moe-spawn-updates .*{message}", refused.output, re.M)
    tuned = train(
        tmp_path,
        *SPAWN[2:],
        "--finetune-from-model",
        last,
        "--max-update",
        "1",
        "--moe-hard-updates",
        "0",
    )
    assert not spawns(tuned)
    assert tuned.logged("train_inner")[0]["experts_per_token"] == 1  # as it was: hard
