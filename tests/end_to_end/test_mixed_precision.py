"""Products in bf16 in real runs: close to fp32, the same after a restart, and in evaluation."""

import pytest

from tests.end_to_end.runs import assert_same_weights, evaluate, load

BF16 = ("--moe-products-dtype", "bf16")
COURSE = ("--moe-temperature-updates", "6", "--moe-temperature-end", "0.1",
          "--save-interval-updates", "6")
TWO = ("--distributed-world-size", "2", "--ddp-backend", "fully_sharded", "--min-params-to-wrap",
       "0", "--checkpoint-activations")
DIVIDED = ("--distributed-world-size", "2", "--ddp-backend", "legacy_ddp",
           "--moe-expert-parallel-size", "2")
EXACT = ("loss", "inner_loss", "gnorm", "experts_per_token", "lr")


@pytest.mark.parametrize("given", [
    (), *(pytest.param(given, marks=pytest.mark.slow) for given in (TWO, DIVIDED)),
], ids=["one process", "fully sharded, checkpointed", "divided experts"])
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
        "torch.float32"}
    again = train(tmp_path / "again", *BF16, *COURSE, *given,
                  "--restore-file", tmp_path / "bf16/checkpoint_1_6.pt").logged("train_inner")
    assert [{k: r[k] for k in EXACT} for r in again] == [
        {k: r[k] for k in EXACT} for r in records[6:]]
    assert_same_weights(tmp_path / "again/checkpoint_last.pt", last)
    validated = run.logged("valid")[-1]["valid_inner_loss"]
    assert evaluate(data_bin, last, "--batch-size", "4")["loss"].item() == pytest.approx(
        validated, abs=6e-4)
