"""Matmuls in bf16 in real runs: close to fp32, the same after a restart, and in evaluation.

Also with the option's old name, on the command line and in a checkpoint.
"""

import pytest
import torch

from tests.end_to_end.runs import assert_same_weights, evaluate, load

OLD = ("--moe-products-dtype", "bf16")
BF16 = ("--moe-matmul-dtype", "bf16")
COURSE = (
    "--moe-temperature-updates",
    "6",
    "--moe-temperature-end",
    "0.1",
    "--save-interval-updates",
    "6",
)
TWO = (
    "--distributed-world-size",
    "2",
    "--ddp-backend",
    "fully_sharded",
    "--min-params-to-wrap",
    "0",
    "--checkpoint-activations",
)
SHARDED = (
    "--distributed-world-size",
    "2",
    "--ddp-backend",
    "legacy_ddp",
    "--moe-expert-parallel-size",
    "2",
)
EXACT = ("loss", "inner_loss", "gnorm", "experts_per_token", "lr")


def with_old_name(path, to):
    """Write the checkpoint as the code before the renaming did."""
    state = load(path)
    model = state["cfg"]["model"]
    model["moe_products_dtype"] = model.pop("moe_matmul_dtype")
    torch.save(state, to)
    return to


@pytest.mark.parametrize(
    "given",
    [
        (),
        *(pytest.param(given, marks=pytest.mark.slow) for given in (TWO, SHARDED)),
    ],
    ids=["one rank", "fully sharded, checkpointed", "sharded experts"],
)
def test_trains_close_to_full_precision_and_resumes_bit_equal(given, train, data_bin, tmp_path):
    exact = train(tmp_path / "fp32", *COURSE, *given).logged("train_inner")
    run = train(tmp_path / "bf16", *BF16, *COURSE, *given)
    records = run.logged("train_inner")
    for a, b in zip(records, exact, strict=True):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=0.02)
        assert a["gnorm"] == pytest.approx(b["gnorm"], rel=0.1)
    assert any(a["inner_loss"] != b["inner_loss"] for a, b in zip(records, exact, strict=True))
    last = tmp_path / "bf16/checkpoint_last.pt"
    assert {str(w.dtype) for w in load(last)["model"].values() if w.is_floating_point()} == {
        "torch.float32"
    }
    old = with_old_name(tmp_path / "bf16/checkpoint_1_6.pt", tmp_path / "old.pt")
    again = train(tmp_path / "again", *OLD, *COURSE, *given, "--restore-file", old).logged(
        "train_inner"
    )
    assert [{k: r[k] for k in EXACT} for r in again] == [
        {k: r[k] for k in EXACT} for r in records[6:]
    ]
    assert_same_weights(tmp_path / "again/checkpoint_last.pt", last)
    model = load(tmp_path / "again/checkpoint_last.pt")["cfg"]["model"]
    assert (model["moe_matmul_dtype"], model["moe_products_dtype"]) == ("bf16", None)
    validated = run.logged("valid")[-1]["valid_inner_loss"]
    loss = evaluate(data_bin, last, "--batch-size", "4")["loss"].item()
    assert loss == pytest.approx(validated, abs=6e-4)
    old = with_old_name(last, tmp_path / "old_last.pt")
    assert evaluate(data_bin, old, "--batch-size", "4")["loss"].item() == loss
    in_fp32 = evaluate(
        data_bin, old, "--batch-size", "4", "--model-overrides", "{'moe_products_dtype': 'same'}"
    )
    assert in_fp32["loss"].item() != loss
