"""Half precision on a CPU: the MoE model trains close to full precision, or refuses clearly."""

import math

import pytest

ANNEAL = ("--moe-temperature-updates", "6", "--moe-temperature-end", "0.1")


@pytest.fixture(scope="module")
def full_precision(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("fp32"), *ANNEAL).logged("train_inner")


def assert_close(run, wanted):
    assert len(run) == len(wanted)
    assert run[-1]["inner_loss"] == pytest.approx(wanted[-1]["inner_loss"], abs=0.1)
    assert run[-1]["experts_per_token"] == 1
    assert all(math.isfinite(record["gnorm"]) for record in run)


@pytest.mark.parametrize("given", ["--fp16", pytest.param("--bf16", marks=pytest.mark.slow)])
def test_trains_close_to_full_precision(given, full_precision, train, tmp_path):
    assert_close(train(tmp_path, *ANNEAL, given).logged("train_inner"), full_precision)
