"""State that is neither weights nor the optimizer's resumes too."""

import pytest
import torch

MOE = """--arch transformer_lm_gpttiny_moe --moe-expert-count 4 --moe-gate top_k
--moe-bias-update-rate 0.01 --criterion moe_cross_entropy""".split()
EMA = ("--store-ema", "--ema-decay", "0.5")


def restore(result, name="checkpoint_1_3.pt"):
    return "--restore-file", result.folder / name


def test_the_moving_average_is_of_weights_and_leaves_counters_alone(runs):
    run = runs.train(
        "run", *MOE, *EMA, "--ema-start-update", "2", "--save-interval-updates", "1", updates=3
    )
    states = [run.checkpoint(f"checkpoint_1_{update}.pt") for update in (1, 2, 3)]
    average = states[-1]["extra_state"]["ema"]
    first, second, third = (state["model"] for state in states)
    assert average.keys() == third.keys()
    for name, value in average.items():
        if not value.is_floating_point():
            assert torch.equal(value, third[name]), name
        elif not name.endswith(("gate.bias_C", "version")):  # set after the average is taken
            wanted = 0.25 * first[name] + 0.25 * second[name] + 0.5 * third[name]
            torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(
    "more", [("--ema-update-freq", "2"), ("--fp16", "--ema-fp32")], ids=["every second", "fp16"]
)
def test_the_moving_average_resumes_bit_equal(runs, more):
    options = (*MOE, *EMA, *more, "--save-interval-updates", "3")
    whole = runs.train("whole", *options)
    resumed = runs.train("resumed", *options, *restore(whole))
    assert resumed.losses() == whole.losses(3)
    one, other = (result.checkpoint()["extra_state"] for result in (whole, resumed))
    for part in ("ema", "ema_fp32_params"):
        assert one.get(part, {}).keys() == other.get(part, {}).keys()
        assert all(
            torch.equal(value, other[part][name]) for name, value in one.get(part, {}).items()
        )
