"""What a checkpoint's own options say, and those of a run that would go on from it."""

import types

import pytest
import torch
from omegaconf import OmegaConf

from evomoe_plugin.checkpoint.optimizer_layout import OptimizerLayout, check_number_trained
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.resume_checks import check_spawn, check_trained
from evomoe_plugin.trainer.layouts import Replicated
from tests.evolve.conftest import make_config, make_model, task  # noqa: F401


def saved(done, spawn=None, **more):
    return {
        "cfg": OmegaConf.create(
            {"model": {"moe_expert_count": "4", "moe_spawn_updates": spawn, **more}}
        ),
        "optimizer_history": [{"num_updates": 3}, {"num_updates": done}],
        "model": {},
        "last_optimizer_state": {"state": {0: {}}},
    }


def run(model=None, **given):
    return types.SimpleNamespace(
        cfg=OmegaConf.create({"model": given}), layout=Replicated(), get_model=lambda: model
    )


# Updates done, spawned at, --moe-spawn-updates now, counted from 0, what is said.
SPAWNS = [
    (
        50,
        10,
        10,
        True,
        "--moe-spawn-updates 10: all experts of old.pt work already, spawned at "
        "update 10, and another spawn would make them anew .*: leave it out$",
    ),
    (50, None, 60, True, "--moe-spawn-updates 60: all experts of old.pt work already, and an"),
    (50, None, 60, False, "--moe-spawn-updates 60: all experts of old.pt work already, and an"),
    (0, None, 60, True, "leave it out, or give it to `evomoe upcycle` too"),
    (
        50,
        10,
        90,
        False,
        "--moe-spawn-updates 90: the experts of old.pt were spawned at update 10, "
        "which schedules count from: give --moe-spawn-updates 10",
    ),
    (10, 10, 11, False, "--moe-spawn-updates 11: the experts of old.pt were spawned at update 10"),
    (50, 10, None, False, "--moe-spawn-updates is not given: the experts of old.pt were spawned"),
    (
        9,
        10,
        None,
        False,
        "--moe-spawn-updates is not given: only expert 0 of each layer of "
        "old.pt is trained, its spawn was to be at update 10: give an update "
        "above 9",
    ),
    (9, 10, None, True, "give an update above 0"),
    (9, 10, 9, False, "--moe-spawn-updates 9: old.pt is of update 9 and not spawned, and never "),
    (50, 10, 10, False, None),
    (10, 10, 10, False, None),
    (9, 10, 10, False, None),
    (9, 10, 20, False, None),
    (9, 10, 5, True, None),
    (50, 10, None, True, None),
    (50, None, None, True, None),
    (50, None, None, False, None),
    (0, 10, 10, True, None),
]


@pytest.mark.parametrize(("done", "spawn", "now", "resets", "message"), SPAWNS)
def test_experts_are_spawned_once(done, spawn, now, resets, message):
    trainer, state = run(moe_spawn_updates=now), saved(done, spawn)
    if message is None:
        check_spawn(trainer, state, "old.pt", resets)
    else:
        with pytest.raises(OptionError, match=message):
            check_spawn(trainer, state, "old.pt", resets)


def test_a_dense_checkpoint_is_reported_elsewhere():
    state = saved(50)
    state["cfg"] = OmegaConf.create({"model": {"_name": "transformer_lm"}})
    check_spawn(run(moe_spawn_updates=60), state, "old.pt", False)


def test_masked_weights_learn_in_a_run_that_begins_with_them():
    names = ["decoder.layers.1.moe.experts.fc1_weight", "decoder.layers.1.moe.experts.fc1_frozen"]
    for resets in (True, False):
        state = saved(50, 10)
        state["model"] = dict.fromkeys(names)
        check_spawn(run(moe_spawn_updates=None if resets else 10), state, "old.pt", resets)
        assert list(state["model"]) == names[: 1 if resets else 2]


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("experts", r"\.moe\.experts\.", True),
        ("experts,gate", "gate,experts", True),
        (r"layers\.1\.moe\.experts", r"layers\.3\.moe\.experts", False),  # as many parameters
        (None, "experts", False),
        ("experts", None, False),
        (None, ".", True),
    ],
)
def test_the_optimizer_goes_on_with_the_same_parameters(make_model, before, now, same):  # noqa: F811
    trainer, state = run(make_model(), moe_train_only=now), saved(5, moe_train_only=before)
    for resets in (True, False):
        if same or resets:
            check_trained(trainer, state, "old.pt", resets)
        else:
            remedy = "leave it out" if before is None else "give --moe-train-only "
            with pytest.raises(OptionError, match=f"is of other parameters: {remedy}.*--reset-opt"):
                check_trained(trainer, state, "old.pt", resets)
    state["last_optimizer_state"] = None
    check_trained(trainer, state, "old.pt", False)


def test_flat_moments_of_another_length():
    layout = OptimizerLayout(("a", "b"), (torch.Size([2, 3]), torch.Size([4])), is_flat=True)
    for numbers in (10, 12):
        state = {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(numbers)}},
            "param_groups": [{"params": [0]}],
        }
        if numbers == 10:
            check_number_trained(state, layout)
        else:
            with pytest.raises(OptionError, match="is of 12 numbers, 10 are trained now: give"):
                check_number_trained(state, layout)
