"""Options of the spawn that make no sense are refused; what is doubtful is warned of."""

import logging
import types

import pytest
from omegaconf import OmegaConf

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.rates import spawn_rate
from evomoe_plugin.config.run_checks import validate_run
from evomoe_plugin.gates.dense_to_sparse_options import annealing_updates, hard_updates
from evomoe_plugin.gates.stable import stable_updates


def after(updates=20, **given):
    return {"moe_spawn_updates": updates, **given}


# With 100 updates.
BAD = [
    (
        after(0),
        "--moe-spawn-updates 0: give the number of updates before the spawn, 1 or more; "
        "leave it out for none",
    ),
    (after(-1), "--moe-spawn-updates -1: give the number"),
    (after(100), "--moe-spawn-updates 100: the run ends at update 100: give less than"),
    (after(moe_spawn_method="slice"), "--moe-spawn-method slice: one of: copy, mask, noise, rein"),
    (after(moe_spawn_moments="keep"), "--moe-spawn-moments keep: one of: copy, reset"),
    (after(moe_spawn_rate=0.0), "--moe-spawn-rate 0.0: it is a share of the weights"),
    (after(moe_spawn_rate=1.0), "--moe-spawn-rate 1.0: it is a share of the weights"),
    (after(moe_spawn_rate=float("nan")), "--moe-spawn-rate nan"),
    (after(moe_spawn_method="reinit", moe_spawn_rate=1.5), "1.5: it is a share of the hidden uni"),
    (after(moe_spawn_method="noise", moe_spawn_rate=-1.0), "--moe-spawn-rate -1.0: give a number"),
    (after(moe_spawn_method="noise", moe_spawn_rate=float("inf")), "--moe-spawn-rate inf: give"),
    (after(moe_spawn_method="copy", moe_spawn_rate=0.3), "--moe-spawn-rate 0.3: the method copy"),
    (after(moe_spawn_method="noise", moe_spawn_rescale=True), "rescale True: --moe-spawn-method n"),
    (
        after(moe_spawn_method="reinit", moe_spawn_trainable_masked="false"),
        "--moe-spawn-trainable-masked false: --moe-spawn-method reinit masks nothing",
    ),
    (after(moe_spawn_trainable_masked="never"), "never: give true or false"),
    (
        {"moe_spawn_method": "noise"},
        "--moe-spawn-method noise: experts are not spawned: leave it "
        "out, or give --moe-spawn-updates",
    ),
    ({"moe_spawn_rate": 0.5}, "--moe-spawn-rate 0.5: experts are not spawned"),
    ({"moe_spawn_rescale": True}, "--moe-spawn-rescale True: experts are not spawned"),
    ({"moe_spawn_trainable_masked": "false"}, "--moe-spawn-trainable-masked false: experts are n"),
    ({"moe_spawn_moments": "reset"}, "--moe-spawn-moments reset: experts are not spawned"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_options_are_refused_in_one_line(moe_options, given, message):
    with pytest.raises(OptionError) as raised:
        validate(moe_options(**given))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        after(),
        after(99, moe_temperature_updates=1),
        after(moe_spawn_trainable_masked="False"),
        after(moe_spawn_method="reinit", moe_spawn_rate=1.0),
        after(moe_spawn_method="noise", moe_spawn_rate=3.0),
        after(moe_spawn_rescale=True),
        after(
            moe_gate="top_any",
            moe_expert_count="4",
            moe_max_experts=8,
            moe_adapt_record_interval=10,
        ),
        after(1000, max_update=0, moe_temperature_updates=50),
        {"moe_spawn_trainable_masked": "True"},
    ],
)
def test_good_options_pass_without_a_word(moe_options, given, caplog):
    validate(moe_options(**given))
    assert not caplog.messages


@pytest.mark.parametrize(
    "given, warning",
    [
        (after(moe_expert_count="1"), "a layer has only one expert"),
        (after(moe_spawn_method="copy"), "experts start identical"),
        (after(moe_shared_experts=1, moe_shared_combine="mix"), "shared experts have weight 1"),
        (after(80, moe_temperature_updates=30), "schedule does at update 110"),
        (after(80, moe_gate="stable", moe_stable_updates=20), "routing is frozen at update 100"),
    ],
)
def test_what_is_doubtful_is_said(moe_options, given, warning, caplog):
    with caplog.at_level(logging.WARNING):
        validate(moe_options(**given))
    assert warning in caplog.text


def test_default_lengths_are_shares_of_what_follows_the_spawn(moe_options):
    options = moe_options(**after(40))
    assert (annealing_updates(options), hard_updates(options)) == (18, 18)
    assert stable_updates(moe_options(**after(40, moe_gate="stable"))) == 6
    assert annealing_updates(moe_options(**after(40, moe_temperature_updates=50))) == 50
    assert annealing_updates(moe_options()) == 30


@pytest.mark.parametrize("updates", [None, 20])
def test_averaged_weights_are_refused_with_a_spawn(moe_options, updates):
    model = moe_options(moe_spawn_updates=updates)
    cfg = types.SimpleNamespace(
        task=None,
        model=OmegaConf.create(vars(model)),
        criterion=None,
        ema=types.SimpleNamespace(store_ema=True),
    )
    if updates is None:
        validate_run(cfg)
    else:
        with pytest.raises(OptionError, match="--store-ema True: the averages would include"):
            validate_run(cfg)


def run_of(model, **more):
    """A run's configuration with some of the model's fields; what is not given is as usual."""
    usual = {
        "task": None,
        "criterion": None,
        "model": model,
        "ema": {"store_ema": False},
        "checkpoint": {"finetune_from_model": None},
        "distributed_training": {"zero_sharding": "none", "ddp_backend": "legacy_ddp"},
        "optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)"},
    }
    return OmegaConf.create({**usual, **more})


CHANGES = [
    {"moe_spawn_updates": 5},
    {"moe_init_from_dense": "dense.pt"},
    {"moe_gate": "top_any", "moe_adapt_record_interval": 5},
]


@pytest.mark.parametrize("model", CHANGES, ids=str)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"distributed_training": {"zero_sharding": "os", "ddp_backend": "legacy_ddp"}},
            "--zero-sharding os: keeps optimizer state that --moe-.* cannot edit: give",
        ),
        (
            {"distributed_training": {"zero_sharding": "none", "ddp_backend": "slowmo"}},
            "--ddp-backend slowmo with --moe-.*: keeps a copy of the weights",
        ),
    ],
)
def test_who_else_holds_weights_or_moments_is_refused(model, more, message):
    """Also of a yaml with these fields alone."""
    validate_run(run_of(model))
    validate_run(run_of({"moe_gate": "top_k"}, **more))
    with pytest.raises(OptionError, match=message) as raised:
        validate_run(run_of(model, **more))
    assert "\n" not in str(raised.value)


def test_a_yaml_that_leaves_fields_out_is_checked_too():
    with pytest.raises(OptionError, match="--store-ema True: the averages would include"):
        validate_run(run_of({"moe_spawn_updates": 5}, ema={"store_ema": True}))
    with pytest.raises(OptionError, match="--moe-init-from-dense d.pt: --finetune-from-model"):
        validate_run(
            run_of({"moe_init_from_dense": "d.pt"}, checkpoint={"finetune_from_model": "moe.pt"})
        )


@pytest.mark.parametrize(
    ("betas", "updates", "warned"),
    [
        ("(0.9, 0.98)", 5000, None),
        ([0.9, 0.98], 5000, None),
        ("(0.9, 0.999)", None, None),
        ("(0.9, 0.999)", 5000, "up to 6.5 times --lr; with (0.9, 0.98) 1.6 times"),
        ([0.9, 0.999], 100, "up to 2.1 times --lr; with (0.9, 0.98) 1.5 times"),
        (None, 5000, None),
    ],
)
def test_a_large_beta2_with_a_spawn_is_warned_of(betas, updates, warned, caplog):
    optimizer = {"_name": "adam", "adam_betas": betas} if betas else {"_name": "sgd"}
    with caplog.at_level(logging.WARNING):
        validate_run(run_of({"moe_spawn_updates": updates}, optimizer=optimizer))
    assert [warned in message for message in caplog.messages] == ([True] if warned else [])


@pytest.mark.parametrize("method", ["mask", "noise", "reinit", "slice"])
def test_a_spawn_from_experts_that_differ_already_is_refused(moe_options, method):
    with pytest.raises(OptionError, match=f"--moe-init-method {method}: --moe-spawn-updates makes"):
        validate(moe_options(**after(moe_init_from_dense="dense.pt", moe_init_method=method)))
    validate(moe_options(moe_init_from_dense="dense.pt", moe_init_method=method))
    for allowed in ("copy", "none"):
        validate(moe_options(**after(moe_init_from_dense="dense.pt", moe_init_method=allowed)))


def test_default_rates(moe_options):
    rates = {
        method: spawn_rate(moe_options(**after(moe_spawn_method=method)))
        for method in ("mask", "noise", "reinit", "copy")
    }
    assert rates == {"mask": 0.3, "noise": 0.1, "reinit": 0.5, "copy": 0.0}
    assert spawn_rate(moe_options(**after(moe_spawn_rate=0.2))) == 0.2
