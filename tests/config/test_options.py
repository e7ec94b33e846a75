"""Options are understood, doubtful ones warned of, and runs checked before they start."""

import pickle

import pytest
from omegaconf import OmegaConf

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import expert_counts, moe_layer_indices
from evomoe_plugin.config.run_checks import validate_run
from evomoe_plugin.config.values import parse_bool


@pytest.mark.parametrize(
    "given, warning",
    [
        (
            {"moe_temperature_updates": 50, "moe_hard_updates": 10},
            "routing turns hard before the annealing ends at update 50",
        ),
        ({"moe_temperature_updates": 5000}, "--max-update 100: the run ends before"),
        ({"moe_hard_updates": 200}, "--max-update 100: the run ends before"),
    ],
)
def test_doubtful_values_are_warned_of(moe_options, caplog, given, warning):
    validate(moe_options(**given))
    assert warning in caplog.text


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"moe_freq": 1},
        {"moe_freq": 4},
        {"moe_expert_count": "1"},
        {"moe_hard_updates": -1},
        {"moe_gate_threshold": 0.0},
        {"moe_temperature_start": 0.3, "moe_temperature_end": 0.3},
        {"moe_temperature_schedule": "constant", "moe_temperature_start": 0.1, "max_update": 0},
        {"moe_temperature_updates": 10, "max_update": 0},
    ],
)
def test_good_values_pass_without_a_word(moe_options, caplog, given):
    validate(moe_options(**given))
    assert not caplog.text


@pytest.mark.parametrize(
    "freq, layers, indices", [(2, 6, [1, 3, 5]), (1, 3, [0, 1, 2]), (3, 7, [2, 5]), (4, 4, [3])]
)
def test_layer_placement(moe_options, freq, layers, indices):
    assert moe_layer_indices(moe_options(moe_freq=freq), layers) == indices


@pytest.mark.parametrize(
    "text, layers, counts",
    [
        ("16", 3, [16] * 3),
        (16, 2, [16] * 2),
        ("4, 8,16", 3, [4, 8, 16]),
        ("4:16", 4, [4, 8, 12, 16]),
        ("4:16", 1, [4]),
        ("8:8", 2, [8, 8]),
        ("16:4", 3, [16, 10, 4]),
    ],
)
def test_expert_counts(moe_options, text, layers, counts):
    assert expert_counts(moe_options(moe_expert_count=text), layers) == counts


@pytest.mark.parametrize("value, wanted", [(True, True), ("False", False), ("TRUE", True)])
def test_booleans_of_command_line_and_hydra(value, wanted):
    assert parse_bool("moe_gating_use_fp32", value) is wanted


def test_the_error_survives_a_process_boundary():
    error = OptionError("moe_freq", 0, "give 1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "--moe-freq 0: give 1"


def run_config(moe_options, data, **given):
    return OmegaConf.create(
        {
            "task": {"_name": "language_modeling", "data": str(data)},
            "dataset": {"train_subset": "train"},
            "criterion": {"_name": "moe_cross_entropy"},
            "model": vars(moe_options()),
            **given,
        }
    )


@pytest.fixture
def data(tmp_path):
    for name in ("dict.txt", "train.idx"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_good_run_passes_without_a_word(moe_options, data, caplog):
    validate_run(run_config(moe_options, data))
    assert not caplog.text


@pytest.mark.parametrize(
    "missing, message",
    [("", "no such folder"), ("dict.txt", "has no dict.txt"), ("train.idx", "has no train.idx")],
)
def test_missing_data(moe_options, data, missing, message):
    folder = data if missing else data / "nowhere"
    (data / missing).unlink() if missing else None
    with pytest.raises(OptionError, match=f"DATA .*{message}.*evomoe prepare"):
        validate_run(run_config(moe_options, folder))


def test_model_options_are_checked_before_launch(moe_options, data):
    with pytest.raises(OptionError, match="--moe-freq 9"):
        validate_run(run_config(moe_options, data, model=vars(moe_options(moe_freq=9))))


@pytest.mark.parametrize("model", [None, {"_name": "transformer_lm"}, {"moe_gate": "nonsense"}])
def test_other_models_and_partial_yaml_are_left_to_whoever_builds_them(moe_options, data, model):
    validate_run(run_config(moe_options, data, model=model))


@pytest.mark.parametrize(
    "given, weight, warned",
    [
        ({}, 0.0, True),
        ({"moe_aux": "z=0.1"}, 0.1, True),
        ({"moe_aux": "balance=0"}, 0.1, True),
        ({}, 0.01, False),
        ({"moe_aux": "switch=1"}, 0.1, False),
        ({"moe_bias_update_rate": 0.01}, 0.0, False),
        ({"moe_gate": "switch"}, 0.0, False),
    ],
)
def test_unbalanced_annealing_is_warned_of(moe_options, data, caplog, given, weight, warned):
    criterion = {"_name": "moe_cross_entropy", "moe_gate_loss_wt": weight}
    model = vars(moe_options(**given))
    validate_run(run_config(moe_options, data, criterion=criterion, model=model))
    wanted = ["--moe-gate dense_to_sparse: nothing balances the load of experts"]
    assert [text[: len(wanted[0])] for text in caplog.messages] == wanted * warned


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothed_cross_entropy", "of_ones_own"])
def test_a_criterion_without_gate_losses_is_pointed_out(moe_options, data, caplog, name):
    validate_run(run_config(moe_options, data, criterion={"_name": name}))
    assert f"--criterion {name}: gate losses are not added" in caplog.text


@pytest.mark.parametrize("given", [{"_name": "moe_cross_entropy"}, {"moe_gate_loss_wt": 0.1}])
def test_a_criterion_with_them_is_not(moe_options, data, caplog, given):
    validate_run(run_config(moe_options, data, criterion={"_name": "of_ones_own", **given}))
    assert "gate losses" not in caplog.text


def test_missing_data_is_said_to_be_missing(moe_options):
    with pytest.raises(OptionError, match=r"^DATA is missing: .*task\.data=FOLDER"):
        task = {"_name": "language_modeling", "data": None}
        validate_run(run_config(moe_options, None, task=task))
