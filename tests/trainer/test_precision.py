"""Each precision and parallelism on CPUs: it trains, or one line says why not."""

from __future__ import annotations

import math

import pytest

FSDP = ("--ddp-backend", "fully_sharded")


def slow(*options):
    return pytest.param(options, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def plain(module_runs):
    return module_runs.train("plain")


@pytest.mark.parametrize(
    "options",
    [
        (*FSDP, "--fp16"),
        (*FSDP, "--memory-efficient-fp16"),
        slow("--fp16"),
        slow("--bf16"),
        slow("--fp16", "--fp16-no-flatten-grads"),
        slow("--memory-efficient-fp16"),
        slow("--memory-efficient-bf16"),
        slow(*FSDP, "--fp16", "--fp32-reduce-scatter"),
    ],
    ids=" ".join,
)
def test_trains_and_resumes(plain, runs, options):
    half = runs.train("half", *options, "--save-interval-updates", "3")
    assert half.status == 0
    for update, (loss, _) in plain.losses().items():
        assert float(half.losses()[update][0]) == pytest.approx(float(loss), abs=0.1)
    resumed = runs.train("resumed", *options, "--restore-file", half.folder / "checkpoint_1_3.pt")
    assert resumed.status == 0
    assert float(resumed.losses()[6][0]) == pytest.approx(float(half.losses()[6][0]), abs=0.05)


def test_overflow_lowers_the_loss_scale_and_goes_on(runs):
    result = runs.train("overflow", "--fp16", "--fp16-init-scale", 2**24)
    assert result.status == 0
    assert sorted(result.losses()) == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(float(loss)) for loss, _ in result.losses().values())
    scale = result.checkpoint()["last_optimizer_state"]["loss_scale"]
    assert scale < 2**24


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (*FSDP, "--fp16"),
        (*FSDP, "--memory-efficient-fp16"),
        ("--fp16",),
        ("--bf16",),
        ("--bf16", "--ddp-backend", "legacy_ddp"),
    ],
    ids=" ".join,
)
def test_trains_on_two_processes(runs, options):
    one = runs.train("one", "--update-freq", "2")
    two = runs.train("two", *options, world=2)
    assert two.status == 0
    for update, (loss, _) in one.losses().items():
        assert float(two.losses()[update][0]) == pytest.approx(float(loss), abs=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ((*FSDP, "--memory-efficient-bf16"), "--memory-efficient-bf16 with --ddp-backend fully_s"),
        ((*FSDP, "--amp"), "--amp without a GPU: give --bf16"),
        ((*FSDP, "--cpu-offload"), "--cpu-offload without a GPU: leave it out"),
        ((*FSDP, "--fp32-reduce-scatter"), "--fp32-reduce-scatter without plain --fp16"),
        ((*FSDP, "--zero-sharding", "os"), "--zero-sharding os with --ddp-backend fully_sharded"),
        ((*FSDP, "--not-fsdp-flatten-parameters"), "--not-fsdp-flatten-parameters with one file"),
        (("--use-sharded-state",), "--use-sharded-state with --ddp-backend pytorch_ddp: needs"),
        (("--ddp-backend", "slowmo"), "--ddp-backend slowmo without a GPU: give legacy_ddp"),
        (("--fp16", "--bf16"), "--fp16 does not go with --bf16: give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_is_refused_in_one_line(runs, capsys, options, message):
    result = runs.train("refused", *options, world=2)
    error = capsys.readouterr().err
    assert result.status == 2
    assert f"error: {message}" in error and "Traceback" not in error
    assert not list(result.folder.glob("*.pt"))
