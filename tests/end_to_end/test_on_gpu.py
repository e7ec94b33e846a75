"""Whole runs on a GPU, held against the CPU; skipped where there is none."""

import math

import pytest
import torch

from tests.end_to_end.runs import assert_same_weights, evaluate

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.slow,
]
# Without dropout, whose random numbers are the device's own.
ANNEAL = (
    "--moe-temperature-updates",
    "6",
    "--moe-temperature-end",
    "0.1",
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
)
SHARDED = ("--ddp-backend", "fully_sharded")


@pytest.fixture(scope="module")
def on_cpu(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("cpu"), *ANNEAL, "--cpu").logged("train_inner")


@pytest.mark.parametrize(
    "given, tolerance",
    [
        ((), 5e-3),
        (SHARDED, 5e-3),
        (("--fp16",), 0.1),
        (("--bf16",), 0.1),
        (("--memory-efficient-fp16",), 0.1),
        (("--memory-efficient-bf16",), 0.15),
        (("--amp",), 0.1),
        ((*SHARDED, "--fp16"), 0.1),
        (("--checkpoint-activations",), 5e-3),
    ],
)
def test_trains_as_on_the_cpu(given, tolerance, on_cpu, train, tmp_path):
    run = train(tmp_path, *ANNEAL, *given).logged("train_inner")
    assert len(run) == len(on_cpu)
    assert run[-1]["inner_loss"] == pytest.approx(on_cpu[-1]["inner_loss"], abs=tolerance)
    assert run[-1]["experts_per_token"] == 1
    assert all(math.isfinite(record["gnorm"]) for record in run)


@pytest.mark.parametrize("given", [(), ("--bf16",), (*SHARDED, "--fp16")])
def test_resumes_bit_equal(given, train, tmp_path):
    train(tmp_path / "whole", *ANNEAL, *given, "--save-interval-updates", "6")
    (tmp_path / "part").mkdir()
    for file in (tmp_path / "whole").glob("*_6*.pt"):
        name = file.name.replace(
            file.name.split("-shard")[0].removesuffix(".pt"), "checkpoint_last"
        )
        (tmp_path / "part" / name).write_bytes(file.read_bytes())
    assert any((tmp_path / "part").iterdir())
    train(tmp_path / "part", *ANNEAL, *given)
    assert_same_weights(tmp_path / "whole/checkpoint_last.pt", tmp_path / "part/checkpoint_last.pt")


def test_evaluation_is_that_of_the_cpu(train, data_bin, tmp_path):
    train(tmp_path, *ANNEAL)
    path = tmp_path / "checkpoint_last.pt"
    there, here = evaluate(data_bin, path), evaluate(data_bin, path, "--cpu")
    assert float(there["loss"]) == pytest.approx(float(here["loss"]), abs=1e-4)
