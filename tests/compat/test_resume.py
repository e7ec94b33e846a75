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


@pytest.mark.parametrize("layout", ["plain-1", "fsdp-1", "fsdp-2", "sharded-2"])
def test_resumed_equals_unbroken(unbroken, runs, layout):
    whole = unbroken(layout)
    resumed = train(runs, "resumed", layout, *restore(whole))
    assert len(whole.losses(3)) == 3
    assert resumed.losses() == whole.losses(3)
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", ["pytorch_ddp-2", "fsdp-1", "fsdp-2", "sharded-2"])
def test_layouts_train_alike(unbroken, layout):
    one, other = unbroken("plain-1"), unbroken(layout)
    for update, (loss, norm) in one.losses().items():
        assert float(other.losses()[update][0]) == pytest.approx(float(loss), abs=2e-3)
        assert float(other.losses()[update][1]) == pytest.approx(float(norm), abs=2e-3)
    assert_close(weights(other), weights(one))


@pytest.mark.parametrize("before, after", [
    ("plain-1", "nested-2"), ("nested-2", "plain-1"), ("fsdp-1", "fsdp-2"), ("fsdp-2", "fsdp-1"),
    ("fsdp-2", "nested-2"), ("sharded-2", "plain-1"), ("pytorch_ddp-2", "fsdp-1"),
    ("sharded-2", "fsdp-1"),
])
def test_resumed_in_another_layout(unbroken, runs, before, after):
    whole = unbroken(before)
    resumed = train(runs, "resumed", after, *restore(whole))
    assert sorted(resumed.losses()) == [4, 5, 6]
    for update, (loss, norm) in whole.losses(3).items():
        assert float(resumed.losses()[update][0]) == pytest.approx(float(loss), abs=2e-3)
        assert float(resumed.losses()[update][1]) == pytest.approx(float(norm), abs=2e-3)
    assert_close(weights(resumed), weights(whole))
