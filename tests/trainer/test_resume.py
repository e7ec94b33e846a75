"""A run that is stopped and resumed is the run that was not: in one layout, and across them."""

from __future__ import annotations

import pytest
import torch

FSDP = ("--ddp-backend", "fully_sharded")
NESTED = (*FSDP, "--min-params-to-wrap", "0", "--checkpoint-activations")
SHARDED = (*NESTED, "--use-sharded-state")
SAVES = ("--save-interval-updates", "3")

# Two processes see in one update what one process sees in two batches.
ONE = {"world": 1, "extra": ("--update-freq", "2")}
TWO = {"world": 2, "extra": ()}

LAYOUTS = {
    "plain-1": (ONE, ()),
    "pytorch_ddp-2": (TWO, ("--ddp-backend", "pytorch_ddp")),
    "fsdp-1": (ONE, FSDP),
    "fsdp-2": (TWO, FSDP),
    "nested-2": (TWO, NESTED),
    "sharded-2": (TWO, SHARDED),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def train(runs, name, layout, *more):
    processes, options = LAYOUTS[layout]
    result = runs.train(
        name, *processes["extra"], *options, *SAVES, *more, world=processes["world"]
    )
    assert result.status == 0
    return result


@pytest.fixture(scope="module")
def unbroken(module_runs):
    """One run a layout, 6 updates, with a checkpoint of update 3 beside the last; made once."""
    made = {}

    def get(layout):
        if layout not in made:
            made[layout] = train(module_runs, layout, layout)
        return made[layout]

    return get


def weights(result):
    """The weights after the last update, by name, of a run in any layout."""
    from fairseq import checkpoint_utils

    name = "checkpoint_last.pt"
    if not (result.folder / name).exists():
        name = "checkpoint_last-shard0.pt"
    return checkpoint_utils.load_checkpoint_to_cpu(str(result.folder / name))["model"]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Softmax does not see a bias of the keys: its gradient is rounding, which Adam amplifies.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=0, msg=name)


def restore(result):
    return "--restore-file", result.folder / "checkpoint_1_3.pt"


@pytest.mark.parametrize(
    "layout",
    [
        "plain-1",
        "fsdp-1",
        slow("nested-2"),
        slow("sharded-2"),
        slow("fsdp-2"),
        slow("pytorch_ddp-2"),
    ],
)
def test_resumed_equals_unbroken(unbroken, runs, layout):
    whole = unbroken(layout)
    resumed = train(runs, "resumed", layout, *restore(whole))
    assert len(whole.losses(3)) == 3
    assert resumed.losses() == whole.losses(3)
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp-1",
        "sharded-2",
        slow("nested-2"),
        slow("fsdp-2"),
        slow("pytorch_ddp-2"),
    ],
)
def test_layouts_train_alike(unbroken, layout):
    one, other = unbroken("plain-1"), unbroken(layout)
    for update, (loss, norm) in one.losses().items():
        assert float(other.losses()[update][0]) == pytest.approx(float(loss), abs=2e-3)
        assert float(other.losses()[update][1]) == pytest.approx(float(norm), abs=2e-3)
    assert_close(weights(other), weights(one))


@pytest.mark.parametrize(
    "before, after",
    [
        ("plain-1", "nested-2"),
        ("fsdp-1", "plain-1"),
        slow("nested-2", "plain-1"),
        slow("nested-2", "fsdp-1"),
        slow("sharded-2", "fsdp-1"),
        slow("fsdp-1", "fsdp-2"),
        slow("fsdp-2", "nested-2"),
        slow("sharded-2", "plain-1"),
        slow("pytorch_ddp-2", "fsdp-1"),
        slow("sharded-2", "pytorch_ddp-2"),
    ],
)
def test_resumed_in_another_layout(unbroken, runs, before, after):
    whole = unbroken(before)
    resumed = train(runs, "resumed", after, *restore(whole))
    assert sorted(resumed.losses()) == [4, 5, 6]
    for update, (loss, norm) in whole.losses(3).items():
        assert float(resumed.losses()[update][0]) == pytest.approx(float(loss), abs=2e-3)
        assert float(resumed.losses()[update][1]) == pytest.approx(float(norm), abs=2e-3)
    assert_close(weights(resumed), weights(whole))


@pytest.mark.slow
def test_a_position_between_two_batches_is_rounded_down(unbroken, runs):
    """Three batches of one process are one and a half of each of two: one is seen again."""
    one = runs.train("one", updates=3)
    two = runs.train(
        "two", *FSDP, "--restore-file", one.folder / "checkpoint_last.pt", world=2, updates=4
    )
    assert two.status == 0
    assert two.checkpoint()["extra_state"]["train_iterator"]["iterations_in_epoch"] == 2


def test_each_rank_keeps_half(unbroken):
    parameters = sum(p.numel() for p in weights(unbroken("plain-1")).values() if p.dim())
    for rank in range(2):
        shard = unbroken("sharded-2").checkpoint(f"checkpoint_last-shard{rank}.pt")
        kept = sum(v.numel() for k, v in shard["model"].items() if "flat_param" in k)
        moments = sum(
            state["exp_avg"].numel() for state in shard["last_optimizer_state"]["state"].values()
        )
        # The plain checkpoint lists the tied embedding twice, and has one number of version.
        tied = 64 * 32
        assert kept == moments == pytest.approx((parameters - tied) / 2, rel=0.01)


@pytest.mark.parametrize(
    "before, after",
    [
        (("--fp16",), (*FSDP, "--fp16")),
        ((*FSDP, "--fp16"), ("--fp16",)),
        (("--memory-efficient-fp16",), (*FSDP, "--memory-efficient-fp16")),
    ],
)
def test_half_precision_changes_layout(runs, before, after):
    first = runs.train("first", *before, *SAVES)
    resumed = runs.train("resumed", *after, *restore(first))
    assert resumed.status == 0
    for update, (loss, _) in first.losses(3).items():
        assert float(resumed.losses()[update][0]) == pytest.approx(float(loss), abs=0.02)
