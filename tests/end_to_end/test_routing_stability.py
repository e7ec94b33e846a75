"""Stability of routing in the log, against the checkpoints of each validation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils

from evomoe_plugin import layer
from evomoe_plugin.metrics import parse_log
from evomoe_plugin.routing.stability import NO_EXPERT
from tests.routing.loops import purity_by_loops, token_routing_by_loops

# Null experts leave tokens without an expert, and others with one or two.
GATE = ("--moe-gate", "top_k", "--moe-null-experts", "6", "--moe-freq", "1")
SAME = (
    *(*GATE, "--dropout", "0", "--attention-dropout", "0", "--validate-interval-updates", "4"),
    *("--moe-log-experts", "5", "--log-interval", "1", "--moe-peak-tflops", "0.01"),
)
SIZE = 500
KEYS = re.compile(r"valid_(stability|purity|combine_weight)")


def numbers(record: dict) -> dict:
    """What a validation logs of the sample."""
    return {key: value for key, value in record.items() if KEYS.match(key)}


@pytest.fixture(scope="module")
def one_process(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    given = ("--update-freq", "2", "--moe-stability-tokens", SIZE, "--save-interval-updates", "4")
    return folder, train(folder, *SAME, *given)


def routing_of(path: Path, data_bin: Path):
    """Token ids, and for each layer the first experts and weights, of the first tokens."""
    overrides = {"data": str(data_bin)}
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    model.eval()
    plans = []
    for moe in model.decoder.moe_layers:
        moe.experts.register_forward_pre_hook(lambda _, given: plans.append(given[1]))
    task.load_dataset("valid")
    ids, layers = [], [([], []) for _ in model.decoder.moe_layers]
    for row in range(len(task.dataset("valid"))):  # a row at a time, in the order of the data
        source = task.dataset("valid")[row]["source"]
        ids += source.tolist()
        with torch.no_grad():
            model(source.unsqueeze(0))
        for known, plan in zip(layers, plans, strict=True):
            for values, more in zip(known, token_routing_by_loops(plan), strict=True):
                values += more
        plans.clear()
        if len(ids) >= SIZE:
            break
    return ids[:SIZE], [(first[:SIZE], weights[:SIZE]) for first, weights in layers]


def test_it_equals_loops_over_the_sample(one_process, data_bin):
    folder, run = one_process
    records, before = run.logged("valid"), None
    assert [record["valid_num_updates"] for record in records] == [4, 8, 12]
    for record in records:
        path = folder / f"checkpoint_1_{int(record['valid_num_updates'])}.pt"
        ids, layers = routing_of(path, data_bin)
        wanted = {"purity": [], "combine_weight": [], "stability": []}
        for n, (first, weights) in enumerate(layers):
            wanted["purity"].append(purity_by_loops(ids, first))
            wanted["combine_weight"].append(sum(weights) / SIZE)
            if before is not None:
                kept = sum(a == b for a, b in zip(first, before[n][0], strict=True))
                wanted["stability"].append(kept / SIZE)
        by_key = {
            f"valid_{name}_{n}": value
            for name, values in wanted.items()
            for n, value in enumerate(values)
        }
        by_key |= {
            f"valid_{name}": sum(values) / len(values) for name, values in wanted.items() if values
        }
        # Two tokens may go elsewhere: rounding depends on the batch.
        assert numbers(record) == pytest.approx(by_key, abs=2 / SIZE + 1e-4)
        before = layers
    assert any(NO_EXPERT in first for first, _ in before)
    assert 0 < records[-1]["valid_stability"] < 1


@pytest.mark.parametrize(
    "layout",
    [
        ("--moe-expert-parallel-size", "2", "--batch-size-valid", "3"),
        pytest.param((), marks=pytest.mark.slow),
    ],
    ids=["sharded experts", "replicas"],
)
def test_two_ranks_log_what_one_process_does(one_process, train, tmp_path, layout):
    two = ("--distributed-world-size", "2", "--moe-stability-tokens", SIZE)
    if layout:
        two += ("--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")
        two += ("--checkpoint-activations",)
    run = train(tmp_path, *SAME, *two, *layout)
    pairs = zip(run.logged("valid"), one_process[1].logged("valid"), strict=True)
    for record, wanted in pairs:
        assert numbers(record) == pytest.approx(numbers(wanted), abs=2 / SIZE + 1e-4)
    assert_same_loads(run, one_process[1])


def assert_same_loads(run, wanted):
    """The same shares of the same updates, but for tokens that rounding sends elsewhere."""
    ours, theirs = (parse_log(one.output.splitlines()) for one in (run, wanted))
    for a, b in zip(ours.experts, theirs.experts, strict=True):
        assert a.update == b.update and a.layers.keys() == b.layers.keys()
        for name, layers in a.layers.items():
            torch.testing.assert_close(
                *(torch.tensor(np.array(one, dtype=float)) for one in (layers, b.layers[name])),
                rtol=0,
                atol=5e-3,
                equal_nan=True,  # the mean weight of an expert without a token
            )


def test_speed_is_logged(one_process):
    records = one_process[1].logged("train_inner")
    assert len(records) == 12
    for record in records:
        parts = [record[f"{part}_ms"] for part in ("forward", "backward", "optimizer")]
        assert min(parts) > 0 and record["tflops"] > 0 and record["peak_gb"] > 0.1
        assert record["mfu"] == pytest.approx(record["tflops"] / 0.01, abs=0.011)
    assert [r["hours_left"] for r in records[1:]] == sorted(
        (r["hours_left"] for r in records[1:]), reverse=True
    )
    assert records[-1]["hours_left"] == 0


def test_loads_are_logged_every_n_updates(one_process):
    log = parse_log(one_process[1].output.splitlines())
    assert [record.update for record in log.experts] == [5, 10]
    means = dict(zip(*log.series("experts_per_token"), strict=True))
    for record in log.experts:
        assert len(record.layers["load"]) == 2
        assert [sum(load_E) for load_E in record.layers["load"]] == pytest.approx([1, 1], abs=1e-4)
        experts = record.layers["experts_per_token"]
        assert sum(experts) / 2 == pytest.approx(means[record.update], abs=1e-3)
        assert all(null > 0 for null in record.layers["null"])


MOE = (
    *("--arch", "transformer_lm_gpttiny_moe", "--criterion", "moe_cross_entropy"),
    *("--moe-expert-count", "4", "--validate-interval-updates", "2"),
)


def keys(result, subset: str = "valid") -> list[set[str]]:
    """The names of the numbers that each validation logged of the sample."""
    records = [line for line in result.log if f"{subset}_loss" in line]
    named = re.compile(rf"{subset}_(stability|purity|combine_weight)$")
    return [{found[1] for key in record if (found := named.match(key))} for record in records]


ALL = {"stability", "purity", "combine_weight"}
FIRST = ALL - {"stability"}


def test_after_a_spawn_and_after_a_resume_there_is_no_earlier_validation(runs):
    given = (*MOE, "--moe-spawn-updates", "3")
    result = runs.train("run", *given, updates=6, validate=True)
    assert result.status == 0 and keys(result) == [set(), FIRST, ALL]
    resumed = runs.train("run", *given, updates=10, validate=True)
    assert resumed.status == 0 and keys(resumed) == [FIRST, ALL]


def test_each_validation_set_has_its_sample(runs):
    given = (*MOE, "--valid-subset", "valid,test")
    result = runs.train("run", *given, updates=4, validate=True)
    assert result.status == 0
    assert keys(result) == keys(result, "test") == [FIRST, ALL]


def test_a_validation_that_is_cut_short_logs_what_it_saw(runs):
    result = runs.train("run", *MOE, "--max-valid-steps", "1", updates=4, validate=True)
    assert result.status == 0 and keys(result) == [FIRST, ALL]


def test_without_a_sample_nothing_is_asked(runs, monkeypatch):
    def asked(plan):
        raise AssertionError("token routing")

    monkeypatch.setattr(layer, "token_routing", asked)
    given = (*MOE, "--moe-stability-tokens", "0")
    result = runs.train("run", *given, updates=2, validate=True)
    assert result.status == 0 and keys(result) == [set()]
    with pytest.raises(AssertionError, match="token routing"):
        runs.train("other", *MOE, updates=2, validate=True)
